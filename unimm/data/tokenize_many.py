"""Many raw shards -> token shards: skip what is committed, go on past what fails, say so.

A failed shard leaves `failed/<shard>.json` with its error and traceback, and is tried again by the
next run. Whatever engine makes them, in this process, in several, or on a cluster, and in whatever
order, the shards come out byte for byte the same on one kind of device.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from unimm.checkpoint import write_json
from unimm.data.engines import Job, Outcome, Part, device_of, in_processes, in_turn
from unimm.data.manifest import Manifest
from unimm.data.progress import Bar, bar
from unimm.data.ray_engine import in_ray
from unimm.data.shards import ShardReader
from unimm.data.sources import Source, find_sources
from unimm.data.templates import Template, default_templates
from unimm.data.tokenize import ShardTokenizer, TokenizeConfig
from unimm.memory import keep_freed_memory
from unimm.tokenizer import UnifiedTokenizer

FAILED_FOLDER = "failed"
_log = logging.getLogger("unimm")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the work of a run is shared out.

    Args:
        engine: "local" (processes of this machine) or "ray".
        workers: processes, or Ray actors; None takes one process, or an actor for each GPU or CPU.
        device: where the codecs of a tokenizer that is given by name run; "cuda" gives each worker
            a GPU of its own.
        ray_address: of a running Ray cluster; None starts one for the run.
        part: the share of this process; None asks torchrun's and SLURM's variables.
        max_failed: shards that may fail before no more are begun; below 1, a share of all.
        allow_pipe: run `pipe:` commands.
    """

    engine: Literal["local", "ray"] = "local"
    workers: int | None = None
    device: str = "cpu"
    ray_address: str | None = None
    part: Part | None = None
    max_failed: float | None = None
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be 1 or more, got {self.workers}")
        if self.max_failed is not None and self.max_failed < 0:
            raise ValueError(f"max_failed must be 0 or more, got {self.max_failed}")

    def bound(self, shards: int) -> float:
        """Number of shards that may fail."""
        if self.max_failed is None:
            return float("inf")
        return self.max_failed * shards if self.max_failed < 1 else self.max_failed


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
        open: names of the shards that were left to the next run, because too many had failed.
        others: number of shards that belong to other ranks.
    """

    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    documents: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    open: list[str] = field(default_factory=list)
    others: int = 0

    def __str__(self) -> str:
        tokens = ", ".join(f"{count:,} {modality}" for modality, count in self.tokens.items())
        parts = [
            f"{len(self.written)} shards written, {len(self.kept)} kept, {len(self.failed)} failed",
            f"{self.documents:,} documents",
            f"ids: {tokens or 'none'}",
            f"{self.skipped:,} samples left out",
        ]
        if self.open:
            parts.append(f"{len(self.open)} shards left open: too many failed")
        if self.others:
            parts.append(f"{self.others} shards are other processes' own")
        return "; ".join(parts)


def tokenize_shards(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    tokenizer: UnifiedTokenizer | str | Path,
    templates: Sequence[Template] | None = None,
    config: TokenizeConfig | None = None,
    run: RunConfig | None = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Summary:
    """Tokenize raw shards into the folder `out`.

    Args:
        sources: raw shards, as `unimm.data.sources.find_sources` understands them.
        out: folder of the token shards.
        tokenizer: a tokenizer, or the name or path of its bundle (needed for several workers).
        templates: how samples become documents; None decides by the first sample.
        config: draws, seed, what may be skipped.
        run: engine, workers, device.
        overwrite: make again what was made from something else.
        progress: show a bar.

    Raises:
        ValueError: shards are missing or share a name, a template can't be written, or a committed
            shard was made from something else and `overwrite` is not set. Nothing is written then.
    """
    config, run, out = config or TokenizeConfig(), run or RunConfig(), Path(out)
    found = find_sources(sources, allow_pipe=run.allow_pipe)
    part = run.part or Part.of(os.environ)
    mine = found[part.rank :: part.world]
    several = run.engine == "ray" or (run.workers or 1) > 1
    if isinstance(tokenizer, UnifiedTokenizer):
        if several:
            raise ValueError(
                "several workers need the tokenizer by name or path, to load it themselves"
            )
        loaded = tokenizer
    else:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = "cpu" if several else device_of(run.device, local_rank)
        loaded = UnifiedTokenizer.from_pretrained(tokenizer).to(device)
    if templates is None:  # by the first of all shards: every rank decides alike
        templates = _default_templates(found[0], out, loaded)
    worker = ShardTokenizer(loaded, templates, config)
    keep_freed_memory()
    kept, waiting = _committed(worker, mine, out, overwrite=overwrite)
    outcomes: list[Outcome] = []
    with bar(len(waiting), show=progress) as shown:
        job = Job(
            out=out, tokenizer=str(tokenizer), device=run.device, templates=templates, config=config
        )
        # Closed at once when too many failed, so that no more shards are begun.
        with closing(_outcomes(run, job, worker, waiting, shown)) as results:
            for outcome in results:
                _record(outcome, out)
                outcomes.append(outcome)
                if sum(o.manifest is None for o in outcomes) > run.bound(len(mine)):
                    break
    done = {outcome.source.name: outcome.manifest for outcome in outcomes if outcome.manifest}
    manifests = [*kept.values(), *done.values()]
    tokens: Counter[str] = Counter()
    for manifest in manifests:
        tokens.update(manifest.tokens)
    ended = {outcome.source.name for outcome in outcomes}
    return Summary(
        written=sorted(done),
        kept=sorted(kept),
        failed={o.source.name: o.error for o in outcomes if o.manifest is None},
        documents=sum(manifest.samples for manifest in manifests),
        tokens=dict(tokens),
        skipped=sum(len(manifest.skipped) for manifest in manifests),
        open=[source.name for source in waiting if source.name not in ended],
        others=len(found) - len(mine),
    )


def _default_templates(source: Source, out: Path, tokenizer: UnifiedTokenizer) -> list[Template]:
    with source.local(out) as path:
        first = ShardReader(path).samples[0]
        return default_templates(first, tokenizer.vocabulary.modalities)


def _outcomes(
    run: RunConfig, job: Job, worker: ShardTokenizer, waiting: Sequence[Source], shown: Bar
) -> Generator[Outcome, None, None]:
    """What the chosen engine makes of the shards that are still to be made."""
    if not waiting:
        return
    if run.engine == "ray":
        yield from in_ray(job, waiting, run.workers, shown, run.ray_address)
    elif (run.workers or 1) > 1 and len(waiting) > 1:
        yield from in_processes(job, waiting, min(run.workers or 1, len(waiting)), shown)
    else:
        yield from in_turn(worker, waiting, job.out, shown)


def _committed(
    worker: ShardTokenizer, sources: Sequence[Source], out: Path, *, overwrite: bool
) -> tuple[dict[str, Manifest], list[Source]]:
    """Shards that are there already, and those that are still to be made."""
    kept: dict[str, Manifest] = {}
    waiting: list[Source] = []
    for source in sources:
        path = source.path
        if path is not None and (out / source.name).resolve() == path.resolve():
            raise ValueError(f"{path}: token shards would replace raw ones; name another folder")
        try:
            manifest = worker.committed(source, out)
        except ValueError as error:
            if not overwrite:
                raise
            _log.warning("made again: %s", error)
            manifest = None
        if manifest is None:
            waiting.append(source)
        else:
            kept[source.name] = manifest
    return kept, waiting


def _record(outcome: Outcome, out: Path) -> None:
    note = out / FAILED_FOLDER / f"{outcome.source.name}.json"
    if outcome.manifest is None:
        _log.error("failed: %s", outcome.error)
        facts = {"shard": str(outcome.source), "error": outcome.error}
        write_json(note, {**facts, "traceback": outcome.traceback})
    else:
        note.unlink(missing_ok=True)
