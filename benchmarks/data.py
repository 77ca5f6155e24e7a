"""What tokenizing costs beside its codecs, on real shards, and how it grows with processes.

    python benchmarks/data.py --data FOLDER [--samples 400] [--out benchmarks/results]

FOLDER holds `photos/photos-000000.tar` and `digits/` (see recipes/digits). Every goal is printed
with what was asked and what was reached, in processor time: other programs stretch it less than
wall time, and the load of the machine is written down. Of three rounds, which take turns, the
fastest counts.

- overhead: everything that is no codec (reading, decoding, templates, grammar, writing), as a share
  of the codecs' time, all in one thread; and with a decoding thread, the part of it that does not
  overlap with the codecs;
- beside webdataset: a plain loop (WebDataset, decode, batches of 64, encode, TarWriter) over the
  same codec, which writes codes alone and checks nothing;
  All of it with the allocator's setting that `unimm tokenize` makes (`unimm.memory`);
- processes: one against two, with one torch thread and no decoding thread each: the ratio of their
  wall times, and twice the processor time of one over that of two, which is what the wall times
  would give if each process had a core of its own.
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

import unimm
from unimm.data import digits
from unimm.data.engines import Part
from unimm.data.manifest import Manifest
from unimm.data.media import decode
from unimm.data.shards import ShardReader, ShardWriter
from unimm.data.templates import Template
from unimm.data.tokenize import ShardTokenizer, TokenizeConfig
from unimm.memory import keep_freed_memory
from unimm.text import TextModel
from unimm.tokenizer import UnifiedTokenizer, audio_signal, image_signal
from unimm_tokenizers.codec import Codec

LOOP_BATCH = 64
CHECKS = 100  # of a committed shard, as a second run makes them
ROUNDS = 3
STARTED = 300.0  # seconds until processes that do not start are an error


@dataclass(frozen=True, kw_only=True)
class Row:
    """One set of shards; seconds of processor time unless `wall` is said."""

    name: str
    samples: int
    tokens: int
    codec: float
    other: float
    not_overlapped: float
    ours: float
    ours_wall: float
    loop: float
    loop_wall: float
    wall_one: float
    wall_two: float
    cpu_one: float
    cpu_two: float
    check_milliseconds: float

    def goals(self) -> dict[str, tuple[str, float]]:
        """What was measured: what was asked, and what was reached."""
        return {
            "overhead outside codecs, share of codec time": ("<= 0.10", self.other / self.codec),
            "of it not overlapped": ("<= 0.10", self.not_overlapped / self.codec),
            "speed beside a plain webdataset loop": (">= 1", self.loop / self.ours),
            "the same, wall time": (">= 1", self.loop_wall / self.ours_wall),
            "1 -> 2 processes, processor time": (">= 1.8", 2 * self.cpu_one / self.cpu_two),
            "1 -> 2 processes, wall time": (">= 1.8", self.wall_one / self.wall_two),
        }


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shards, a tokenizer with its bundle, and how samples become documents."""

    name: str
    shards: list[Path]
    bundle: Path
    templates: list[Template]


