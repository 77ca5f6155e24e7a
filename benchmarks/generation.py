"""Tokens per second of generation beside `transformers` on a Llama of the same shape, in one run.

    python benchmarks/generation.py [--only picture] [--model 58M] [--out benchmarks/results]

Both write as many ids as one picture of 16 x 16 codes takes, with the same sampling (temperature 1,
no filter), from the same prompt length, with random weights of the same shape and type, V = 65,536
and tied embeddings, in eager mode. unimm writes under its grammar, whose choice of block lets the
head score 1,024 ids (other kinds: 16,384, or the text's) instead of all; the rival draws from the
whole vocabulary, which is what it does for such a model. What is compared takes turns, and the best
run of each counts. Times are wall times; beside them stand, on a CPU, the processor times of all
threads, which other programs on the machine lengthen less. `grammar alone` is the time of states,
ranges and positions by themselves. `stream` is the time from the call to the first chunk of decoded
sound. The goals stand at the end: asked and reached.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unimm import UnifiedTokenizer, build_codec
from unimm.generation.engine import Job, run
from unimm.generation.grammar import Machine
from unimm.generation.requests import Wish, request_of
from unimm.generation.sampling import Sampling, Settings
from unimm.generation.streaming import pieces
from unimm.model import ModelConfig, UnifiedLM
from unimm.sequence import Grammar
from unimm.text import TextModel
from unimm.vocabulary import Vocabulary

V = 65_536
# Two picture codecs, a small and a large one, the latter under the name of film; sound of 8 levels.
SMALL, LARGE, AUDIO = [1_024], [16_384], [1_024] * 8
SIDE = 16  # codes of a picture's side
PROMPT = 16  # ids


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured; `note` says why a figure is missing, or what it means."""

    what: str
    model: str
    batch: int
    by: str
    milliseconds: float | None = None
    processor_milliseconds: float | None = None
    tokens_per_second: float | None = None
    ratio: float | None = None
    note: str = ""


class Taken(NamedTuple):
    """Seconds of a call: by the wall clock, and of all threads of this process."""

    wall: float
    processor: float


