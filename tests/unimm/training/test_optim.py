"""Which parameters move how, and how fast."""

import pytest
import torch
from torch import nn

from unimm.model import ModelConfig, UnifiedLM
from unimm.training.optim import OptimizerConfig, build_optimizers, set_learning_rate


def tiny_lm(*, tied: bool) -> UnifiedLM:
    return UnifiedLM(
        ModelConfig(vocab_size=128, d_model=32, num_layers=2, num_heads=2, tied_embeddings=tied)
    )


def members(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


def test_learning_rate_rises_and_falls_to_nothing() -> None:
    config = OptimizerConfig(warmup=4, decay=1.0)
    factors = [config.factor(step, 10) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 0.7]
    assert factors[4:] == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


def test_learning_rate_stays_until_the_last_share() -> None:
    config = OptimizerConfig(warmup=2, decay=0.2)
    factors = [config.factor(step, 100) for step in (0, 1, 50, 80, 90, 99, 100)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.5, 0.05, 0.0])


def test_learning_rate_without_warm_up_starts_at_the_peak() -> None:
    assert OptimizerConfig(warmup=0, decay=0.5).factor(0, 10) == 1.0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_every_parameter_is_moved_once(*, tied: bool, matrices: str) -> None:
    lm = tiny_lm(tied=tied)
    config = OptimizerConfig(matrices=matrices)  # type: ignore[arg-type]
    moved = [name for optimizer in build_optimizers(lm, config) for name in members(optimizer)]
    assert sorted(moved) == sorted(id(parameter) for parameter in lm.parameters())


def test_vectors_and_embeddings_are_not_decayed() -> None:
    lm = tiny_lm(tied=False)
    (optimizer,) = build_optimizers(lm, OptimizerConfig(weight_decay=0.1))
    decayed = {
        id(parameter)
        for group in optimizer.param_groups
        if group["weight_decay"] > 0
        for parameter in group["params"]
    }
    expected = {id(m.weight) for m in lm.modules() if isinstance(m, nn.Linear)}
    assert decayed == expected


def test_muon_takes_the_linear_layers_of_the_blocks_alone() -> None:
    lm = tiny_lm(tied=False)
    lm.table = nn.Parameter(torch.zeros(4, 4))  # a matrix that is no linear layer
    adamw, muon = build_optimizers(lm, OptimizerConfig(matrices="muon"))
    linear = {id(m.weight) for m in lm.blocks.modules() if isinstance(m, nn.Linear)}
    assert set(members(muon)) == linear
    assert lm.head is not None
    assert {id(lm.head.weight), id(lm.embedding.weight), id(lm.table)} <= set(members(adamw))


def test_frozen_parameters_are_left_out() -> None:
    lm = tiny_lm(tied=True)
    lm.blocks.requires_grad_(False)
    (optimizer,) = build_optimizers(lm, OptimizerConfig(matrices="muon"))
    trained = {id(parameter) for parameter in lm.parameters() if parameter.requires_grad}
    assert set(members(optimizer)) == trained


def test_learning_rates_are_scaled_from_their_peaks() -> None:
    config = OptimizerConfig(matrices="muon", learning_rate=1e-3, matrix_learning_rate=2e-2)
    adamw, muon = build_optimizers(tiny_lm(tied=True), config)
    for factor in (0.5, 0.1):
        set_learning_rate(adamw, factor)
        set_learning_rate(muon, factor)
        assert {group["lr"] for group in adamw.param_groups} == {1e-3 * factor}
        assert {group["lr"] for group in muon.param_groups} == {2e-2 * factor}
