import threading
import time

import pytest

from unimm.data.prefetch import Prefetch


def squared(number: int) -> int:
    time.sleep(0.002 * (number % 3))
    return number * number


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_results_come_in_order(threads: int) -> None:
    prefetch = Prefetch(squared, lambda _: 1, threads=threads, ahead=8, budget=100)
    assert list(prefetch(range(30))) == [n * n for n in range(30)]


def test_calls_overlap_with_reading() -> None:
    """The next call begins while a result is still in the reader's hands."""
    begun: list[int] = []
    second = threading.Event()

    def call(number: int) -> int:
        begun.append(number)
        if number == 1:
            second.set()
        return number

    results = Prefetch(call, lambda _: 1, threads=1, ahead=2, budget=100)(range(3))
    assert next(results) == 0
    assert second.wait(5)
    assert list(results) == [1, 2]
    assert begun == [0, 1, 2]


def test_unread_results_are_bounded() -> None:
    """Of results of 10 bytes each and a budget of 25, three are made before one is read."""
    lock = threading.Lock()
    held = most = 0

    def call(number: int) -> bytes:
        nonlocal held, most
        with lock:
            held += 10
            most = max(most, held)
        return bytes(10)

    results = Prefetch(call, len, threads=1, ahead=50, budget=25)(range(60))
    for _ in results:
        time.sleep(0.001)
        with lock:
            held -= 10
    assert most <= 50  # three that wait, one in the reader's hands, one that was begun


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_is_raised_where_its_result_is_read(threads: int) -> None:
    def call(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results = Prefetch(call, lambda _: 1, threads=threads, ahead=4, budget=100)(range(100))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_a_reader_that_stops_leaves_no_call_waiting() -> None:
    calls: list[int] = []

    def call(number: int) -> bytes:
        calls.append(number)
        return bytes(10)

    before = threading.active_count()
    results = Prefetch(call, len, threads=2, ahead=20, budget=5)(range(1000))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(calls) < 40
    assert threading.active_count() == before