class Clock:
    """Best of several runs after a warm-up; calls to be compared take turns."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def taken(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Taken]:
        for call in calls.values():
            call()
        rounds = [
            {name: self._once(call) for name, call in calls.items()} for _ in range(self.repeats)
        ]
        return {
            name: Taken(
                min(own[name].wall for own in rounds), min(own[name].processor for own in rounds)
            )
            for name in calls
        }

    def _once(self, call: Callable[[], object]) -> Taken:
        self._wait()
        wall, processor = time.perf_counter(), time.process_time()
        call()
        self._wait()
        return Taken(time.perf_counter() - wall, time.process_time() - processor)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def vocabulary() -> Vocabulary:
    """32 markers, 256 digits, text, and codecs: V ids."""
    text = V - 32 - 256 - sum(SMALL) - sum(LARGE) - sum(AUDIO)
    made = Vocabulary(text, {"image": SMALL, "video": LARGE, "audio": AUDIO})
    assert made.padded_size == V
    return made


SHAPES = {
    "22M": ModelConfig(vocab_size=V, d_model=256, num_layers=6, num_heads=4, d_ff=704),
    "58M": ModelConfig(vocab_size=V, d_model=512, num_layers=8, num_heads=8, d_ff=1408),
    "1.3B": ModelConfig(
        vocab_size=V, d_model=2048, num_layers=22, num_heads=16, num_kv_heads=16, d_ff=5632
    ),
}


def job_of(
    grammar: Grammar, wish: Wish, rows: int, device: torch.device, guidance: float = 1.0
) -> Job:
    text = grammar.vocabulary["text"].start
    prompt = torch.tensor([grammar.bos, *range(text, text + PROMPT - 1)])
    settings = Settings([Sampling(guidance=guidance)] * (1 + len(grammar.rules)), device)
    return Job(
        prompts=[prompt] * rows,
        request=request_of(grammar, [wish] * rows, device),
        settings=settings,
        seeds=list(range(rows)),
        unconditional=[prompt[:1]] * rows if guidance != 1 else None,
    )


WISHES = {
    # Two markers, four digits, the codes.
    "picture": Wish("image", (1, SIDE, SIDE), SIDE * SIDE + 7),
    "picture of 16,384 codes": Wish("video", (1, SIDE, SIDE), SIDE * SIDE + 9),
    "sound": Wish("audio", (32, 0, 0), 32 * len(AUDIO) + 3),
    "text": Wish("text", (0, 0, 0), SIDE * SIDE),
}


def rows_of(device: torch.device, clock: Clock, only: str, name: str) -> Iterator[Row]:
    grammar, config = Grammar(vocabulary()), SHAPES[name]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.device(device):
        lm = UnifiedLM(config).eval().to(dtype)
    for batch in (1, 16):
        for what, wish in WISHES.items():
            if what.startswith(only):
                yield from compared(lm, grammar, name, batch, what, wish, clock)
    if "sound".startswith(only):
        yield first_sound(name, config, clock)


def compared(
    lm: UnifiedLM,
    grammar: Grammar,
    name: str,
    batch: int,
    what: str,
    wish: Wish,
    clock: Clock,
) -> Iterator[Row]:
    job = job_of(grammar, wish, batch, lm.device)
    count = sum(1 for _ in run(lm, grammar, job))
    calls: dict[str, Callable[[], object]] = {
        "unimm": lambda: list(run(lm, grammar, job)),
        "grammar alone": lambda: grammar_alone(grammar, job, lm.device),
    }
    if what == "picture":
        doubled = job_of(grammar, wish, batch, lm.device, guidance=3.0)
        calls["unimm, guided"] = lambda: list(run(lm, grammar, doubled))
        compiled = UnifiedLM(lm.config).eval().to(lm.device, lm.embedding.weight.dtype)
        compiled.compile_step()
        calls["unimm, compiled"] = lambda: list(run(compiled, grammar, job))
        llama = rival(lm, batch, count)
        if llama is not None:
            calls["transformers"] = llama
    taken = clock.taken(calls)
    for by, own in taken.items():
        yield Row(
            what=what,
            model=name,
            batch=batch,
            by=by,
            milliseconds=own.wall / count * 1e3,
            processor_milliseconds=own.processor / count * 1e3,
            tokens_per_second=batch * count / own.wall,
            ratio=own.wall / taken["unimm"].wall,
        )
    if what == "picture" and "transformers" not in taken:
        yield Row(what=what, model=name, batch=batch, by="transformers", note="not installed")


def grammar_alone(grammar: Grammar, job: Job, device: torch.device) -> None:
    """The states, ranges and positions of a run, with the first allowed id for a drawn one."""
    machine, request = Machine(grammar, device), job.request
    state = machine.behind(torch.full((len(job.prompts),), PROMPT, device=device))
    at, longest = 0, int(request.budget.max())
    while at < longest:
        remaining = request.budget - at
        allowed = machine.allowed(state, request, remaining, first=at == 0)
        certain = int(machine.certain(state, request, remaining).min())
        if certain > longest:
            return
        if bool((allowed.low == machine.text.start).all()) and at + 1 < longest:
            while at + 1 < longest:  # words: the engine looks at markers and clock alone
                machine.openings(request, request.budget - at)
                state, at = state._replace(clock=state.clock + 1), at + 1
            continue
        if certain > 1:
            machine.codes(state, certain)
            state, at = machine.advance_codes(state, certain), at + certain
            continue
        chosen = torch.where(
            allowed.high > allowed.low, allowed.low, allowed.markers.long().argmax(1)
        )
        machine.positions(state, chosen)
        moved = machine.advance(state, chosen)
        state, at = machine.settle(moved, request, chosen), at + 1


def rival(lm: UnifiedLM, batch: int, count: int) -> Callable[[], object] | None:
    """`generate` of a Llama of the model's shape; None where transformers is not installed."""
    if find_spec("transformers") is None:
        return None
    from transformers import LlamaConfig, LlamaForCausalLM

    config = lm.config
    shape = LlamaConfig(
        vocab_size=V,
        hidden_size=config.d_model,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        intermediate_size=config.feed_forward,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    with torch.device(lm.device):
        llama: Any = LlamaForCausalLM(shape).eval()
    llama.to(lm.embedding.weight.dtype)
    ids = torch.randint(1, V, (batch, PROMPT), device=lm.device)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_new_tokens": count,
        "max_new_tokens": count,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return lambda: llama.generate(ids, **options)


def first_sound(name: str, config: ModelConfig, clock: Clock) -> Row:
    """From the call to the first decoded chunk of a streaming codec, prompt included."""
    codec = build_codec("encodec-24khz", seed=0)
    text = TextModel.train(["zero one two three four five six seven eight nine"], 300)
    tok = UnifiedTokenizer(text, [codec])
    size = tok.vocabulary.padded_size
    lm = UnifiedLM(ModelConfig(**{**asdict(config), "vocab_size": size, "experts": None})).eval()
    job = job_of(tok.grammar, Wish("audio", (0, 0, 0), 1024), 1, lm.device)

    def first() -> None:
        next(pieces(tok, run(lm, tok.grammar, job)))

    taken = clock.taken({"stream": first})["stream"]
    levels, rate = codec.num_codebooks, codec.frame_rate
    note = f"first sound of encodec-24khz: {levels} codes, {1000 / (rate or 1):.0f} ms of sound"
    return Row(
        what="sound",
        model=name,
        batch=1,
        by="stream",
        milliseconds=taken.wall * 1e3,
        processor_milliseconds=taken.processor * 1e3,
        note=note,
    )


class Goal(NamedTuple):
    """What is asked of the ratio of a row's time and unimm's, and where: `device` "" is any."""

    by: str
    asked: str
    met: Callable[[float], bool]
    device: str = ""


GOALS = (
    Goal("transformers", "at least 3 times unimm's time", lambda ratio: ratio >= 3, "cpu"),
    Goal("grammar alone", "under 0.03 of unimm's time", lambda ratio: ratio < 0.03),
    Goal("unimm, guided", "under 1.3 times unimm's time", lambda ratio: ratio < 1.3, "cuda"),
)


def verdicts(rows: Sequence[Row], device: torch.device) -> list[str]:
    """A line for each goal and each row that it is asked of."""
    return [
        f"- {goal.by}, {row.what}, batch {row.batch}, {row.model}: asked {goal.asked}, "
        f"reached {row.ratio:.3g}: {'met' if goal.met(row.ratio) else 'MISSED'}"
        for goal in GOALS
        for row in rows
        if row.by == goal.by and row.ratio is not None and goal.device in ("", device.type)
    ]


def table(rows: list[Row]) -> str:
    lines = [
        "| writing | model | batch | by | ms a step | of processor | ids/s | ratio | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = [
            "" if value is None else f"{value:.{digits}f}"
            for value, digits in (
                (row.milliseconds, 3),
                (row.processor_milliseconds, 3),
                (row.tokens_per_second, 0),
                (row.ratio, 3),
            )
        ]
        cells = [row.what, row.model, str(row.batch), row.by, *figures, row.note]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="what is written, names that begin so")
    parser.add_argument("--model", choices=SHAPES, help="default: 22M on a CPU, 1.3B on a GPU")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = arguments.model or ("22M" if device.type == "cpu" else "1.3B")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu-{platform.machine()}"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    busy = f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    head = f"{name}{threads}, torch {torch.__version__}{busy}"
    print(head, flush=True)
    rows: list[Row] = []
    clock = Clock(device, arguments.repeats)
    for row in rows_of(device, clock, arguments.only, model):
        rows.append(row)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    stem = f"{datetime.now(UTC):%Y-%m-%d}-{name.replace(' ', '-').lower()}-generation"
    told = verdicts(rows, device)
    print("\n".join(told))
    content = {"head": head, "rows": [asdict(row) for row in rows], "goals": told}
    write(arguments.out / f"{stem}.json", json.dumps(content, indent=1) + "\n")
    write(arguments.out / f"{stem}.md", f"{head}\n\n{table(rows)}\n\n" + "\n".join(told) + "\n")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


if __name__ == "__main__":
    main()
