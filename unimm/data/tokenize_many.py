"""Many raw shards -> token shards: skip what is committed, go on past what fails, say so.

A failed shard leaves `failed/<shard>.json` with its error, and is tried again by the next run.
With several workers, each is a process of its own with one torch thread; the shards come out byte
for byte as from one.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from unimm.checkpoint import write_json
from unimm.data.manifest import Manifest
from unimm.data.shards import ShardReader, expand
from unimm.data.templates import Template, default_templates
from unimm.data.tokenize import ShardTokenizer, TokenizeConfig
from unimm.tokenizer import UnifiedTokenizer

FAILED_FOLDER = "failed"
_log = logging.getLogger("unimm")


@dataclass(frozen=True)
class Summary:
    """What became of the shards.

    Args:
        written: names of the shards made by this run.
        kept: names of those that were committed before.
        failed: name -> error.
        documents: number of documents in all committed shards.
        tokens: modality -> ids in all committed shards.
        skipped: number of raw samples left out.
    """

    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    documents: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    skipped: int = 0

    def __str__(self) -> str:
        tokens = ", ".join(f"{count:,} {modality}" for modality, count in self.tokens.items())
        return (
            f"{len(self.written)} shards written, {len(self.kept)} kept, {len(self.failed)} "
            f"failed; {self.documents:,} documents; ids: {tokens or 'none'}; "
            f"{self.skipped:,} samples left out"
        )


class _Job(NamedTuple):
    """What every process needs to do the same work."""

    out: Path
    tokenizer: str
    device: str
    templates: Sequence[Template]
    config: TokenizeConfig


class _Outcome(NamedTuple):
    """One shard's manifest, or its error."""

    source: Path
    manifest: Manifest | None
    error: str


def tokenize_shards(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    tokenizer: UnifiedTokenizer | str | Path,
    templates: Sequence[Template] | None = None,
    config: TokenizeConfig | None = None,
    *,
    device: str = "cpu",
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> Summary:
    """Tokenize raw shards into the folder `out`.

    Args:
        sources: raw shards, as `unimm.data.shards.expand` understands them.
        out: folder of the token shards.
        tokenizer: a tokenizer, or the name or path of its bundle (needed for several workers).
        templates: how samples become documents; None decides by the first sample.
        config: draws, seed, what may be skipped.
        device: where the codecs of a tokenizer that is given by name run.
        workers: processes.
        overwrite: make again what was made from something else.
        progress: show a bar.

    Raises:
        ValueError: shards are missing or share a name, a template can't be written, or a committed
            shard was made from something else and `overwrite` is not set. Nothing is written then.
    """
    paths, config = expand(sources), config or TokenizeConfig()
    names = Counter(path.name for path in paths)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"several raw shards are named {twice[0]}: tokenize them into two folders")
    given = isinstance(tokenizer, UnifiedTokenizer)
    if given and workers > 1:
        raise ValueError(
            "several workers need the tokenizer by name or path, to load it themselves"
        )
    loaded = tokenizer if given else UnifiedTokenizer.from_pretrained(tokenizer).to(device)
    modalities = loaded.vocabulary.modalities
    if templates is None:
        templates = default_templates(ShardReader(paths[0]).samples[0], modalities)
    worker = ShardTokenizer(loaded, templates, config)
    out = Path(out)
    kept, waiting = _committed(worker, paths, out, overwrite=overwrite)
    outcomes: list[_Outcome] = []
    with _bar(progress and bool(waiting), len(waiting)) as bar:
        if workers > 1 and len(waiting) > 1:
            job = _Job(out, str(tokenizer), device, templates, config)
            results = _in_processes(job, waiting, min(workers, len(waiting)), bar)
        else:
            results = _in_turn(worker, waiting, out, bar)
        for outcome in results:
            _record(outcome, out)
            outcomes.append(outcome)
    done = {outcome.source.name: outcome.manifest for outcome in outcomes if outcome.manifest}
    manifests = [*kept.values(), *done.values()]
    tokens: Counter[str] = Counter()
    for manifest in manifests:
        tokens.update(manifest.tokens)
    return Summary(
        written=sorted(done),
        kept=sorted(kept),
        failed={o.source.name: o.error for o in outcomes if o.manifest is None},
        documents=sum(manifest.samples for manifest in manifests),
        tokens=dict(tokens),
        skipped=sum(len(manifest.skipped) for manifest in manifests),
    )


