"""Predictability of codes whose entropy is known."""

import math

import pytest
import torch
from torch import Tensor

from unimm.evaluation.reconstruction.predictability import measure_predictability


def drawn(count: int, levels: int, length: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(size, (1, levels, length), generator=generator) for _ in range(count)]


def test_random_codes_tell_nothing_of_each_other() -> None:
    found = measure_predictability(drawn(20, 2, 400, 16), 16)
    assert found.entropy == pytest.approx([4, 4], abs=0.01)
    assert max(*found.mutual_before, *found.mutual_below) < 0.02
    assert found.ngram == pytest.approx(4, abs=0.5)
    assert found.transformer == pytest.approx(4, abs=0.5)


def test_mutual_information_is_not_made_up_by_a_large_codebook() -> None:
    """Plug-in estimates of 16,384 codes in 1,000 pairs would give about ten bits."""
    found = measure_predictability(drawn(4, 1, 250, 16384), 16384)
    assert found.mutual_before[0] < 0.1


def test_a_walk_is_known_by_its_neighbour() -> None:
    """Steps of -1, 0 or 1: log2 3 bits per code remain of 4."""
    codes = [step.sub(1).cumsum(-1) % 16 for step in drawn(40, 1, 400, 3)]
    found = measure_predictability(codes, 16)
    assert found.entropy[0] > 3.9
    assert found.mutual_before[0] == pytest.approx(4 - math.log2(3), abs=0.1)
    assert found.ngram == pytest.approx(math.log2(3), abs=0.1)
    assert found.transformer is not None
    assert found.transformer < 2.2


def test_a_level_is_known_by_the_one_below() -> None:
    first = drawn(20, 1, 400, 16)
    found = measure_predictability([torch.cat([c, (c * 5 + 3) % 16], dim=1) for c in first], 16)
    assert found.mutual_below == pytest.approx([0, 4], abs=0.05)
    assert found.ngram == pytest.approx(2, abs=0.5)  # four bits, then none


def test_pictures_are_known_by_the_row_above() -> None:
    rows = [c.view(1, 1, 1, 20).expand(1, 1, 20, 20) for c in drawn(80, 1, 20, 8)]
    found = measure_predictability(rows, 8)
    assert found.ngram is not None
    assert found.ngram < 1.0


def test_figures_depend_on_the_seed_alone_and_small_data_has_none() -> None:
    codes = drawn(6, 1, 300, 8)
    assert measure_predictability(codes, 8) == measure_predictability(codes, 8)
    [single] = drawn(1, 1, 50, 8)
    alone = measure_predictability([single], 8)
    assert alone.ngram is None
    assert alone.transformer is None
    with pytest.raises(ValueError, match="there are no codes"):
        measure_predictability([], 8)


def test_padding_is_left_out() -> None:
    [code] = drawn(1, 1, 100, 8)
    padded = torch.nn.functional.pad(code, (0, 20), value=-1)
    assert measure_predictability([padded], 8).entropy == measure_predictability([code], 8).entropy
