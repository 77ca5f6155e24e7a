"""SeTok in a vision codec's latents: the pixels are its decoder's, and its weights stay outside."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unimm_tokenizers import Codec, build_codec
from unimm_tokenizers.semantic import (
    LatentSeTokCodec,
    LatentSeTokConfig,
    register_vision_codec,
)
from unimm_tokenizers.semantic.frozen import weights_sha256
from unimm_tokenizers.storage import read_json
from unimm_tokenizers.vision import VisionCodec, VisionConfig, VQGANCodec, VQGANConfig

NAME = "test-vision"
CONFIG = LatentSeTokConfig(
    vision_codec=NAME, dim=16, num_heads=2, codebook_size=32, codebook_dim=4, warmup_steps=1
)


def vision(seed: int = 0, channels: int = 3) -> VisionCodec:
    """Random weights; codes of 8 x 8 pixels."""
    torch.manual_seed(seed)
    config = VisionConfig(
        num_channels=channels,
        channels=8,
        multipliers=(1, 2),
        patch=4,
        latent_channels=6,
        codebook_size=64,
        codebook_dim=None,
    )
    return VisionCodec(config).eval()


def made(own: Codec | None = None, config: LatentSeTokConfig = CONFIG) -> LatentSeTokCodec:
    torch.manual_seed(1)
    return LatentSeTokCodec(config, vision() if own is None else own).eval()


def pictures(count: int) -> Tensor:
    return 2 * torch.rand(count, 3, 32, 32) - 1


def test_the_pixels_are_the_vision_codecs() -> None:
    """Decoding is the vision decoder on latents of its own scale, and is grey without codes."""
    own, codec = vision(), made()
    codes = codec.encode(pictures(3))
    latents = codec._paint(codes).made * codec.scale + codec.middle
    assert latents.shape == (3, 6, 4, 4)
    torch.testing.assert_close(codec.decode(codes), own.decode_latents(latents).clamp(-1, 1))
    nothing = torch.full_like(codes, -1)
    assert codec.decode(nothing).eq(0).all()
    assert codec.decode(codes, size=(20, 30)).shape == (3, 3, 20, 30)


def test_latents_are_compared_at_unit_scale() -> None:
    codec = made()
    table = codec.vision.quantizer.lookup(torch.arange(64)[None, None])[0].T[..., None, None]
    standard = (table - codec.middle) / codec.scale
    assert float(standard.mean(0).abs().max()) < 1e-5
    assert float(standard.var(0, correction=0).mean()) == pytest.approx(1, abs=1e-5)


def test_codes_come_back_from_a_folder(tmp_path: Path) -> None:
    vision().save_pretrained(tmp_path / "vision")
    config = dataclasses.replace(CONFIG, vision_codec=str(tmp_path / "vision"))
    torch.manual_seed(1)
    codec = LatentSeTokCodec(config).eval()
    codec.save_pretrained(tmp_path / "semantic")
    stored = read_json(tmp_path / "semantic/config.json")
    assert stored["vision_sha256"] == weights_sha256(vision())
    assert not any("vision" in name for name in codec.state_dict())
    loaded, x = Codec.from_pretrained(tmp_path / "semantic"), pictures(4)
    codes = codec.encode(x)
    assert torch.equal(loaded.encode(x), codes)
    assert torch.equal(loaded.decode(codes), codec.decode(codes))


def test_another_vision_codec_is_refused(tmp_path: Path) -> None:
    register_vision_codec(NAME, vision)
    made(config=CONFIG).save_pretrained(tmp_path)
    assert isinstance(Codec.from_pretrained(tmp_path), LatentSeTokCodec)
    register_vision_codec(NAME, lambda: vision(seed=3))
    with pytest.raises(ValueError, match=r"'test-vision' has weights .*, the codec was made with"):
        Codec.from_pretrained(tmp_path)


def test_training_leaves_the_vision_codec_alone() -> None:
    own = vision().train()
    before = weights_sha256(own)
    codec = made(own).train()
    for _ in range(2):  # the last convolution of each block starts at zero
        codec.zero_grad()
        output = codec(pictures(4))
        (output.reconstruction.square().mean() + output.loss).backward()
        torch.optim.SGD(codec.parameters(), 1e-2).step()
    assert weights_sha256(own) == weights_sha256(codec.vision) == before
    assert own.training
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert all(parameter.grad is None for parameter in codec.vision.parameters())
    assert all(parameter.grad is not None for parameter in codec.parameters())
    assert output.reconstruction.shape == output.target.shape == (4, 3, 32, 32)


def test_latents_are_learned() -> None:
    """Their loss alone brings the pictures near those that the vision codec makes of its codes."""
    codec = made(config=dataclasses.replace(CONFIG, dim=32, warmup_steps=100, layout_weight=0.0))
    colours = torch.tensor([[-0.8, 0.6, 0.1], [0.7, -0.2, -0.9], [0.0, 0.9, 0.9], [0.9, 0.1, 0.0]])
    x = colours[..., None, None].expand(-1, -1, 32, 32)
    wanted = codec.vision.decode(codec.vision.encode(x))
    optimizer = torch.optim.Adam(codec.parameters(), 2e-3)
    losses, errors = [], []
    for _ in range(25):
        output = codec.train()(x)
        losses.append(float(output.loss.detach()))
        errors.append(float(F.mse_loss(output.reconstruction, wanted).detach()))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert errors[-1] < 0.7 * errors[0]


def test_a_chameleon_codec_serves_as_well() -> None:
    config = VQGANConfig(
        channels=32, multipliers=(1, 1), num_blocks=1, latent_channels=8, codebook_dim=8
    )
    codec = made(VQGANCodec(dataclasses.replace(config, codebook_size=16)))
    codes = codec.encode(pictures(1))
    assert codec._paint(codes).made.shape == (1, 8, 16, 16)
    assert codec.decode(codes).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_codec": "nobody"}, "vision codec 'nobody' is unknown; known are "),
        ({"image_size": 36}, "a latent every 8 pixels, which must divide image_size 36"),
        ({"num_channels": 1}, "has 3 channels, num_channels is 1"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, int | str], message: str) -> None:
    register_vision_codec(NAME, vision)
    with pytest.raises(ValueError, match=message):
        LatentSeTokCodec(dataclasses.replace(CONFIG, **change))  # pyright: ignore[reportArgumentType]


def test_a_codec_without_picture_latents_is_refused() -> None:
    with pytest.raises(ValueError, match="is of class 'setok'; name one of 'vision' or 'vqgan'"):
        made(build_codec("semantic-tiny", seed=0))
