import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimm.data.packing import fill, pack

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=80)


@settings(max_examples=40)
@given(LENGTHS, st.integers(20, 60), st.integers(1, 90))
def test_every_document_is_whole_in_one_row(
    lengths: list[int], row_length: int, window: int
) -> None:
    order = np.random.default_rng(len(lengths)).permutation(len(lengths))
    if min(lengths) > row_length:
        with pytest.raises(ValueError, match="raise row_length"):
            pack(lengths, row_length, order, window)
        return
    packing = pack(lengths, row_length, order, window)
    rows = [packing.row(number).tolist() for number in range(len(packing))]
    assert all(rows)
    assert all(sum(lengths[d] for d in row) <= row_length for row in rows)
    packed = sorted(d for row in rows for d in row)
    assert packed == [d for d, length in enumerate(lengths) if length <= row_length]
    assert sorted(packing.rejected) == [d for d, n in enumerate(lengths) if n > row_length]
    used = sum(lengths[d] for d in packed)
    assert packing.padding == pytest.approx(1 - used / (len(rows) * row_length))


@settings(max_examples=20)
@given(LENGTHS)
def test_packing_is_fixed_by_its_input(lengths: list[int]) -> None:
    one, two = pack(lengths, 40), pack(lengths, 40)
    assert one.documents.tolist() == two.documents.tolist()
    assert one.starts.tolist() == two.starts.tolist()


@settings(max_examples=40)
@given(st.lists(st.integers(1, 12), max_size=9), st.integers(0, 40))
def test_filling_is_the_best_there_is(lengths: list[int], space: int) -> None:
    chosen = fill(lengths, space)
    assert len(set(chosen)) == len(chosen)
    sums = {0}
    for length in lengths:
        sums |= {total + length for total in sums}
    assert sum(lengths[number] for number in chosen) == max(s for s in sums if s <= space)


def test_rows_keep_near_the_given_order() -> None:
    order = np.random.default_rng(0).permutation(4000)
    packing = pack(np.random.default_rng(1).integers(5, 60, 4000), 200, order)
    place = np.empty(4000, dtype=int)
    place[order] = np.arange(4000)
    assert np.abs(place[packing.documents] - np.arange(4000)).max() < 400


def test_a_document_that_fills_a_row_fits() -> None:
    packing = pack([10, 11], 10)
    assert len(packing) == 1
    assert packing.padding == 0
    assert packing.rejected.tolist() == [1]


def test_the_first_in_line_always_goes() -> None:
    packing = pack(np.array([1] * 20 + [9] + [1] * 500), 10, window=16)
    rows = [packing.row(number).tolist() for number in range(5)]
    assert any(20 in row for row in rows)


@pytest.mark.parametrize("spread", [(20, 80), (100, 900), (30, 300), (2, 9)])
def test_little_of_the_rows_is_padding(spread: tuple[int, int]) -> None:
    lengths = np.random.default_rng(0).integers(*spread, 6000)
    assert pack(lengths, 4 * spread[1]).padding < 0.003


def test_packing_is_quick() -> None:
    lengths = np.random.default_rng(0).integers(20, 300, 50_000)
    begun = time.process_time()
    pack(lengths, 1024)
    assert time.process_time() - begun < 3  # 60 us a document; measured 5
