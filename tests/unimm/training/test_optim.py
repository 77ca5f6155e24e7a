"""Which parameters move how, and how fast."""

import pytest
import torch
from torch import nn

from unimm.model import ModelConfig, UnifiedLM
from unimm.training.average import WeightAverage
from unimm.training.optim import (
    GroupRule,
    OptimizerConfig,
    build_optimizers,
    clip_gradients,
    describe,
    set_learning_rate,
)


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


def test_a_cosine_falls_to_its_floor() -> None:
    config = OptimizerConfig(warmup=0, decay=1.0, shape="cosine", floor=0.1)
    factors = [config.factor(step, 100) for step in (0, 50, 100)]
    assert factors == pytest.approx([1.0, 0.55, 0.1])
    assert config.factor(25, 100) == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)
    late = OptimizerConfig(warmup=0, decay=0.2, shape="cosine")
    assert [late.factor(step, 100) for step in (0, 80, 90, 100)] == pytest.approx([1, 1, 0.5, 0])


@pytest.mark.parametrize("change", [{"floor": 1.5}, {"decay": -0.1}, {"floor": -1.0}])
def test_impossible_schedules_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="floor and decay must lie in 0 to 1"):
        OptimizerConfig(**change)  # type: ignore[arg-type]


def test_rules_change_the_parameters_that_they_name() -> None:
    lm = tiny_lm(tied=False)
    rules = (GroupRule(match="embedding", scale=0.1), GroupRule(match="norm", weight_decay=0.5))
    config = OptimizerConfig(matrices="muon", learning_rate=1.0, rules=rules)
    adamw, muon = build_optimizers(lm, config)
    found = {
        name: (group["peak"], group["weight_decay"])
        for optimizer in (adamw, muon)
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert found["embedding.weight"] == (0.1, 0.0)
    assert found["norm.weight"] == (1.0, 0.5)
    assert found["head.weight"] == (1.0, 0.01)
    assert found["blocks.0.attention.out.weight"] == (0.02, 0.01)
    assert len(found) == len(list(lm.parameters()))


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"match": "no_such"}, "'no_such' fits the name of no trained parameter"),
        ({"match": "("}, "is no regular expression"),
        ({"match": "norm", "scale": -1.0}, "scale of 'norm' must be 0 or more"),
    ],
)
def test_rules_that_mean_nothing_are_refused(rule: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build_optimizers(tiny_lm(tied=True), OptimizerConfig(rules=(GroupRule(**rule),)))  # type: ignore[arg-type]


def test_nothing_to_train_is_refused() -> None:
    lm = tiny_lm(tied=True).requires_grad_(False)
    with pytest.raises(ValueError, match="there is no parameter to train"):
        build_optimizers(lm, OptimizerConfig())


def test_groups_are_described_in_a_line_each() -> None:
    lines = describe(build_optimizers(tiny_lm(tied=True), OptimizerConfig(matrices="muon")))
    plain, muon = lines.splitlines()
    assert plain.startswith("AdamW: 4,320 parameters, peak 0.001, decay 0: embedding.weight")
    assert muon.startswith("Muon: ")
    assert "blocks.*.attention.qkv.weight" in muon


@pytest.mark.parametrize("bound", [0.0, 0.5, 1e9])
def test_clipping_is_by_the_norm_of_all(bound: float) -> None:
    lm = tiny_lm(tied=True)
    lm(torch.randint(128, (2, 8))).square().mean().backward()
    parameters = list(lm.parameters())
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    norm = clip_gradients(parameters, bound)
    assert float(norm) == pytest.approx(float(flat.norm()), rel=1e-5)
    after = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()
    expected = float(flat.norm()) if bound in (0.0, 1e9) else min(bound, float(flat.norm()))
    assert float(after) == pytest.approx(expected, rel=1e-4)


def test_an_average_follows_the_weights() -> None:
    module = nn.Linear(1, 1, bias=False)
    average, expected = WeightAverage(module, 0.9), float(module.weight.detach())
    for step in range(1, 200):
        with torch.no_grad():
            module.weight.fill_(step)
        average.update(module.named_parameters(), step)
        decay = min(0.9, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * step
    assert float(average.weights["weight"]) == pytest.approx(expected, rel=1e-5)
    again = WeightAverage(nn.Linear(1, 1, bias=False), 0.9)
    again.load(average.weights)
    assert torch.equal(again.weights["weight"], average.weights["weight"])
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        WeightAverage(module, 1.0)
