"""The Ray engine: the same worker in a Ray Data actor pool, on a laptop or an existing cluster.

An actor holds the codecs and makes whole shards; rows hold numbers and errors, never data. With
GPUs an actor has one to itself, and samples are decoded by CPU tasks wherever there are CPUs;
without them it decodes in threads of its own. All machines see the output folder (and local raw
shards) under the same path. Token authentication is on and the dashboard off: Ray's job interface
would let anyone who reaches it run code (CVE-2023-48022).
"""

from __future__ import annotations

import os
import secrets
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from unimm.data.engines import Job, Outcome, attempt
from unimm.data.manifest import Manifest
from unimm.data.preparing import Prepared, Preparer
from unimm.data.progress import Bar
from unimm.data.shards import Sample
from unimm.data.sources import Source

TASK_SAMPLES = 8  # samples that one decoding task prepares
TASKS_AHEAD = 16  # of each actor


def in_ray(
    job: Job, sources: Sequence[Source], workers: int | None, bar: Bar, address: str | None = None
) -> Iterator[Outcome]:
    """Make shards by a pool of Ray actors.

    Args:
        job: what they all do.
        sources: the raw shards.
        workers: actors; None takes one for each GPU or CPU of the cluster. More than there are GPUs
            share them.
        bar: told when a shard is done.
        address: of a running cluster; None starts one on this machine and ends it afterwards.

    Raises:
        ModuleNotFoundError: Ray is missing.
        ValueError: the cluster does not start or can't be reached, has no GPU although the device
            is one, or failed.
    """
    ray = _ray(address)
    on_gpu = job.device.startswith("cuda")
    try:
        have = int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0))
        if on_gpu and not have:
            raise ValueError("the Ray cluster has no GPU: give --device cpu, or another cluster")
        size = min(workers or max(1, have), len(sources))
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"number": number} for number in range(len(sources))]
        resources = (
            {"num_gpus": min(1.0, 1 / -(-size // have)), "num_cpus": 0}
            if on_gpu
            else {"num_cpus": 1}
        )
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            TokenizeActor,
            fn_constructor_args=(job, list(sources)),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size),
            **resources,
        )
        for row in made.iter_rows():
            outcome = _outcome(row, sources, job)
            bar.end(outcome.source.name, outcome.progress)
            yield outcome
    except ray.exceptions.RayError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ValueError(
            f"the Ray run ended: {reason}; run again, what is committed stays"
        ) from error
    finally:
        ray.shutdown()


def _ray(address: str | None) -> Any:
    """Ray, connected."""
    if "ray" in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # Ray reads its variables when it is imported.
        raise ValueError(
            "Ray was imported before the run: set RAY_AUTH_MODE=token before it is, or leave the "
            "import to unimm"
        )
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:  # nobody else needs to know the token of a cluster of our own
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the Ray engine needs Ray: pip install 'unimm[ray]'") from None
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    options |= {"include_dashboard": False} if address is None else {"address": address}
    try:
        ray.init(**options)
    except Exception as error:  # Ray has none of its own for a node that does not come up in time
        ray.shutdown()
        where = "here" if address is None else f"at {address}"
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"Ray did not start {where}: {reason}; run again, what is committed stays"
        ) from error
    return ray


def _outcome(row: dict[str, Any], sources: Sequence[Source], job: Job) -> Outcome:
    source = sources[int(row["number"])]
    if row["error"]:
        return Outcome(source, None, str(row["error"]), str(row["traceback"]))
    return Outcome(source, Manifest.read(job.out / source.name))


class TokenizeActor:
    """A worker with its codecs in memory: what Ray Data keeps in its pool.

    Args:
        job: what to do.
        sources: the raw shards, by number.
    """

    def __init__(self, job: Job, sources: Sequence[Source]) -> None:
        torch.set_num_threads(1)
        on_gpu = job.device.startswith("cuda")
        # Ray shows an actor its own GPU alone, which is then the first one.
        device = "cuda:0" if on_gpu else job.device
        self._worker = job.worker(device, decode_by_tasks if on_gpu else None)
        self._job, self._sources = job, sources

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """A batch of one number -> its error, empty where the shard was made."""
        rows = {"number": [], "error": [], "traceback": []}
        for number in batch["number"]:
            outcome = attempt(self._worker, self._sources[int(number)], self._job.out)
            rows["number"].append(int(number))
            rows["error"].append(outcome.error)
            rows["traceback"].append(outcome.traceback)
        return rows


def decode_by_tasks(preparer: Preparer, samples: Sequence[Sample]) -> Iterator[Prepared]:
    """Prepare samples in Ray tasks of one CPU each, in their order, some ahead of the reader.

    Args:
        preparer: sent to the tasks once.
        samples: of a shard that the tasks can open.
    """
    import ray

    prepare: Any = ray.remote(num_cpus=1)(_prepare)
    shared = ray.put(preparer)
    waiting: deque[Any] = deque()
    for first in range(0, len(samples), TASK_SAMPLES):
        waiting.append(prepare.remote(shared, list(samples[first : first + TASK_SAMPLES])))
        if len(waiting) > TASKS_AHEAD:
            yield from ray.get(waiting.popleft())
    while waiting:
        yield from ray.get(waiting.popleft())


def _prepare(preparer: Preparer, samples: Sequence[Sample]) -> list[Prepared]:
    torch.set_num_threads(1)
    return [preparer(sample) for sample in samples]
