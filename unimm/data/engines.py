"""Where the shards of a run are made: in this process, in several, or on a Ray cluster.

Every engine calls the same worker, one shard at a time, and yields one outcome for each shard. None
of them knows more than that: the worker's manifests decide what is done. A shard that fails is an
outcome, never an end.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unimm.data.manifest import Manifest
from unimm.data.progress import Bar
from unimm.data.sources import Source
from unimm.data.templates import Template
from unimm.data.tokenize import Decoding, Progress, ShardTokenizer, TokenizeConfig
from unimm.memory import keep_freed_memory
from unimm.tokenizer import UnifiedTokenizer

KILLED = "a worker process was killed (most often for its memory); run again"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker needs to do the same work; can be sent to other processes.

    Args:
        out: folder of the token shards, the same for all workers.
        tokenizer: name or path of the bundle.
        device: of the codecs; "cuda" gives each worker a device of its own.
        templates: how samples become documents.
        config: draws, seed, what may be skipped.
    """

    out: Path
    tokenizer: str
    device: str
    templates: Sequence[Template]
    config: TokenizeConfig

    def worker(self, device: str, decoding: Decoding | None = None) -> ShardTokenizer:
        """Load the tokenizer and make a worker of it, in a process that does nothing else."""
        keep_freed_memory()
        tokenizer = UnifiedTokenizer.from_pretrained(self.tokenizer).to(device)
        return ShardTokenizer(tokenizer, self.templates, self.config, decoding=decoding)


class Outcome(NamedTuple):
    """One shard's manifest, or its error with its traceback."""

    source: Source
    manifest: Manifest | None
    error: str = ""
    traceback: str = ""

    @property
    def progress(self) -> Progress | None:
        """The end of the shard; None where it failed."""
        made = self.manifest
        if made is None:
            return None
        samples = len(made.skipped) + made.samples
        return Progress(samples, samples, made.samples, made.tokens)


def attempt(worker: ShardTokenizer, source: Source, out: Path, report: Any = None) -> Outcome:
    """Make one shard; whatever goes wrong is the outcome's error.

    Args:
        worker: makes it.
        source: the raw shard.
        out: folder of the token shards.
        report: called with `Progress`.
    """
    try:
        return Outcome(source, worker.run(source, out, report))
    except Exception as error:  # written to failed/ and to the summary; the other shards go on
        return Outcome(
            source, None, str(error) or type(error).__name__, traceback.format_exc(limit=-8)
        )


class Part(NamedTuple):
    """Which shards are this process's own: every `world`-th, from the `rank`-th on."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Part:
        """The part that torchrun, srun or a SLURM job array gives a process; arrays of either, too.

        Raises:
            ValueError: a number is none, or out of range.
        """
        part = cls()
        for rank, world, first in (
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
            ("RANK", "WORLD_SIZE", ""),
        ):
            if rank == "RANK" and rank not in environment:
                # Not SLURM_NTASKS, which a batch script has too, although it runs but once.
                rank, world = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
            if rank in environment and world in environment:
                step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1")) if first else 1
                number = (int(environment[rank]) - int(environment.get(first, "0"))) // step
                inner = cls(number, int(environment[world]))
                if not 0 <= inner.rank < inner.world:
                    raise ValueError(f"{rank}={inner.rank} of {world}={inner.world}: out of range")
                part = cls(part.rank * inner.world + inner.rank, part.world * inner.world)
        return part


def device_of(device: str, number: int) -> str:
    """The device of a worker: "cuda" is dealt out over the GPUs that are visible."""
    if device != "cuda":
        return device
    return f"cuda:{number % max(1, torch.cuda.device_count())}"


def in_turn(
    worker: ShardTokenizer, sources: Sequence[Source], out: Path, bar: Bar
) -> Iterator[Outcome]:
    """One shard after the other, in this process."""
    for source in sources:
        outcome = attempt(worker, source, out, lambda p, name=source.name: bar.part(name, p))
        bar.end(source.name, outcome.progress)
        yield outcome


def in_processes(job: Job, sources: Sequence[Source], workers: int, bar: Bar) -> Iterator[Outcome]:
    """Several processes with one torch thread each.

    Args:
        job: what they all do.
        sources: the raw shards.
        workers: number of processes.
        bar: told how far they are.
    """
    context = multiprocessing.get_context("spawn")  # fork and torch's threads do not mix
    reports: Any = context.Queue()
    numbers: Any = context.Queue()
    for number in range(workers):
        numbers.put(number)
    listener = threading.Thread(target=_listen, args=(reports, bar), daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(
        workers, context, initializer=_start, initargs=(job, numbers, reports)
    )
    futures: dict[Future[Outcome], Source] = {}
    try:
        futures = {pool.submit(_attempt, source): source for source in sources}
        for future in as_completed(futures):
            try:
                outcome = future.result()
            except BrokenProcessPool:
                # What the killed process and the others still had to do is open: the next run's.
                outcome = Outcome(futures[future], None, KILLED)
            bar.end(outcome.source.name, outcome.progress)
            yield outcome
    finally:  # also when whoever reads the outcomes stops early
        pool.shutdown(cancel_futures=True)
        reports.put(None)
        listener.join()


def _listen(reports: Any, bar: Bar) -> None:
    while (report := reports.get()) is not None:
        bar.part(*report)


_STATE: dict[str, tuple[ShardTokenizer, Path, Any]] = {}


def _start(job: Job, numbers: Any, reports: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process answers Ctrl-C
    torch.set_num_threads(1)
    try:
        number = numbers.get(timeout=10)
    except queue.Empty:  # a process that takes the place of one that ended
        number = os.getpid()
    _STATE["worker"] = job.worker(device_of(job.device, number)), job.out, reports


def _attempt(source: Source) -> Outcome:
    worker, out, reports = _STATE["worker"]
    throttle = _Throttled(source.name, reports)
    return attempt(worker, source, out, throttle)


class _Throttled:
    """Sends every sixteenth report on, so that the queue costs nothing."""

    def __init__(self, name: str, reports: Any) -> None:
        self._name, self._reports, self._count = name, reports, 0

    def __call__(self, progress: Progress) -> None:
        self._count += 1
        if self._count % 16 == 0:
            tokens = dict(progress.tokens)  # a copy: it is sent later, by another thread
            self._reports.put((self._name, progress._replace(tokens=tokens)))
