"""Sound codecs' configs: levels that can be left out, other quantizers, a transformer, Snake."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unimm_tokenizers import Codec
from unimm_tokenizers.audio import SoundStreamCodec, SoundStreamConfig, StreamingCodec
from unimm_tokenizers.audio.attention import ContextBlock
from unimm_tokenizers.quantize import FactorizedResidualQuantizer, FiniteScalarQuantizer

SMALL: dict[str, Any] = {
    **{"sample_rate": 1000, "channels": 4, "strides": (2, 4), "dilations": (1,)},
    **{"latent_channels": 8, "num_codebooks": 4, "codebook_size": 16},
}


def built(**options: Any) -> SoundStreamCodec:
    """After one training pass, which starts the codebooks."""
    codec = SoundStreamCodec(SoundStreamConfig(**{**SMALL, **options})).train()
    with torch.no_grad():
        codec(sound(400, 4))
    return codec.eval()


def sound(samples: int, batch: int = 1) -> Tensor:
    return 0.5 * torch.sin(torch.rand(batch, 1, 1) * torch.arange(samples))


@torch.no_grad()
@pytest.mark.parametrize("quantizer", ["residual", "factorized"])
def test_a_ladder_of_bitrates(quantizer: str, tmp_path: Path) -> None:
    codec = built(quantizer=quantizer)
    x = sound(160, 2)
    whole = codec.encode(x)
    assert codec.bitrate == 1000 / 8 * 4 * 4
    codec.num_codebooks = 2
    assert (codec.num_codebooks, codec.bitrate) == (2, 1000 / 8 * 2 * 4)
    codes = codec.encode(x)
    assert torch.equal(codes, whole[:, :2])
    streamed, _ = codec.encode_chunk(x, codec.init_state(2))
    assert torch.equal(streamed, codes)
    with pytest.raises(ValueError, match=r"expected codes \(batch, 2 levels, 1 grid axes\), got"):
        codec.decode(whole)
    made = codec.decode(codes)
    codec.save_pretrained(tmp_path)
    read = Codec.from_pretrained(tmp_path)
    assert read.num_codebooks == 2  # what is saved is what is in use
    assert torch.equal(read.encode(x), codes)
    torch.testing.assert_close(read.decode(codes), made)
    codec.num_codebooks = 4
    assert torch.equal(codec.encode(x), whole)


@pytest.mark.parametrize("count", [0, 5, -1])
def test_levels_that_do_not_exist_are_refused(count: int) -> None:
    codec = built()
    with pytest.raises(ValueError, match=f"num_codebooks must lie in 1 to 4, got {count}"):
        codec.num_codebooks = count


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"fsq_levels": (4, 3, 5), "num_codebooks": 1},
        {"num_codebooks": 1, "codebook_dim": 4},
        {"quantizer": "factorized", "codebook_dim": 3},
        {"activation": "snake"},
        {"compress": 2, "residual_kernel": 3},
        {"attention_layers": 2, "attention_context": 5},
        {"num_channels": 1, "quantizer_dropout": 0.5},
    ],
    ids=str,
)
def test_every_variant_is_saved_streams_and_learns(options: dict[str, Any], tmp_path: Path) -> None:
    codec = built(**options)
    x = sound(240, 2)
    codes, made = codec.encode(x), codec.decode(codec.encode(x))
    codec.save_pretrained(tmp_path)
    read = Codec.from_pretrained(tmp_path)
    assert isinstance(read, StreamingCodec)
    assert torch.equal(read.encode(x), codes)
    state, parts, signals = read.init_state(2), [], []
    for chunk in x.split(13, dim=2):
        part, state = read.encode_chunk(chunk, state)
        signal, state = read.decode_chunk(part, state)
        parts.append(part)
        signals.append(signal)
    assert torch.equal(torch.cat(parts, -1), codes)
    torch.testing.assert_close(torch.cat(signals, -1), made, rtol=0, atol=1e-5)
    with torch.enable_grad():
        output = codec.train()(x)
        (output.loss + (output.reconstruction - output.target).square().mean()).backward()
    silent = {n for n, p in codec.named_parameters() if p.grad is None}
    assert not silent
    assert output.codes.shape == codes.shape


def test_the_config_names_the_quantizer() -> None:
    assert isinstance(built(quantizer="factorized").quantizer, FactorizedResidualQuantizer)
    finite = built(fsq_levels=(4, 3, 5), num_codebooks=1)
    assert isinstance(finite.quantizer, FiniteScalarQuantizer)
    assert finite.codebook_size == 60


@torch.no_grad()
def test_attention_is_causal_and_looks_back_as_far_as_it_says() -> None:
    block = ContextBlock(16, context=4).double()
    block.scales.fill_(1.0)
    x = torch.randn(1, 16, 30, dtype=torch.float64)
    whole = block(x)
    for place in (0, 3, 17):
        changed = x.clone()
        changed[..., place] += 1
        touched = (block(changed) != whole).any(1)[0].nonzero().flatten().tolist()
        assert touched == list(range(place, place + 4))


@torch.no_grad()
def test_a_transformer_lengthens_the_receptive_field() -> None:
    plain = built().receptive_field[0]
    codec = built(attention_layers=2, attention_context=5)
    assert codec.receptive_field[0] == plain + 2 * 4 * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_channels": 3}, "num_channels must be 1 or 2, got 3"),
        ({"quantizer": "vq"}, "quantizer must be one of residual, factorized, got 'vq'"),
        ({"fsq_levels": (4, 4)}, "set num_codebooks to 1"),
        ({"quantizer_dropout": 1.5}, "quantizer_dropout must lie in 0 to 1"),
        ({"attention_layers": -1}, "attention_layers be 0 or more"),
        ({"codebook_size": 1}, "codebook_size must be at least 2"),
        ({"sample_rate": 0}, "sample_rate must be at least 1"),
        ({"activation": "relu"}, "activation must be one of elu, snake, got 'relu'"),
        ({"strides": ()}, "strides must be numbers of 2 or more"),
    ],
)
def test_impossible_configs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoundStreamConfig(**options)
