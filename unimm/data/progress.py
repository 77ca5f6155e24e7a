"""What a run of many shards is doing: done, rates, failures, time left."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Display

from unimm.data.tokenize import Progress

REFRESH_SECONDS = 0.1


class Tally:
    """Adds up the shards in work and those that are done.

    Args:
        shards: number of shards that this run makes.
        started: when it began, in seconds of `time.perf_counter`.
    """

    def __init__(self, shards: int, started: float) -> None:
        self.shards = shards
        self.failed = 0
        self.done = 0
        self.samples = 0
        self.tokens: Counter[str] = Counter()
        self._started = started
        self._open: dict[str, Progress] = {}
        self._ended: set[str] = set()

    def part(self, shard: str, progress: Progress) -> None:
        """A shard in work is that far; a report that comes after its end is old."""
        if shard not in self._ended:
            self._open[shard] = progress

    def end(self, shard: str, progress: Progress | None) -> None:
        """A shard is done; None where it failed."""
        last = self._open.pop(shard, None)
        self._ended.add(shard)
        self.done += 1
        self.failed += progress is None
        reached = progress or last
        if reached is not None:
            # A manifest counts documents; of a shard that reported, the samples are known.
            self.samples += last.total if progress and last else reached.samples
            self.tokens.update(reached.tokens)

    @property
    def completed(self) -> float:
        """Shards done, with the shares of those in work."""
        return self.done + sum(p.samples / max(1, p.total) for p in self._open.values())

    def note(self, now: float) -> str:
        """Samples and ids per second, by modality, and failures."""
        seconds = max(1e-9, now - self._started)
        tokens = Counter(self.tokens)
        samples = self.samples
        for progress in self._open.values():
            tokens.update(progress.tokens)
            samples += progress.samples
        rates = [f"{samples / seconds:,.0f} samples/s"]
        rates += [f"{count / seconds:,.0f} {name}/s" for name, count in tokens.items() if count]
        return ", ".join([*rates, f"{self.failed} failed"] if self.failed else rates)


class Bar:
    """Shows a tally; silent without a display.

    Args:
        tally: what is shown.
        display: where; None shows nothing.
    """

    def __init__(self, tally: Tally, display: Display | None) -> None:
        self.tally = tally
        self._display = display
        self._task = display.add_task("tokenize", total=tally.shards, note="") if display else None
        self._shown = 0.0
        self._lock = threading.Lock()  # parts of shards in other processes come by a thread

    def part(self, shard: str, progress: Progress) -> None:
        """See `Tally.part`."""
        with self._lock:
            self.tally.part(shard, progress)
            if time.perf_counter() - self._shown > REFRESH_SECONDS:
                self._show()

    def end(self, shard: str, progress: Progress | None) -> None:
        """See `Tally.end`."""
        with self._lock:
            self.tally.end(shard, progress)
            self._show()

    def _show(self) -> None:
        self._shown = time.perf_counter()
        if self._display is not None and self._task is not None:
            note = self.tally.note(self._shown)
            self._display.update(self._task, completed=self.tally.completed, note=note)


@contextmanager
def bar(shards: int, *, show: bool) -> Iterator[Bar]:
    """A bar over `shards` shards."""
    tally = Tally(shards, time.perf_counter())
    if not show or not shards:
        yield Bar(tally, None)
        return
    columns: list[str | ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.1f}/{task.total} shards"),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Display(*columns) as display:
        yield Bar(tally, display)
