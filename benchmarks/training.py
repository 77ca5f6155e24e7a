"""Speed and memory of training, beside what a user would pick otherwise, in one run.

    python benchmarks/training.py [--only step] [--out benchmarks/results]

`step`: forward, backward and AdamW on random ids, against transformers' Llama of the same shape
(heads, grouped keys, feed-forward, tied head), eager and compiled; losses over all positions.
`loader`: ids per second that one process brings from token shards on disk to batches.
`startup`: seconds from the command line to the first step's loss. On a CPU a time is the processor
time of all threads over their number, which other programs on the machine do not lengthen; memory
is what the process held at most beyond what it held before the first step. Each case runs in a
process of its own; those that are compared take turns, and the best turn of each counts.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unimm.data.loader import Slice, TokenRows, TokenStream
from unimm.data.manifest import Manifest, Recipe
from unimm.data.shards import ShardWriter
from unimm.data.tokenize import npy_header
from unimm.model import ModelConfig, UnifiedLM, size_of
from unimm.training.losses import head_loss
from unimm.training.optim import OptimizerConfig, build_optimizers
from unimm.training.throughput import peak_of
from unimm.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder and the batch it is trained on."""

    name: str
    model: ModelConfig
    rows: int
    row_length: int


CPU_SHAPES = [
    Shape(
        name="10M, V 65,536",
        model=ModelConfig(
            vocab_size=65536, d_model=320, num_layers=8, num_heads=5, num_kv_heads=5, d_ff=896
        ),
        rows=2,
        row_length=512,
    ),
    Shape(
        name="1M, V 2,048",
        model=ModelConfig(vocab_size=2048, d_model=128, num_layers=5, num_heads=2, d_ff=384),
        rows=8,
        row_length=256,
    ),
]
GPU_SHAPES = [
    Shape(
        name=name,
        model=ModelConfig(
            vocab_size=65536, d_model=width, num_layers=layers, num_heads=heads, d_ff=wide
        ),
        rows=rows,
        row_length=2048,
    )
    for name, width, layers, heads, wide, rows in (
        ("125M", 768, 12, 12, 2048, 32),
        ("350M", 1024, 24, 16, 2752, 16),
    )
]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured; `note` says why a figure is missing."""

    case: str
    size: str
    by: str
    milliseconds: float | None = None
    rate: float | None = None
    unit: str = "ids/s"
    mfu: float | None = None
    peak_mib: float | None = None
    note: str = ""


# A training step


def ours(shape: Shape, device: str, *, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """A step as `LanguageTask` makes it."""
    return step_of(shape.model, device, compiled=compiled)


def plain(shape: Shape, device: str, *, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same in Llama's own form: no norm of queries and keys, one rotary axis."""
    model = replace(shape.model, qk_norm=None, rope_bases=(10_000.0,))
    return step_of(model, device, compiled=compiled)


