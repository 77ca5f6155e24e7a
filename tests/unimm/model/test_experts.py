"""The sparse feed-forward against one written out token by token."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unimm import ModelConfig, UnifiedLM
from unimm.model import ExpertsConfig
from unimm.model.experts import SparseFeedForward

SHAPE = ModelConfig(
    vocab_size=64, d_model=16, num_layers=2, num_heads=2, experts=ExpertsConfig(count=4)
)


def make(balance: float = 0.0) -> SparseFeedForward:
    experts = ExpertsConfig(count=4, balance=balance)
    layer = SparseFeedForward(dataclasses.replace(SHAPE, experts=experts))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def test_each_token_goes_through_its_experts() -> None:
    layer, x = make(), torch.randn(3, 5, 16)
    made = layer(x).view(-1, 16)
    assert layer.choices is not None
    for token, out, choices in zip(x.view(-1, 16), made, layer.choices, strict=True):
        probability = layer.router(token).softmax(-1)
        assert set(choices.tolist()) == set(probability.topk(2).indices.tolist())
        expected = torch.zeros(16)
        for expert in choices.tolist():
            gate, up = (token @ layer.gate_up[expert]).chunk(2)
            share = probability[expert] / probability[choices].sum()
            expected = expected + share * ((F.silu(gate) * up) @ layer.down[expert])
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_formula() -> None:
    layer, x = make(), torch.randn(6, 16, requires_grad=True)
    seen = torch.randn(6, 16)

    def dense(given: Tensor) -> Tensor:
        """Every expert for every token, those not chosen weighted by nothing."""
        probability = layer.router(given).softmax(-1)
        weights, choices = probability.topk(2)
        mask = torch.zeros(6, 4).scatter(1, choices, weights / weights.sum(-1, keepdim=True))
        gate, up = torch.einsum("td,edf->tef", given, layer.gate_up).chunk(2, dim=-1)
        return torch.einsum("tef,efd,te->td", F.silu(gate) * up, layer.down, mask)

    inputs = (x, *layer.parameters())
    found, expected = (torch.autograd.grad((run(x) * seen).sum(), inputs) for run in (layer, dense))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_the_balancing_loss_is_that_of_the_paper_and_reaches_the_router() -> None:
    layer, x = make(balance=0.5), torch.randn(40, 16)
    probability = layer.router(x).softmax(-1)
    share = F.one_hot(probability.topk(2).indices, 4).float().mean((0, 1))
    expected = 4 * (share * probability.mean(0)).sum()
    (0 * layer(x)).sum().backward()  # nothing but the balancing loss is left
    assert layer.balance_loss is not None
    torch.testing.assert_close(layer.balance_loss, expected.detach())
    (gradient,) = torch.autograd.grad(0.5 * expected, layer.router.weight)
    torch.testing.assert_close(layer.router.weight.grad, gradient)


def test_the_balancing_loss_spreads_tokens() -> None:
    layer, x = make(balance=1.0), torch.randn(256, 16) + 1
    with torch.no_grad():
        layer.router.weight[0] += 0.3  # one expert draws nearly all tokens
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.03)
    used, losses = [], []
    for _ in range(60):
        optimizer.zero_grad()
        (0 * layer(x)).sum().backward()
        optimizer.step()
        assert layer.choices is not None
        assert layer.balance_loss is not None
        used.append(int(torch.bincount(layer.choices.flatten(), minlength=4).max()))
        losses.append(float(layer.balance_loss))
    assert used[0] > 220
    assert used[-1] < 0.85 * used[0]
    assert 0.95 < losses[-1] < 1.2 < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_mixed_precision_stays_near(dtype: torch.dtype) -> None:
    layer, x = make(), torch.randn(64, 16)
    exact = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        near = layer(x)
    assert near.dtype == dtype
    assert (near.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_the_last_layer_of_each_group_is_sparse() -> None:
    experts = ExpertsConfig(count=4, every=2)
    lm = UnifiedLM(dataclasses.replace(SHAPE, experts=experts, num_layers=4))
    kinds = [type(block.feed_forward).__name__ for block in lm.blocks]  # type: ignore[union-attr]
    assert kinds == ["FeedForward", "SparseFeedForward"] * 2


def test_save_and_load(tmp_path: Path) -> None:
    lm = UnifiedLM(SHAPE)
    lm.save_pretrained(tmp_path)
    again = UnifiedLM.from_pretrained(tmp_path)
    assert again.config == lm.config
    ids = torch.randint(64, (2, 9))
    assert torch.equal(again(ids), lm.eval()(ids))


@pytest.mark.parametrize("change", [{"chosen": 5}, {"chosen": 0}, {"every": 0}, {"balance": -1.0}])
def test_impossible_numbers_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="experts: choose 1 to count"):
        ExpertsConfig(count=4, **change)  # type: ignore[arg-type]
