"""Chameleon both ways: decoder and picture tokenizer, with the detokenizer that writes pictures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from unimm import UnifiedLM, UnifiedTokenizer, generate, stream
from unimm.conversion import convert, from_hugging_face, to_hugging_face
from unimm.conversion.chameleon import code_name
from unimm.conversion.text import foreign_ids
from unimm_tokenizers.vision import VQGANCodec, VQGANConfig

DIFFERENCE = 1e-5
CONFIG = VQGANConfig(
    channels=32,
    multipliers=(1, 2),
    num_blocks=1,
    attention=(1,),
    latent_channels=8,
    codebook_dim=8,
    codebook_size=16,
)
ORDERS = pytest.mark.parametrize("swin", [False, True], ids=["7B", "34B"])


@pytest.fixture
def vqgan(tmp_path: Path) -> Path:
    """A whole VQ-GAN under the names of Meta's file: the decoder is what the folder lacks."""
    torch.manual_seed(1)
    state = VQGANCodec(CONFIG).state_dict()
    decoder = {k: v for k, v in state.items() if k.startswith(("decoder.", "post_quant_conv."))}
    save_file(decoder, tmp_path / "vqgan.safetensors")
    return tmp_path / "vqgan.safetensors"


@torch.no_grad()
def their_logits(model: Any, ids: Tensor) -> Tensor:
    """Without the mask that `transformers` puts over picture codes."""
    return model.lm_head(model.model(ids).last_hidden_state)


@ORDERS
@torch.no_grad()
def test_logits_are_those_of_transformers(
    swin: bool, save_chameleon: Any, vqgan: Path, tmp_path: Path
) -> None:
    """Over words and a picture, which is written without its sizes, as Chameleon knows it."""
    model = save_chameleon(swin_norm=swin)
    tokenizer, lm = from_hugging_face(tmp_path / "source", vqgan=vqgan)
    pixels = torch.rand(8, 8, 3).mul(255).byte()
    document = ["the fox", Image.fromarray(pixels.numpy()), " and the dog"]
    ours = tokenizer.encode(document)
    names = model.config.vocabulary_map
    (codes,) = (s.codes for s in tokenizer.grammar.parse(ours) if s.kind == "image")
    assert codes.shape == (1, 4, 4)
    theirs = [names["<s>"], *words(tokenizer, "the fox"), names["<racm3:break>"]]
    theirs += [names[code_name(code)] for code in codes.flatten().tolist()]
    theirs += [names["<eoss>"], *words(tokenizer, " and the dog"), names["</s>"]]
    assert len(theirs) == len(ours)
    expected, logits = their_logits(model, torch.tensor([theirs])), lm(ours[None])
    vocabulary = tokenizer.vocabulary
    text = torch.arange(2, tokenizer.text.size)  # without <unk> and <image>, which stood apart
    ours_text = logits[..., text + vocabulary["text"].start]
    assert (ours_text - expected[..., text + words_from(tokenizer)]).abs().max() <= DIFFERENCE
    rows = torch.tensor([names[code_name(code)] for code in range(16)])
    ours_codes = logits[..., torch.arange(16) + vocabulary["image.0"].start]
    assert (ours_codes - expected[..., rows]).abs().max() <= DIFFERENCE
    assert expected.std() > 0.1


def words(tokenizer: UnifiedTokenizer, text: str) -> list[int]:
    return (tokenizer.text.encode(text) + words_from(tokenizer)).tolist()


def words_from(tokenizer: UnifiedTokenizer) -> int:
    """Pieces taken out before the first word; two that are no markers here stay."""
    assert tokenizer.text.decode(torch.tensor([0, 1])) == "<unk><image>"
    return 4 + 16 + 4 - 2


@ORDERS
@torch.no_grad()
def test_and_back_again(swin: bool, save_chameleon: Any, vqgan: Path, tmp_path: Path) -> None:
    save_chameleon(swin_norm=swin)
    tokenizer, lm = from_hugging_face(tmp_path / "source", vqgan=vqgan)
    to_hugging_face(tokenizer, lm, tmp_path / "out")
    loaded = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "out")
    back: Any = loaded.eval()
    foreign = foreign_ids(tokenizer.vocabulary)
    ids = torch.randint(0, len(tokenizer.vocabulary), (2, 40))
    difference = (their_logits(back, foreign[ids])[..., foreign] - lm(ids)).abs().max()
    assert difference <= DIFFERENCE
    # A picture goes the whole way in transformers: pixels to its own ids.
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    codes = tokenizer.codecs["image"].encode(pixels).flatten()
    tokens = back.model.get_image_tokens(pixels).flatten().long()
    block = tokenizer.vocabulary["image.0"]
    assert torch.equal(foreign[codes + block.start], tokens)
    again = from_hugging_face(tmp_path / "out")
    assert again.tokenizer.vocabulary == tokenizer.vocabulary
    for name, tensor in lm.state_dict().items():
        assert torch.equal(again.lm.state_dict()[name], tensor), name


def test_it_writes_pictures(save_chameleon: Any, vqgan: Path, tmp_path: Path) -> None:
    """What `transformers` masks: a picture of the one size, from a bundle, whole and in rows."""
    save_chameleon()
    convert(tmp_path / "source", tmp_path / "bundle", vqgan=vqgan)
    tokenizer = UnifiedTokenizer.from_pretrained(tmp_path / "bundle")
    lm = UnifiedLM.from_pretrained(tmp_path / "bundle")
    documents = generate(lm, tokenizer, ["a fox"], modality="image", seed=0, num_samples=2)
    for (picture,) in documents:
        assert isinstance(picture, Image.Image)
        assert picture.size == (8, 8)
    pieces = list(stream(lm, tokenizer, ["a fox"], modality="image", seed=0))
    assert sum(len(piece.codes) for piece in pieces) == 16
    with pytest.raises(ValueError, match=r"this model writes \(1, 4, 4\) .* codes, no others"):
        generate(lm, tokenizer, ["a fox"], modality="image", size=(16, 16))
    free = generate(lm, tokenizer, ["a fox"], max_new_tokens=60, seed=1, num_samples=4)
    assert len(free) == 4  # whatever it chose to write, it can be decoded


