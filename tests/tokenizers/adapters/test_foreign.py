"""Tokenizers of other libraries, with random weights: the same codes as calling them directly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unimm_tokenizers.adapters import (
    ChameleonAdapter,
    FunctionCodec,
    FunctionConfig,
    TorchScriptAdapter,
    TorchScriptConfig,
    adapt,
    open_checkpoint,
)
from unimm_tokenizers.codec import Codec
from unimm_tokenizers.storage import sha256

transformers = pytest.importorskip("transformers")

SMALL_IMAGE: dict[str, Any] = {
    "embed_dim": 8,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1,
}


def encodec() -> nn.Module:
    return transformers.EncodecModel(
        transformers.EncodecConfig(
            sampling_rate=24000,
            target_bandwidths=[3.6, 7.2],
            num_filters=4,
            hidden_size=16,
            codebook_dim=16,
            codebook_size=64,
            upsampling_ratios=[5, 4, 2],
        )
    ).eval()


def dac() -> nn.Module:
    return transformers.DacModel(
        transformers.DacConfig(
            encoder_hidden_size=4,
            decoder_hidden_size=32,
            downsampling_ratios=[2, 5],
            n_codebooks=3,
            codebook_size=64,
            codebook_dim=4,
        )
    ).eval()


def mimi() -> nn.Module:
    return transformers.MimiModel(
        transformers.MimiConfig(
            num_filters=4,
            hidden_size=32,
            codebook_dim=16,
            vector_quantization_hidden_dimension=16,
            codebook_size=64,
            num_quantizers=4,
            upsample_groups=32,
            num_hidden_layers=1,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).eval()


def chameleon() -> nn.Module:
    config = transformers.ChameleonVQVAEConfig(**SMALL_IMAGE, num_embeddings=64, resolution=32)
    return transformers.ChameleonVQVAE(config).eval()


def janus() -> nn.Module:
    config = transformers.JanusVQVAEConfig(**SMALL_IMAGE, num_embeddings=64, num_patches=8)
    return transformers.JanusVQVAE(config).eval()


def emu3() -> nn.Module:
    config = transformers.Emu3VQVAEConfig(
        **SMALL_IMAGE, codebook_size=64, hidden_size=64, attn_resolutions=[2]
    )
    return transformers.Emu3VQVAE(config).eval()


def vq_model() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=64,
    ).eval()


MAKERS = {
    "encodec": encodec,
    "dac": dac,
    "mimi": mimi,
    "chameleon": chameleon,
    "janus": janus,
    "emu3": emu3,
    "vq_model": vq_model,
}


def made(name: str) -> nn.Module:
    """With random weights, and codebooks that are not the zeros they begin as."""
    torch.manual_seed(0)
    model = MAKERS[name]()
    for key, buffer in model.named_buffers():
        if key.endswith(("codebook.embed", "embed_sum")):
            buffer.normal_(std=0.01)
    return model


@torch.no_grad()
def directly(name: str, model: Any, x: Tensor) -> Tensor:
    """What the library's own call gives for a signal of whole codes."""
    if name == "encodec":
        return model.encode(x, bandwidth=7.2).audio_codes[0]
    if name in ("dac", "mimi"):
        return model.encode(x).audio_codes
    if name == "emu3":
        sizes = [tuple(x.shape[-2:])] * len(x)
        return torch.stack(model.encode(x, sizes).image_tokens)[:, None]
    side = x.shape[-1] // (2 if name == "vq_model" else 4)
    if name == "vq_model":
        return model.quantize(model.encode(x).latents)[2][2].view(len(x), 1, side, side)
    return model.encode(x).image_tokens.view(len(x), 1, side, side)


def signal(codec: Codec, units: int = 8, batch: int = 2) -> Tensor:
    if codec.modality == "audio":
        return torch.rand(batch, 1, units * codec.downsample[0]) - 0.5
    sides = [units * step for step in codec.downsample[-2:]]
    return torch.rand(batch, 3, *sides) * 2 - 1


