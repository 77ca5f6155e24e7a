import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimm.evaluation.statistics import (
    Share,
    bootstrap_mean,
    paired_difference,
    wilson_interval,
)


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_published_intervals(
    successes: int, total: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_share_lies_in_its_interval_and_the_interval_in_0_to_1(counts: tuple[int, int]) -> None:
    share = Share(*counts)
    assert 0 <= share.low <= share.value <= share.high <= 1
    mirrored = Share(counts[1] - counts[0], counts[1])
    assert mirrored.low == pytest.approx(1 - share.high, abs=1e-12)


def test_a_share_reads_well_and_is_plain() -> None:
    share = Share(482, 500)
    assert str(share) == "96.4% (94.4% to 97.7%, n = 500)"
    assert share.to_dict()["value"] == 0.964
    assert set(share.to_dict()) == {"value", "low", "high", "successes", "total"}


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_what_is_no_share_is_refused(successes: int, total: int) -> None:
    with pytest.raises(ValueError, match="is no share"):
        Share(successes, total)


def test_bootstrap_agrees_with_the_normal_interval_on_many_values() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    mean = bootstrap_mean(values.tolist(), resamples=4000)
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert mean.value == pytest.approx(values.mean())
    assert mean.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert mean.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert mean.count == 2000


def test_bootstrap_depends_on_its_seed_alone() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, resamples=100) != bootstrap_mean(values, seed=1, resamples=100)


def test_one_value_has_an_interval_of_itself() -> None:
    assert bootstrap_mean([2.5]) == (2.5, 2.5, 2.5, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [([], "no values"), ([1.0, math.nan], "value 1 is nan"), ([math.inf], "value 0 is inf")],
)
def test_bootstrap_refuses_what_has_no_mean(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="100 or more"):
        bootstrap_mean([1.0], resamples=10)
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson_interval(1, 2, confidence=95)


def test_pairing_finds_a_difference_that_unpaired_intervals_hide() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(0, 10, size=60)
    second = first - 0.5 + generator.normal(0, 0.2, size=60)
    difference = paired_difference(first.tolist(), second.tolist())
    assert difference.low > 0
    assert bootstrap_mean(first.tolist()).low < bootstrap_mean(second.tolist()).high
    with pytest.raises(ValueError, match="same samples"):
        paired_difference([1.0], [1.0, 2.0])