def _committed(
    worker: ShardTokenizer, paths: Sequence[Path], out: Path, *, overwrite: bool
) -> tuple[dict[str, Manifest], list[Path]]:
    """Shards that are there already, and those that are still to be made."""
    kept: dict[str, Manifest] = {}
    waiting: list[Path] = []
    for path in paths:
        if (out / path.name).resolve() == path.resolve():
            raise ValueError(f"{path}: token shards would replace raw ones; name another folder")
        try:
            manifest = worker.committed(path, out)
        except ValueError as error:
            if not overwrite:
                raise
            _log.warning("made again: %s", error)
            manifest = None
        if manifest is None:
            waiting.append(path)
        else:
            kept[path.name] = manifest
    return kept, waiting


class _Bar:
    """Progress over shards, in parts of a shard; silent without a display."""

    def __init__(self, display: Progress | None, shards: int) -> None:
        self._display = display
        self._task = display.add_task("tokenize", total=shards, note="") if display else None
        self._whole = 0
        self._documents = 0
        self._failed = 0

    def part(self, share: float) -> None:
        """A share of the shard in work is done."""
        if self._display is not None and self._task is not None:
            self._display.update(self._task, completed=self._whole + share)

    def shard(self, outcome: _Outcome) -> None:
        """A shard is done."""
        self._whole += 1
        self._documents += outcome.manifest.samples if outcome.manifest else 0
        self._failed += outcome.manifest is None
        if self._display is not None and self._task is not None:
            note = f"{self._documents:,} documents" + f", {self._failed} failed" * bool(
                self._failed
            )
            self._display.update(self._task, completed=self._whole, note=note)


@contextmanager
def _bar(show: bool, shards: int) -> Iterator[_Bar]:
    display = None
    if show:
        display = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.1f}/{task.total} shards"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
    with display or nullcontext():
        yield _Bar(display, shards)


def _in_turn(
    worker: ShardTokenizer, paths: Sequence[Path], out: Path, bar: _Bar
) -> Iterator[_Outcome]:
    for path in paths:
        outcome = _attempt(worker, path, out, bar)
        bar.shard(outcome)
        yield outcome


def _attempt(worker: ShardTokenizer, path: Path, out: Path, bar: _Bar | None) -> _Outcome:
    try:
        manifest = worker.run(path, out, bar.part if bar else None)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        # Written to failed/ and to the summary by the caller; the other shards go on.
        return _Outcome(path, None, f"{error}" or type(error).__name__)
    return _Outcome(path, manifest, "")


def _record(outcome: _Outcome, out: Path) -> None:
    note = out / FAILED_FOLDER / f"{outcome.source.name}.json"
    if outcome.manifest is None:
        _log.error("failed: %s", outcome.error)
        write_json(note, {"shard": str(outcome.source), "error": outcome.error})
    else:
        note.unlink(missing_ok=True)


def _in_processes(job: _Job, paths: Sequence[Path], workers: int, bar: _Bar) -> Iterator[_Outcome]:
    context = multiprocessing.get_context("spawn")  # fork and torch's threads do not mix
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(job,)) as pool:
        futures: dict[Future[_Outcome], Path] = {
            pool.submit(_attempt_in_process, path): path for path in paths
        }
        for future in as_completed(futures):
            try:
                outcome = future.result()
            except BrokenProcessPool:
                # A process was killed (most often for its memory): what it and the others still
                # had to do is open, and the next run does it.
                outcome = _Outcome(futures[future], None, "a worker process was killed; run again")
            bar.shard(outcome)
            yield outcome


_STATE: dict[str, tuple[ShardTokenizer, Path]] = {}


def _start(job: _Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process answers Ctrl-C
    torch.set_num_threads(1)
    tokenizer = UnifiedTokenizer.from_pretrained(job.tokenizer).to(job.device)
    _STATE["worker"] = ShardTokenizer(tokenizer, job.templates, job.config), job.out


def _attempt_in_process(path: Path) -> _Outcome:
    worker, out = _STATE["worker"]
    return _attempt(worker, path, out, None)
