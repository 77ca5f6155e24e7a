"""Calls of a function ahead of who reads their results: in order, bounded in memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")


class Prefetch(Generic[Input, Output]):
    """Maps a function over inputs by threads, so that reading and decoding overlap with coding.

    Args:
        function: called with one input; what it raises is raised where its result is read.
        weigh: bytes that a result holds.
        threads: of the calls; 0 makes each call when its result is read.
        ahead: calls that may be waiting, running or done but unread.
        budget: bytes that unread results may hold before another call begins; those that run
            already may go beyond it.
    """

    def __init__(
        self,
        function: Callable[[Input], Output],
        weigh: Callable[[Output], int],
        *,
        threads: int,
        ahead: int,
        budget: int,
    ) -> None:
        self._function = function
        self._weigh = weigh
        self._threads = threads
        self._ahead = max(1, ahead)
        self._budget = budget
        self._held = 0
        self._room = threading.Condition()
        self._closed = False

    def __call__(self, inputs: Iterable[Input]) -> Iterator[Output]:
        """Results in the order of the inputs."""
        if self._threads == 0:
            yield from map(self._function, inputs)
            return
        waiting: deque[Future[tuple[Output, int]]] = deque()
        source = iter(inputs)
        with ThreadPoolExecutor(self._threads, "unimm-decode") as pool:
            try:
                for entry in source:
                    waiting.append(pool.submit(self._call, entry))
                    if len(waiting) >= self._ahead:
                        yield self._read(waiting.popleft())
                while waiting:
                    yield self._read(waiting.popleft())
            finally:  # the reader stopped early, or a call failed: begin no more
                self._release(0, closed=True)
                for future in waiting:
                    future.cancel()

    def _call(self, entry: Input) -> tuple[Output, int]:
        # Calls begin in order, so what is read next is never behind results that fill the budget.
        with self._room:
            self._room.wait_for(lambda: self._held < self._budget or self._closed)
        output = self._function(entry)
        weight = self._weigh(output)
        with self._room:
            self._held += weight
        return output, weight

    def _read(self, future: Future[tuple[Output, int]]) -> Output:
        output, weight = future.result()
        self._release(weight)
        return output

    def _release(self, weight: int, *, closed: bool = False) -> None:
        with self._room:
            self._held -= weight
            self._closed = self._closed or closed
            self._room.notify_all()