def test_pictures_of_other_sizes_are_cut(save_chameleon: Any, vqgan: Path, tmp_path: Path) -> None:
    save_chameleon()
    tokenizer = from_hugging_face(tmp_path / "source", vqgan=vqgan).tokenizer
    wide = Image.new("RGB", (80, 20))
    wide.paste((255, 255, 255), (15, 0, 65, 20))
    square = tokenizer.encode([Image.new("RGB", (8, 8), (255, 255, 255))])
    assert torch.equal(tokenizer.encode([wide]), square)
    (picture,) = tokenizer.decode(square)
    assert isinstance(picture, Image.Image)
    assert picture.size == (8, 8)


@torch.no_grad()
def test_the_encoder_is_that_of_transformers(
    save_chameleon: Any, vqgan: Path, tmp_path: Path
) -> None:
    model = save_chameleon()
    codec = from_hugging_face(tmp_path / "source", vqgan=vqgan).tokenizer.codecs["image"]
    pixels = torch.rand(3, 3, 24, 16) * 2 - 1
    expected = model.model.vqmodel.encode(pixels)
    assert isinstance(codec, VQGANCodec)
    latents = codec.encoder(pixels)
    assert (latents - expected.last_hidden_state).abs().max() <= DIFFERENCE
    assert torch.equal(codec.encode(pixels).flatten(), expected.image_tokens)
    assert codec.encode(pixels).unique().numel() > 2


@torch.no_grad()
def test_the_decoder_is_that_of_transformers() -> None:
    """Janus's, of the same family, with attention in its lowest level, which is its first."""
    shape: Any = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8}
    model = JanusVQVAE(
        JanusVQVAEConfig(**shape, base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1)
    ).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    state = {}
    for name, tensor in model.state_dict().items():
        new = name.replace("quantize.", "quantizer.", 1)
        for level in (0, 1):
            new = (
                new
                if f"up.{level}." not in name
                else name.replace(f"up.{level}.", f"up.{1 - level}.")
            )
        state[new] = tensor
    codec = VQGANCodec(CONFIG)
    codec.load_state_dict(state)
    latents = torch.randn(2, 8, 3, 5)
    difference = (codec.decoder(latents) - model.decoder(latents)).abs().max()
    assert difference <= DIFFERENCE


def test_without_a_decoder_anywhere(save_chameleon: Any, tmp_path: Path) -> None:
    save_chameleon()
    with pytest.raises(ValueError, match=r"hold no decoder of pictures .* --vqgan FILE"):
        from_hugging_face(tmp_path / "source")


def test_metas_own_file(save_chameleon: Any, vqgan: Path, tmp_path: Path) -> None:
    """A .ckpt of the whole VQ-GAN, with the weights of its training loss; nothing in it is run."""
    save_chameleon()
    state = {
        k.replace("quantizer.", "quantize."): v for k, v in VQGANCodec(CONFIG).state_dict().items()
    }
    path = tmp_path / "vqgan.ckpt"
    torch.save({"state_dict": {**state, "loss.discriminator.weight": torch.zeros(1)}}, path)
    codec = from_hugging_face(tmp_path / "source", vqgan=path).tokenizer.codecs["image"]
    assert torch.equal(
        codec.state_dict()["decoder.conv_in.weight"], state["decoder.conv_in.weight"]
    )
    torch.save({"state_dict": {"decoder.conv_in.weight": torch.zeros(2)}}, path)
    with pytest.raises(
        ValueError,
        match=r"vqgan.ckpt: weights do not fit .* first at 'decoder.conv_in.bias'",
    ):
        from_hugging_face(tmp_path / "source", vqgan=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("vocabulary_map"), "must name all codes"),
        (lambda c: c["vocabulary_map"].pop("IMGIMGCZ"), "must name all codes"),
        (lambda c: c["vocabulary_map"].pop("<eoss>"), "names no '<eoss>'"),
        (lambda c: c["vq_config"].update(double_latent=True), "double_latent"),
        (lambda c: c["vq_config"].update(num_embeddings=8), "names 16 codes, the VQ-GAN has 8|fit"),
    ],
)
def test_what_is_wrong_is_named(
    change: Any, message: str, save_chameleon: Any, vqgan: Path, tmp_path: Path
) -> None:
    save_chameleon()
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        from_hugging_face(tmp_path / "source", vqgan=vqgan)


def test_the_codec_trains_and_is_stored(tmp_path: Path) -> None:
    codec = VQGANCodec(CONFIG).train()
    x = torch.rand(2, 3, 9, 13) * 2 - 1
    output = codec(x)
    assert output.reconstruction.shape == output.target.shape == (2, 3, 10, 14)
    (output.loss + (output.reconstruction - output.target).square().mean()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in codec.parameters())
    codec.eval().save_pretrained(tmp_path)
    codes = codec.encode(x)
    again = VQGANCodec.from_pretrained(tmp_path)
    assert torch.equal(again.encode(x), codes)
    assert again.decode(codes, (9, 13)).shape == x.shape
    with pytest.raises(ValueError, match="must be a multiple of 32"):
        VQGANConfig(channels=20)
