"""Presets are built on the meta device, and counted."""

import dataclasses

import pytest
import torch

from unimm import ModelConfig, UnifiedLM
from unimm.model import ExpertsConfig, preset, size_of
from unimm.model.presets import PRESETS

# Counted by hand from the shapes: 12 d^2 per layer and a little, 65,536 d of embedding.
MILLIONS = {
    "1M": 1, "3M": 3, "10M": 10, "30M": 31, "125M": 135, "350M": 371, "760M": 780, "1.3B": 1349,
    "3B": 3020, "8B": 7516,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_size_of_its_name(name: str) -> None:
    config = preset(name, vocab_size=65536)
    size = size_of(config)
    counted = size.parameters
    if name in ("1M", "3M", "10M", "30M"):
        counted -= 65536 * config.d_model
    assert round(counted / 1e6) == pytest.approx(MILLIONS[name], abs=1)
    assert size.active == size.parameters
    assert config.head_dim in (64, 128)


def test_a_count_is_that_of_the_made_model() -> None:
    config = ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=2)
    assert size_of(config).parameters == UnifiedLM(config).num_parameters
    with torch.device("meta"):
        lm = UnifiedLM(preset("8B", vocab_size=65536))
    assert all(p.is_meta for p in lm.parameters())


def test_operations_are_those_of_the_formula() -> None:
    """125M, row of 2,048: 6 x 135.3M + 12 layers x 12 x 768 x 2,048."""
    size = size_of(preset("125M", vocab_size=65536))
    assert size.flops_per_token(2048) == 6 * size.parameters + 12 * 12 * 768 * 2048
    untied = size_of(preset("125M", vocab_size=65536, tied_embeddings=False))
    assert untied.flops_per_token(2048) == size.flops_per_token(2048)
    windowed = size_of(preset("125M", vocab_size=65536, window=512, full_every=6))
    reach = 10 * 512 + 2 * 2048
    assert windowed.flops_per_token(2048) == 6 * size.parameters + 12 * 768 * reach


def test_only_chosen_experts_cost() -> None:
    dense = size_of(preset("125M", vocab_size=65536))
    sparse = size_of(preset("125M", vocab_size=65536, experts=ExpertsConfig()))
    assert sparse.parameters > 2.2 * dense.parameters
    assert sparse.active == pytest.approx(dense.active, rel=0.01)
    assert "active" in str(sparse)
    assert "active" not in str(dense)


def test_a_preset_can_be_changed_and_is_named_when_missing() -> None:
    assert preset("1M", vocab_size=512).vocab_size == 512
    assert dataclasses.asdict(preset("1M"))["d_model"] == 128
    with pytest.raises(ValueError, match=r"no model preset '350m' \(did you mean '350M'"):
        preset("350m")
