"""Shapes that no decoder can have are refused when they are written down."""

import dataclasses
from typing import Any

import pytest

from unimm import ModelConfig, UnifiedLM


def test_defaults_fit_together() -> None:
    config = ModelConfig(vocab_size=128)
    assert config.head_dim * config.num_heads == config.d_model
    assert config.kv_heads == config.num_heads
    assert config.feed_forward == 704  # 8/3 of 256 is 683, and 704 is 11 x 64
    assert dataclasses.replace(config, num_kv_heads=2, d_ff=100).kv_heads == 2
    assert dataclasses.replace(config, d_ff=100).feed_forward == 100
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 8  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 250}, "d_model 250 must split into 4 heads of even width"),
        ({"d_model": 36, "num_heads": 4}, "must split into 4 heads of even width"),
        ({"d_model": 16, "num_heads": 4}, "heads at least 6 wide"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
        ({"norm_order": "post"}, "norm_order 'post' must be 'pre' or 'swin'"),
        ({"dropout": 1.0}, "dropout 1.0 must be 0 or more, and less than 1"),
        ({"window": 0}, "window 0 must be above 0"),
        ({"logit_cap": -1.0}, "logit_cap -1.0 must be above 0"),
        ({"rope_bases": (1e4, 1e4)}, "one base for each of t, h, w"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(vocab_size=128, **changes)


def test_a_model_needs_its_vocabulary() -> None:
    with pytest.raises(ValueError, match="a model needs vocab_size"):
        UnifiedLM(ModelConfig())