@pytest.fixture(scope="module", params=MAKERS)
def named(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Codec]:
    model = made(request.param)
    return request.param, model, adapt(model)


def test_codes_are_those_of_the_library_itself(named: tuple[str, nn.Module, Codec]) -> None:
    name, model, codec = named
    x = signal(codec)
    codes = codec.encode(x)
    assert codes.dtype == torch.int64
    assert codes.shape[:2] == (2, codec.num_codebooks)
    assert len(codes.unique()) > 2
    assert torch.equal(codes, directly(name, model, x))


def test_any_size_comes_back(named: tuple[str, nn.Module, Codec]) -> None:
    name, _, codec = named
    if name == "chameleon":
        pytest.skip("transformers has no decoder for Chameleon's codes")
    whole = signal(codec, batch=1)
    x = whole[..., :-1] if codec.modality == "audio" else whole[..., :-3, :-1]
    codes = codec.encode(x)
    again = codec.decode(codes, tuple(x.shape[2:]))
    assert again.shape == x.shape
    assert bool(again.isfinite().all())
    assert float(again.abs().max()) <= 1
    with pytest.raises(ValueError, match=r"codes hold"):
        codec.decode(codes, tuple(10 * n for n in x.shape[2:]))


def test_files_bring_the_same_codes(named: tuple[str, nn.Module, Codec], tmp_path: Path) -> None:
    _, _, codec = named
    codec.save_pretrained(tmp_path)
    again = Codec.from_pretrained(tmp_path)
    assert type(again) is type(codec)
    x = signal(codec)
    assert torch.equal(again.encode(x), codec.encode(x))


def test_bad_signals_and_codes_are_refused(named: tuple[str, nn.Module, Codec]) -> None:
    _, _, codec = named
    x = signal(codec)
    with pytest.raises(ValueError, match=r"expected values in \[-1, 1\]"):
        codec.encode(x + 3)
    codes = codec.encode(x)
    with pytest.raises(ValueError, match="codes must lie in"):
        codec.decode(codes + codec.codebook_size)
    output = codec(x) if not isinstance(codec, ChameleonAdapter) else None
    assert output is None or float(output.loss) == 0


def test_emu3_takes_films() -> None:
    model: Any = made("emu3")
    codec = adapt(model, fps=8.0)
    film = torch.rand(1, 3, 8, 16, 16) * 2 - 1
    codes = codec.encode(film)
    assert codes.shape == (1, 1, 2, 4, 4)
    with torch.no_grad():
        direct = model.encode(film.transpose(1, 2), [(16, 16)]).image_tokens
    assert torch.equal(codes[:, 0], torch.stack(direct))
    assert codec.decode(codes).shape == film.shape
    odd = film[:, :, :5, :15]
    assert codec.decode(codec.encode(odd), (5, 15, 16)).shape == odd.shape


def test_levels_and_bandwidth_can_be_chosen() -> None:
    assert adapt(encodec(), bandwidth=3.6).num_codebooks < adapt(encodec()).num_codebooks
    few = adapt(mimi(), num_codebooks=2)
    assert few.encode(signal(few)).shape[1] == 2
    assert adapt(dac(), num_codebooks=1).num_codebooks == 1
    with pytest.raises(ValueError, match=r"bandwidth 5 is none of \[3.6, 7.2\]"):
        adapt(encodec(), bandwidth=5.0)


def test_what_codes_alone_cannot_tell_is_refused() -> None:
    config = transformers.EncodecConfig(
        normalize=True,
        chunk_length_s=1.0,
        overlap=0.01,
        num_filters=4,
        hidden_size=16,
        codebook_dim=16,
        codebook_size=64,
    )
    with pytest.raises(ValueError, match="volume scales per chunk"):
        adapt(transformers.EncodecModel(config))
    with pytest.raises(ValueError, match=r"no adapter for Linear.*EncodecModel.*VQModel"):
        adapt(nn.Linear(2, 2))
    codec = adapt(chameleon())
    with pytest.raises(ValueError, match="no decoder for these codes"):
        codec.decode(codec.encode(signal(codec)))
    with pytest.raises(ValueError, match="expected a ChameleonVQVAE, got a Linear"):
        ChameleonAdapter.wrap(nn.Linear(2, 2))


