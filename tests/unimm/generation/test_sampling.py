"""Drawing: exact shares, masks that hold for every random number, no overflow when it is hot."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unimm.generation import Sampling
from unimm.generation.sampling import Settings, guided, inverse_cdf, penalised

COUNT = 20_000
EVEN = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT  # random numbers without chance
LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0, 1.5])


def sample(logits: Tensor, allowed: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    settings = Settings([sampling], torch.device("cpu"))
    knobs = settings.of_rows(torch.zeros(len(logits), dtype=torch.int64))
    return settings.draw(logits.masked_fill(~allowed, -torch.inf), uniform, knobs)


def shares(logits: Tensor, allowed: Tensor | None = None, **options: Any) -> Tensor:
    """How often each id is drawn when the random numbers cover [0, 1) evenly."""
    mask = torch.ones(len(logits), dtype=torch.bool) if allowed is None else allowed
    ids = sample(logits.expand(COUNT, -1), mask.expand(COUNT, -1), EVEN, Sampling(**options))
    assert ids.dtype == torch.int64
    return torch.bincount(ids, minlength=len(logits)) / COUNT


def close(drawn: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(drawn.double(), expected.double(), rtol=0, atol=2 / COUNT)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_temperature(temperature: float) -> None:
    close(shares(LOGITS, temperature=temperature), (LOGITS / temperature).softmax(0))


def test_the_mask_renormalises() -> None:
    allowed = torch.tensor([True, False, True, True, False, False])
    expected = LOGITS.masked_fill(~allowed, -math.inf).softmax(0)
    close(shares(LOGITS, allowed), expected)
    assert shares(LOGITS, allowed, temperature=0.0).argmax() == 3


@pytest.mark.parametrize("top_k", [1, 3, 6, 100])
def test_top_k(top_k: int) -> None:
    kept = LOGITS.topk(min(top_k, 6)).indices
    expected = torch.zeros(6).scatter(0, kept, LOGITS.exp()[kept])
    close(shares(LOGITS, top_k=top_k), expected / expected.sum())


@pytest.mark.parametrize(("top_p", "count"), [(1e-9, 1), (0.4, 1), (0.5, 2), (0.85, 4), (1.0, 6)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, count: int) -> None:
    probabilities = LOGITS.softmax(0)
    order = probabilities.sort(descending=True)
    assert order.values[:count].sum() >= top_p - 1e-6
    assert count == 1 or order.values[: count - 1].sum() < top_p
    expected = torch.zeros(6).scatter(0, order.indices[:count], order.values[:count])
    close(shares(LOGITS, top_p=top_p), expected / expected.sum())


def test_top_k_comes_before_top_p() -> None:
    """Of the two most likely, 0.43 and 0.26, the first alone does not reach half."""
    close(shares(LOGITS, top_k=2, top_p=0.5), shares(LOGITS, top_k=2))
    assert (shares(LOGITS, top_k=1, top_p=0.5) > 0).sum() == 1


@pytest.mark.parametrize(("min_p", "count"), [(0.0, 6), (0.2, 4), (0.3, 3), (1.0, 1)])
def test_min_p_is_a_share_of_the_likeliest(min_p: float, count: int) -> None:
    """Against the likeliest the others weigh e^-0.5, e^-1, e^-1.5, e^-2, e^-3."""
    order = LOGITS.softmax(0).sort(descending=True)
    expected = torch.zeros(6).scatter(0, order.indices[:count], order.values[:count])
    close(shares(LOGITS, min_p=min_p), expected / expected.sum())


def test_settings_are_those_of_a_rows_kind() -> None:
    """A batch of text and pictures, each sampled as if the other were not there."""
    both = [Sampling(temperature=0.5, top_k=2), Sampling(temperature=0.0), Sampling(top_p=0.6)]
    settings = Settings(both, torch.device("cpu"))
    kinds = torch.arange(3).repeat_interleave(500)
    uniform = ((torch.arange(500) + 0.5) / 500).repeat(3)
    knobs = settings.of_rows(kinds)
    drawn = settings.draw(LOGITS.expand(1500, -1), uniform, knobs).view(3, 500)
    every = torch.ones(500, 6, dtype=torch.bool)
    for number, sampling in enumerate(both):
        alone = sample(LOGITS.expand(500, -1), every, uniform[:500], sampling)
        assert torch.equal(drawn[number], alone)


def test_repetition_penalty_lowers_what_was_seen() -> None:
    logits = torch.tensor([[2.0, -1.0, 3.0], [2.0, -1.0, 3.0]])
    seen = torch.tensor([[True, True, False], [False, False, False]])
    lowered = penalised(logits, seen, torch.tensor([2.0, 2.0]))
    assert lowered.tolist() == [[1.0, -2.0, 3.0], [2.0, -1.0, 3.0]]


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 1000])
def test_cumulated_weights_are_searched_exactly(columns: int) -> None:
    weights = torch.rand(64, columns)
    weights[:, torch.rand(columns) < 0.3] = 0
    weights[:, columns // 2] = 1.0
    for uniform in (torch.zeros(64), torch.rand(64), torch.full((64,), 1 - 2**-24)):
        found = inverse_cdf(weights, uniform)
        total = weights.double().cumsum(1)
        shares = total / total[:, -1:]
        rows = torch.arange(64)
        assert bool((weights[rows, found] > 0).all())
        before = shares[rows, found] - weights[rows, found].double() / total[:, -1]
        assert bool((before <= uniform.double() + 1e-6).all())
        assert bool((shares[rows, found] >= uniform.double() - 1e-6).all())


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=6),
    st.data(),
    st.sampled_from([0.0, 1e-45, 1e-6, 1.0, 1e30]),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([None, 1e-6, 0.9, 1.0]),
)
def test_only_allowed_ids_are_drawn(
    values: list[float], data: st.DataObject, temperature: float, k: int | None, p: float | None
) -> None:
    logits = torch.tensor([values])
    mask = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    mask[data.draw(st.integers(0, len(values) - 1))] = True
    draw = data.draw(st.sampled_from([0.0, 1e-30, 0.5, 1 - 2**-24]))
    sampling = Sampling(temperature=temperature, top_k=k, top_p=p)
    token = int(sample(logits, torch.tensor([mask]), torch.tensor([draw]), sampling))
    assert mask[token]


def test_ids_of_no_weight_are_never_drawn() -> None:
    """Neither at the edge of the first one nor where rounding runs past the last."""
    logits = torch.tensor([[-1000.0, 0.0, -1000.0]])  # weights of 0 in float64
    for draw in (0.0, 1 - 2**-53):
        allowed = torch.ones(1, 3, dtype=torch.bool)
        assert sample(logits, allowed, torch.tensor([draw]), Sampling()).tolist() == [1]


def test_rows_draw_alone() -> None:
    logits, uniform = torch.randn(8, 50), torch.rand(8)
    allowed = torch.rand(8, 50) > 0.3
    for sampling in (
        *(Sampling(), Sampling(top_k=5)),
        *(Sampling(top_p=0.7), Sampling(temperature=0.0)),
    ):
        together = sample(logits, allowed, uniform, sampling)
        for row in range(8):
            part = slice(row, row + 1)
            alone = sample(logits[part], allowed[part], uniform[part], sampling)
            assert alone[0] == together[row]


def test_guidance_scales_the_difference() -> None:
    """Classifier-free guidance, Ho and Salimans, equation 6 with w = scale - 1."""
    conditional, unconditional = torch.randn(2, 5), torch.randn(2, 5)
    for scale in (0.0, 1.0, 3.5):
        expected = scale * conditional + (1 - scale) * unconditional
        torch.testing.assert_close(guided(conditional, unconditional, scale), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"temperature": math.nan}, "temperature must be 0 or more, got nan"),
        ({"guidance": math.inf}, "guidance must be a finite number, got inf"),
        ({"min_p": 1.1}, r"min_p must lie in \[0, 1\], got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0, got 0.0"),
        ({"repetition_penalty": math.inf}, "must be a number above 0, got inf"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
