"""Options that other families' weights need: their norms, biases, heads and positions."""

import math
from typing import Any

import pytest
import torch

from unimm import ModelConfig, UnifiedLM
from unimm.model import KVCache, RopeScaling
from unimm.model.positions import rotary_bases, rotary_positions, scaled_speeds

VOCAB = 64
SCALING = RopeScaling(factor=4.0, slow=1.0, fast=4.0, length=64)
OPTIONS: list[dict[str, Any]] = [
    {"qk_norm": None},
    {"qk_norm": "layer"},
    {"qk_norm": "layer", "rope_bases": (1e4,), "norm_order": "swin"},
    {"qkv_bias": True},
    {"d_head": 24},
    {"rope_bases": (1e4,)},
    {"rope_bases": (1e4,), "rope_scaling": SCALING, "qk_norm": None},
    {"rope_bases": (1e4,), "window": 5, "full_every": 3},
]


def make(**options: Any) -> UnifiedLM:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "d_model": 32, "num_layers": 2, "num_heads": 2, **options}
    lm = UnifiedLM(ModelConfig(**shape)).eval()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.ndim == 1:  # ones and zeros would hide what is left out
                parameter.add_(torch.randn_like(parameter) * 0.3)
                assert name
    return lm


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_steps_behind_a_cache_are_the_whole(options: dict[str, Any]) -> None:
    lm = make(**options)
    ids = torch.randint(VOCAB, (2, 12))
    whole = lm.hidden(ids)
    for static in (False, True):
        cache = KVCache(lm.config, 2, 12, static=static)
        parts = []
        for start, stop in ((0, 5), (5, 6), (6, 12)):
            parts.append(lm.hidden(ids[:, start:stop], cache=cache))
            cache.advance(stop - start)
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_everything_is_trained_and_stored(options: dict[str, Any], tmp_path: Any) -> None:
    lm = make(**options)
    lm(torch.randint(VOCAB, (1, 8))).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in lm.parameters())
    lm.save_pretrained(tmp_path)
    again = UnifiedLM.from_pretrained(tmp_path)
    assert again.config == lm.config
    ids = torch.randint(VOCAB, (1, 8))
    assert torch.equal(again(ids), lm(ids))


@torch.no_grad()
def test_one_base_counts_ids_whatever_they_are_of() -> None:
    """Positions on axes are not read; documents of a packed row are as if they stood alone."""
    lm = make(rope_bases=(1e4,))
    ids = torch.randint(VOCAB, (1, 10))
    anywhere = torch.randint(0, 50, (3, 1, 10))
    assert torch.equal(lm(ids, anywhere), lm(ids))
    segments = torch.tensor([[1] * 4 + [2] * 6])
    packed = lm(ids, anywhere, segments)
    assert torch.allclose(packed[:, 4:], lm(ids[:, 4:]), atol=1e-5)
    turned = lm(ids.flip(1))
    assert not torch.allclose(turned[:, -1], lm(ids)[:, -1], atol=1e-3)


def test_slow_pairs_turn_slower() -> None:
    """Fast pairs keep their speed, slow ones turn `factor` times slower, others in between."""
    config = ModelConfig(vocab_size=8, d_model=64, num_heads=1, rope_bases=(1e4,))
    config = ModelConfig(**{**config.__dict__, "rope_scaling": SCALING})
    plain = [1e4 ** (-pair / 32) for pair in range(32)]
    ratio = [own / speed for own, speed in zip(scaled_speeds(config), plain, strict=True)]
    for speed, share in zip(plain, ratio, strict=True):
        turns = SCALING.length * speed / (2 * math.pi)
        if turns >= 4:
            assert share == 1
        elif turns <= 1:
            assert share == pytest.approx(1 / 4)
        else:
            assert 1 / 4 < share < 1
    assert ratio == sorted(ratio, reverse=True)
    positions = torch.arange(5).view(1, 1, 5)
    angles = rotary_positions(config, positions)
    assert angles.shape == (32, 1, 5)
    assert len(rotary_bases(config)) == 32
    assert angles[:, 0, 3].tolist() == pytest.approx([3 * s for s in scaled_speeds(config)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_scaling": SCALING}, "rope_scaling needs one rotary base alone"),
        ({"qk_norm": "batch"}, "qk_norm 'batch' must be 'rms', 'layer' or None"),
        ({"d_head": 5}, "heads of even width"),
        ({"rope_bases": (1e4, 1e4)}, "one base for each of t, h, w, or one alone"),
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)
    with pytest.raises(ValueError, match="factor must be 1 or more"):
        RopeScaling(factor=0.5)