def test_an_adapter_writes_the_documents_of_a_unified_tokenizer(tmp_path: Path) -> None:
    from PIL import Image

    from unimm import Audio, UnifiedTokenizer
    from unimm.text import TextModel

    text = TextModel.train(["seven eight nine", "up down left right"] * 3, size=290)
    tok = UnifiedTokenizer(text, [adapt(made("janus")), adapt(made("encodec"), bandwidth=3.6)])
    picture = Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy())
    document = ["seven", picture, Audio(torch.rand(1, 2400) - 0.5, 24000)]
    ids = tok.encode(document)
    words, again, sound = tok.decode(ids)
    assert words == "seven"
    assert isinstance(again, Image.Image)
    assert again.size == (32, 32)
    assert isinstance(sound, Audio)
    assert sound.samples.shape == (1, 2400)
    tok.save_pretrained(tmp_path)
    assert torch.equal(UnifiedTokenizer.from_pretrained(tmp_path).encode(document), ids)


class _Encoder(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        means = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4)[:, 0]
        return ((means + 1) * 7.5).round().long(), means


class _Decoder(nn.Module):
    def forward(self, codes: Tensor) -> Tensor:
        grey = (codes.float() / 7.5 - 1).repeat_interleave(4, -1).repeat_interleave(4, -2)
        return grey[:, None].expand(-1, 3, -1, -1)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_torchscript_pair_is_checked_and_called(tmp_path: Path) -> None:
    files = [tmp_path / "encoder.jit", tmp_path / "decoder.jit"]
    for path, module in zip(files, (_Encoder(), _Decoder()), strict=True):
        torch.jit.script(module).save(str(path))
    hashes = [sha256(path) for path in files]
    config = TorchScriptConfig(
        encoder=str(files[0]),
        decoder=str(files[1]),
        encoder_sha256=hashes[0],
        decoder_sha256=hashes[1],
        codebook_size=16,
        downsample=(4, 4),
    )
    codec = TorchScriptAdapter(config)
    x = torch.rand(2, 3, 9, 8) * 2 - 1
    codes = codec.encode(x)
    padded = nn.functional.pad(x, (0, 0, 0, 3), mode="replicate")
    assert torch.equal(codes[:, 0], _Encoder()(padded)[0])
    assert codec.decode(codes, (9, 8)).shape == x.shape
    with pytest.raises(ValueError, match="a bundle holds weights alone"):
        codec.save_pretrained(tmp_path / "out")
    files[0].write_bytes(files[0].read_bytes() + b"x")
    with pytest.raises(ValueError, match="this is another file"):
        TorchScriptAdapter(config)
    files[0].unlink()
    with pytest.raises(ValueError, match="the file is missing"):
        TorchScriptAdapter(config)


def test_two_functions_are_a_codec() -> None:
    codec = FunctionCodec(
        FunctionConfig(modality="audio", codebook_size=256, downsample=(1,), num_channels=1),
        lambda x: ((x + 1) * 127.5).round(),
        lambda codes: codes / 127.5 - 1,
    )
    x = torch.rand(1, 1, 7) * 2 - 1
    again = codec.decode(codec.encode(x), (7,))
    assert float((again - x).abs().max()) <= 1 / 255 + 1e-6
    with pytest.raises(ValueError, match="make it a class"):
        codec.save_pretrained("nowhere")


@pytest.mark.parametrize("name", ["dac", "vq_model"])
def test_checkpoint_folders_are_opened_without_a_network(name: str, tmp_path: Path) -> None:
    model: Any = made(name)
    model.save_pretrained(tmp_path)
    codec = open_checkpoint(tmp_path)
    x = signal(codec)
    assert torch.equal(codec.encode(x), directly(name, model, x))
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaModel"]}')
    with pytest.raises(ValueError, match="holds 'LlamaModel', for which there is no adapter"):
        open_checkpoint(tmp_path)