def step_of(
    model: ModelConfig, device: str, *, compiled: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    lm = UnifiedLM(model).to(device)
    if compiled:
        for block in lm.blocks:
            block.compile()
    (optimizer,) = build_optimizers(lm, OptimizerConfig())

    def step(ids: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        weight = torch.ones(ids[:, 1:].numel(), device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            hidden = lm.hidden(ids[:, :-1]).flatten(0, 1)
            loss = head_loss(lm, hidden, ids[:, 1:].flatten(), weight, 0.0).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def llama(shape: Shape, device: str, *, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same shape by transformers, with SDPA and its own loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = shape.model
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.feed_forward,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        tie_word_embeddings=True,
        use_cache=False,
    )
    lm: Any = LlamaForCausalLM(config).to(device)  # pyright: ignore[reportArgumentType]
    run: Any = torch.compile(lm) if compiled else lm
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3, fused=True)

    def step(ids: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


STEPS = {"unimm": ours, "unimm in Llama's form": plain, "transformers Llama": llama}


def measure_step(shape: Shape, by: str, device: str, *, compiled: bool, seconds: float) -> Row:
    """Median step after two, and the most memory that was held."""
    torch.manual_seed(0)
    step = STEPS[by](shape, device, compiled=compiled)
    ids = torch.randint(shape.model.vocab_size, (shape.rows, shape.row_length), device=device)
    before = _held(device)
    first = step(ids)
    assert abs(float(first) - math.log(shape.model.vocab_size)) < 1, "another loss than ours"
    step(ids)
    times, begun = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < seconds:
        times.append(_milliseconds(lambda: step(ids), device))
    median = sorted(times)[len(times) // 2]
    rate = ids.numel() / median * 1e3
    peak = peak_of(torch.cuda.get_device_name()) if device == "cuda" else None
    flops = size_of(shape.model).flops_per_token(shape.row_length)
    return Row(
        case="step, compiled" if compiled else "step, eager",
        size=f"{shape.name}, {shape.rows} x {shape.row_length}",
        by=by,
        milliseconds=median,
        rate=rate,
        mfu=None if peak is None else rate * flops / peak,
        peak_mib=(_most(device) - before) / MIB,
    )


def _milliseconds(run: Callable[[], object], device: str) -> float:
    if device == "cpu":
        begun = time.process_time()
        run()
        return (time.process_time() - begun) * 1e3 / torch.get_num_threads()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _held(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _most(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# The loader


def write_tokens(folder: Path, documents: int, pieces: int, vocabulary: Vocabulary) -> None:
    """A token shard of text documents of `pieces` + 2 ids."""
    chance, text = np.random.default_rng(0), vocabulary["text"]
    meta = json.dumps({"template": "{txt}", "source": "0", "items": [["text", pieces]]}).encode()
    path = folder / "tokens.tar"
    with ShardWriter(path) as writer:
        for number in range(documents):
            ids = chance.integers(text.start, text.end, pieces + 2).astype("<u2")
            ids[0], ids[-1] = vocabulary.marker("<bos>"), vocabulary.marker("<eos>")
            data = npy_header("<u2", len(ids)) + ids.tobytes()
            writer.write(f"{number:08d}", {"ids.npy": data, "meta.json": meta})
    recipe = Recipe(
        source="0", vocabulary=vocabulary.fingerprint, coders={}, templates="0", version="0"
    )
    Manifest(
        shard=path.name,
        samples=documents,
        bytes=writer.bytes,
        sha256=writer.sha256,
        kind="tokens",
        tokens={"text": documents * (pieces + 2)},
        recipe=recipe,
    ).write(folder)


def measure_loader(length: int, row_length: int, ids: int) -> list[Row]:
    """Ids per second of one process: the first epoch, read from disk, and the ones after it."""
    vocabulary = Vocabulary(8000)
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), ids // length, length - 2, vocabulary)
        begun = time.process_time()
        rows = TokenRows(folder, vocabulary, row_length, folder=Path(folder, "index"))
        opened = time.process_time() - begun
        begun = time.process_time()
        TokenRows(folder, vocabulary, row_length, folder=Path(folder, "index"))
        again = time.process_time() - begun
        stream = iter(TokenStream(rows, Slice(8)))
        rates = []
        for _ in range(2):
            begun, count = time.process_time(), 0
            for batch in islice(stream, len(rows) // 8):
                count += batch.ids.numel()
            rates.append(count / (time.process_time() - begun))
    note = f"opened in {opened:.2f} s, again in {again:.2f} s, padding {rows.packing.padding:.2%}"
    size = f"{ids // length:,} documents of {length}, rows of {row_length}"
    return [
        Row(case="loader, from disk", size=size, by="unimm", rate=rates[0], note=note),
        Row(case="loader, kept", size=size, by="unimm", rate=rates[1]),
    ]


# Start-up


def measure_startup() -> Row:
    """`unimm fit` on the debug recipe of dialpad, to the end of its first step."""
    with tempfile.TemporaryDirectory() as folder:
        raw, tokens = f"{folder}/raw", f"{folder}/tokens"
        templates = ROOT / "recipes/dialpad/templates.yaml"
        _unimm("shards", "dialpad", "--count", "60", "--out", raw)
        _unimm(
            *("tokenize", raw, "--tokenizer", "dialpad", "--templates", str(templates)),
            *("--out", tokens),
        )
        begun = time.perf_counter()
        _unimm(
            *("fit", "-c", str(ROOT / "recipes/dialpad/debug.yaml")),
            *("--trainer.default_root_dir", f"{folder}/run", "--trainer.max_steps", "1"),
            *("--data.init_args.shards", tokens, "--data.init_args.val_shards", tokens),
            *("--trainer.callbacks", "[]"),
        )
        spent = time.perf_counter() - begun
    return Row(
        case="startup",
        size="debug recipe, to the end of a run of one step",
        by="unimm",
        milliseconds=spent * 1e3,
        note="wall time",
    )


def _unimm(*arguments: str) -> None:
    command = [sys.executable, "-m", "unimm.cli", *arguments]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)


# All of it


def cases(device: str, seconds: float) -> dict[str, Callable[[], list[Row]]]:
    """Name -> what measures it."""
    found: dict[str, Callable[[], list[Row]]] = {}
    for shape in GPU_SHAPES if device == "cuda" else CPU_SHAPES:
        for compiled in (False, True):
            for by in STEPS:

                def run(shape: Shape = shape, by: str = by, compiled: bool = compiled) -> list[Row]:
                    return [measure_step(shape, by, device, compiled=compiled, seconds=seconds)]

                found[f"step/{shape.name}/{'compiled' if compiled else 'eager'}/{by}"] = run
    found["loader/2048"] = lambda: measure_loader(2048, 2048, 40_000_000)
    found["loader/256"] = lambda: measure_loader(256, 2048, 20_000_000)
    found["startup"] = lambda: [measure_startup()]
    return found


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = ["| case | size | by | ms | ids/s | MFU | peak MiB | note |", "|---" * 8 + "|"]
    for row in rows:
        cells = [
            *(row.case, row.size, row.by, shown(row.milliseconds, ",.1f"), shown(row.rate, ",.0f")),
            *(shown(row.mfu, ".1%"), shown(row.peak_mib, ",.0f"), row.note),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compared(names: Iterable[str]) -> list[list[str]]:
    """Cases that differ in who computes, side by side; every other one alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        group = name.rpartition("/")[0] if name.startswith("step/") else name
        groups.setdefault(group, []).append(name)
    return list(groups.values())


def in_own_process(name: str, seconds: float) -> list[Row]:
    """The rows of a case, or one that says how it failed."""
    command = [sys.executable, __file__, "--case", name, "--seconds", str(seconds)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return [Row(case=name, size="", by="", note=f"failed: {reason}")]
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def best(turns: Sequence[Row]) -> Row:
    """The fastest turn; where some failed, it says how many."""
    row = min(turns, key=lambda row: math.inf if row.milliseconds is None else row.milliseconds)
    failed = sum(turn.note.startswith("failed") for turn in turns)
    if 0 < failed < len(turns):
        return replace(row, note=f"{failed} of {len(turns)} turns failed")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--seconds", type=float, default=5.0, help="per case and turn")
    parser.add_argument("--turns", type=int, default=3, help="of cases that are compared")
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help="one case, in this process; its rows as JSON")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = cases(device, options.seconds)
    if options.case:
        print(json.dumps([asdict(row) for row in known[options.case]()]))
        return
    rows: list[Row] = []
    for group in compared(name for name in known if name.startswith(options.only)):
        turns = [
            [in_own_process(name, options.seconds) for name in group]
            for _ in range(max(1, options.turns) if len(group) > 1 else 1)
        ]
        for runs in zip(*turns, strict=True):
            found = [best(same) for same in zip(*runs, strict=True)]
            rows += found
            print("\n".join(table(found).splitlines()[2:]), flush=True)
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    today = datetime.now(UTC).date().isoformat()
    head = (
        f"# Training, {today}\n\n{machine}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}. {options.note}\n\n"
    )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = options.out / f"{today}-{device}-{machine.replace(' ', '-')}-training"
        stem.with_suffix(".md").write_text(head + table(rows))
        stem.with_suffix(".json").write_text(
            json.dumps({"date": today, "machine": machine, "note": options.note,
                        "torch": torch.__version__, "threads": torch.get_num_threads(),
                        "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )  # fmt: skip
    print(head + table(rows))


if __name__ == "__main__":
    main()