class CodecClock:
    """Adds up the time that codecs take in the thread that calls them."""

    def __init__(self, tokenizer: UnifiedTokenizer) -> None:
        self.seconds = 0.0
        for codec in dict.fromkeys(tokenizer.codecs.values()):
            setattr(codec, "encode", self._timed(codec.encode))  # noqa: B010  (a bound method)

    def _timed(self, encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def timed(x: Tensor) -> Tensor:
            begun = time.thread_time()
            codes = encode(x)
            self.seconds += time.thread_time() - begun
            return codes

        return timed


def photo_case(data: Path, out: Path, samples: int) -> Case:
    """256 x 256 JPEG, a codec of a million weights: small, so that overhead shows."""
    shards = split(data / "photos/photos-000000.tar", out / "photos", min(samples, 100))
    lines = [str(decode("txt", s["txt"], "")) for path in shards for s in ShardReader(path)]
    codec = unimm.build_codec("vision-1m-f8", seed=0)
    bundle = out / "photos-bundle"
    UnifiedTokenizer(TextModel.train(lines, 512), [codec]).save_pretrained(bundle)
    return Case(
        name="photos", shards=shards, bundle=bundle, templates=[Template(["{txt}", "{jpg}"])]
    )


def digits_case(data: Path, out: Path, samples: int) -> Case:
    """The shipped bundle: words, pictures of 28 x 28 and speech; each item in one document."""
    digits.write_raw_shards(data / "digits", out / "raw", "val", samples, 0)
    shards = split(next(iter(sorted((out / "raw").glob("*.tar")))), out / "digits", samples)
    bundle = unimm.__path__[0] / Path("pretrained/digits")
    templates = [Template(["{txt}", "{png}", "{wav}"])]
    return Case(name="digits", shards=shards, bundle=bundle, templates=templates)


def split(source: Path, out: Path, samples: int) -> list[Path]:
    """Four shards of the first samples of one, with manifests."""
    chosen = ShardReader(source).samples[:samples]
    paths = []
    for number in range(4):
        paths.append(out / f"shard-{number}.tar")
        with ShardWriter(paths[-1]) as writer:
            for sample in chosen[number::4]:
                writer.write(sample.key, {name: sample[name] for name in sample.members})
        Manifest(
            shard=paths[-1].name,
            samples=writer.samples,
            bytes=writer.bytes,
            sha256=writer.sha256,
            checks=tuple(writer.checks),
        ).write(out)
    return paths


class Clock:
    """Processor time of the process and of this thread, and wall time, of a block."""

    def __enter__(self) -> "Clock":
        self._begun = time.process_time(), time.thread_time(), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        ended = time.process_time(), time.thread_time(), time.perf_counter()
        passed = (end - begun for end, begun in zip(ended, self._begun, strict=True))
        self.process, self.thread, self.wall = passed


def measure(case: Case, out: Path) -> Row:
    tokenizer = UnifiedTokenizer.from_pretrained(case.bundle)
    codecs = CodecClock(tokenizer)
    inline, beside = (
        ShardTokenizer(tokenizer, case.templates, TokenizeConfig(decoders=n)) for n in (0, 1)
    )
    loop_codecs = UnifiedTokenizer.from_pretrained(case.bundle).codecs
    inline.run(case.shards[0], out / "warm")
    plain_loop(case.shards[0], out / "warm-loop", loop_codecs)
    ours, overlapped, loops = [], [], []
    manifests: list[Manifest] = []
    for _ in range(ROUNDS):
        for worker, found in ((inline, ours), (beside, overlapped)):
            codecs.seconds = 0.0
            with Clock() as clock:
                manifests = [worker.run(path, out / "ours") for path in case.shards]
            found.append((clock, codecs.seconds))
        with Clock() as clock:
            for path in case.shards:
                plain_loop(path, out / "loop", loop_codecs)
        loops.append(clock)
    fastest, codec = min(ours, key=lambda r: r[0].process)
    with Clock() as checks:
        for number in range(CHECKS):
            assert inline.committed(case.shards[number % 4], out / "ours") is not None
    alone, together = (in_step(case, out / f"{n}", n) for n in (1, 2))
    return Row(
        name=case.name,
        samples=sum(m.samples for m in manifests),
        tokens=sum(sum(m.tokens.values()) for m in manifests),
        codec=codec,
        other=fastest.process - codec,
        not_overlapped=min(clock.thread - seconds for clock, seconds in overlapped),
        ours=fastest.process,
        ours_wall=min(clock.wall for clock, _ in (*ours, *overlapped)),
        loop=min(clock.process for clock in loops),
        loop_wall=min(clock.wall for clock in loops),
        wall_one=alone[0],
        wall_two=together[0],
        cpu_one=alone[1],
        cpu_two=together[1],
        check_milliseconds=1000 * checks.process / CHECKS,
    )


def in_step(case: Case, out: Path, processes: int) -> tuple[float, float]:
    """Wall and processor time of processes that share the shards, the fastest of the rounds."""
    context = multiprocessing.get_context("spawn")
    begin, used = context.Barrier(processes + 1), context.Queue()
    workers = [
        context.Process(target=part, args=(case, out, Part(rank, processes), begin, used))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    walls, cpus = [], []
    for _ in range(ROUNDS):
        begin.wait(STARTED)
        begun = time.perf_counter()
        cpus.append(sum(used.get(timeout=STARTED) for _ in workers))
        walls.append(time.perf_counter() - begun)
    for worker in workers:
        worker.join()
    return min(walls), min(cpus)


def part(case: Case, out: Path, mine: Part, begin: Any, used: Any) -> None:
    """One of several processes: its own shards, after the others have loaded, too."""
    torch.set_num_threads(1)
    keep_freed_memory()
    tokenizer = UnifiedTokenizer.from_pretrained(case.bundle)
    worker = ShardTokenizer(tokenizer, case.templates, TokenizeConfig(decoders=0))
    worker.run(case.shards[mine.rank], out / f"warm-{mine.rank}")
    for _ in range(ROUNDS):
        begin.wait(STARTED)
        with Clock() as clock:
            for path in case.shards[mine.rank :: mine.world]:
                worker.run(path, out)
        used.put(clock.process)


@torch.no_grad()
def plain_loop(source: Path, out: Path, codecs: Any) -> None:
    """What one writes with webdataset alone."""
    out.mkdir(parents=True, exist_ok=True)
    dataset = WebDataset(str(source), shardshuffle=False)
    with TarWriter(str(out / source.name)) as writer:
        for batch in batches(iter(dataset)):
            columns: dict[str, list[Tensor]] = {}
            for kind, extensions in (("image", ("jpg", "png")), ("audio", ("wav",))):
                found = [e for e in extensions if e in batch[0]]
                if not found:
                    continue
                signals = [signal(s[found[0]], kind, codecs[kind]) for s in batch]
                if len({s.shape for s in signals}) == 1:
                    columns[kind] = list(codecs[kind].encode(torch.stack(signals)))
                else:
                    columns[kind] = [codecs[kind].encode(s[None])[0] for s in signals]
            for number, sample in enumerate(batch):
                files = {f"{kind}.npy": codes[number].numpy() for kind, codes in columns.items()}
                writer.write({"__key__": sample["__key__"], "txt": sample["txt"], **files})


def batches(samples: Iterator[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == LOOP_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def signal(data: bytes, kind: str, codec: Codec) -> Tensor:
    if kind == "image":
        return image_signal(Image.open(io.BytesIO(data)), codec)
    return audio_signal(decode("wav", data, ""), codec)


def table(rows: list[Row]) -> str:
    """Goals with what was reached, and the times behind them."""
    names = [row.name for row in rows]
    goals = [row.goals() for row in rows]
    lines = [f"| goal | asked | {' | '.join(names)} |", f"|---|---|{'---|' * len(rows)}"]
    for goal, (asked, _) in goals[0].items():
        reached = " | ".join(f"{found[goal][1]:.3f}" for found in goals)
        lines.append(f"| {goal} | {asked} | {reached} |")
    facts = [asdict(row) for row in rows]
    lines += ["", f"| seconds | {' | '.join(names)} |", f"|---|{'---|' * len(rows)}"]
    for name in list(facts[0])[1:]:
        lines.append(f"| {name} | {' | '.join(f'{fact[name]:.4g}' for fact in facts)} |")
    for name in ("codec", "other", "not_overlapped"):
        each = (f"{1000 * fact[name] / fact['samples']:.4g}" for fact in facts)
        lines.append(f"| {name}, milliseconds a sample | {' | '.join(each)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--only", choices=("photos", "digits"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    folder = Path(tempfile.mkdtemp(prefix="unimm-data-"))
    rows = []
    before = os.getloadavg()[0]
    try:
        for name, make in (("photos", photo_case), ("digits", digits_case)):
            if arguments.only in (None, name):
                case = make(arguments.data, folder / name, arguments.samples)
                rows.append(measure(case, folder / name / "made"))
    finally:
        shutil.rmtree(folder)
    device = f"cpu-{platform.machine()}"
    head = (
        f"{device}, {os.cpu_count()} cores, 1 torch thread, torch {torch.__version__}, numpy "
        f"{np.__version__}; load average {before:.1f} before, {os.getloadavg()[0]:.1f} after"
    )
    text = f"{head}\n\n{table(rows)}\n"
    print(text)
    stem = f"{datetime.now(UTC):%Y-%m-%d}-{device}-data"
    content = {"head": head, "rows": [asdict(row) for row in rows]}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    (arguments.out / f"{stem}.md").write_text(text)


if __name__ == "__main__":
    main()
