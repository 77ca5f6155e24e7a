"""Every step of a recipe in order: shards, codecs, tokens, language model, bundle, judgement, page.

Each step is what a `unimm` command does, and is done only once: run again, the pipeline goes on
where it was stopped. `unimm demo` is this pipeline on the dial-pad recipe.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from rich.console import Console

from unimm.checkpoint import GENERATION_FILE, find_bundle, reopen, seal, write_json, write_text
from unimm.data.templates import Template, load_templates
from unimm.data.tokenize import TokenizeConfig
from unimm.data.tokenize_many import RunConfig, tokenize_shards
from unimm.data.worlds import Made, Split, assemble_tokenizer, make_shards
from unimm.evaluation.accuracy import Direction, DirectionResult, accuracies, measure
from unimm.evaluation.card import bundle_card
from unimm.evaluation.page import write_answers, write_page
from unimm.evaluation.recipe import RECIPE_FILE, Recipe, load_recipe
from unimm.evaluation.report import write_results
from unimm.evaluation.worlds import Judged, check_data, judges, prompts_for, validation_scenes
from unimm.generation import generate_batch
from unimm.model import UnifiedLM
from unimm.signals import Document
from unimm.tokenizer import UnifiedTokenizer
from unimm.training.export import export
from unimm.training.launch import launch

VAL_SEED = 1
SECONDS_FILE = "seconds.json"
JUDGES_FOLDER = "judges"  # in a run, and in a bundle that ships with them
FAST_SAMPLES = 60
POLL_SECONDS = 0.2


class Judgement(NamedTuple):
    """What a bundle reached, and who judged."""

    results: list[DirectionResult]
    judged: Judged


class Stopwatch:
    """Wall time of each step, kept in a file so that a resumed run reports what the first one took.

    Args:
        path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self.seconds: dict[str, float] = {}
        if path is not None and path.exists():
            self.seconds = json.loads(path.read_text())

    @contextmanager
    def step(self, name: str, console: Console) -> Iterator[None]:
        """Time one step; time that a stopped run spent in it is added up."""
        console.rule(name, align="left")
        begun = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begun
            self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 2)
            if self._path is not None:
                write_text(self._path, json.dumps(self.seconds))
        console.print(f"{name}: {spent:.1f} s")


def demo(out: Path, *, fast: bool = False) -> int:
    """`unimm demo`: train and judge on the dial-pad world, or judge the shipped bundle."""
    if fast:
        return evaluate("dialpad", "dialpad", out, None, FAST_SAMPLES)
    return run("dialpad", out, None)


def run(name_or_path: str, out: Path, data: Path | None) -> int:
    """Every step of a recipe; returns the exit code."""
    recipe = load_recipe(name_or_path)
    check_data(recipe.world, data)
    out.mkdir(parents=True, exist_ok=True)
    console, clock = Console(), Stopwatch(out / SECONDS_FILE)
    train, val = out / "raw/train", out / "raw/val"
    with clock.step("raw shards", console):
        source = data or recipe.world
        _make(train, source, recipe.world, recipe.train)
        _make(val, source, recipe.world, recipe.val, "val", VAL_SEED)
        if recipe.conversations:
            _make(out / "raw/talk", "dialpad-talk", "dialpad-talk", recipe.conversations)
    with clock.step("codecs", console):
        _train_codecs(recipe, out, console)
    with clock.step("tokens", console):
        folders = [out / "codecs" / name for name in recipe.codecs]
        tokenizer = out / "tokenizer"
        if not (tokenizer / "index.json").exists():
            assemble_tokenizer(folders, train, tokenizer, audio_layout=recipe.audio_layout)
        templates = load_templates(recipe.file(recipe.templates))
        for split in (train, val):
            into = out / "tokens" / split.name
            _tokenize(split, into, tokenizer, templates, recipe.documents_per_sample)
        if recipe.conversations:
            talk = [Template(["{document}"])]
            _tokenize(out / "raw/talk", out / "tokens/train", tokenizer, talk, documents=1)
    with clock.step("language model", console):
        launch(
            [
                *("-c", str(recipe.file(recipe.model))),
                *("--trainer.default_root_dir", str(out / "lm")),
                *("--model.init_args.tokenizer", str(tokenizer)),
                *("--data.init_args.tokenizer", str(tokenizer)),
                *("--data.init_args.shards", str(out / "tokens/train")),
                *("--data.init_args.val_shards", str(out / "tokens/val")),
            ]
        )
        bundle = out / "bundle"
        export(out / "lm", bundle, tokenizer, torch.float16)
        _set_defaults(bundle, recipe)
    judgement = _judge(bundle, recipe, out, data, recipe.samples, clock, console)
    _finish(bundle, recipe, out, judgement, clock)
    return 0


def evaluate(
    model: str, name_or_path: str, out: Path, data: Path | None, samples: int | None
) -> int:
    """Judge a bundle in every direction of a recipe; returns the exit code."""
    recipe, bundle = load_recipe(name_or_path), find_bundle(model)
    check_data(recipe.world, data)
    wanted = recipe.samples if samples is None else samples
    if wanted < 1:
        raise ValueError(f"samples must be 1 or more, got {wanted}")
    out.mkdir(parents=True, exist_ok=True)
    _judge(bundle, recipe, out, data, wanted, Stopwatch(), Console())
    return 0


def _make(
    out: Path, source: str | Path, world: Made, count: int, split: Split = "train", seed: int = 0
) -> None:
    """Write raw shards, once."""
    done = out / ".complete"
    if not done.exists():
        make_shards(source, out, world=world, split=split, count=count, seed=seed)
        write_text(done, "")


def _train_codecs(recipe: Recipe, out: Path, console: Console) -> None:
    """All codecs at once, one process each: small networks do not fill two cores one by one."""
    waiting = {name: file for name, file in recipe.codecs.items() if not _exported(out, name)}
    if not waiting:
        return
    threads = max(1, (os.cpu_count() or 1) // len(waiting))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, file in waiting.items():
            command = [
                *(sys.executable, "-m", "unimm.cli", "fit", "-c", str(recipe.file(file))),
                *("--trainer.default_root_dir", str(out / name)),
                *("--trainer.enable_progress_bar", "false"),
                *("--data.init_args.shards", str(out / "raw/train")),
                *("--data.init_args.val_shards", str(out / "raw/val")),
            ]
            with _log(out, name).open("wb") as log:
                running[name] = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
        with console.status(f"training {', '.join(waiting)}"):
            for name in _as_they_end(running):
                if running[name].returncode != 0:
                    raise ValueError(_failure(out, name, running[name].returncode))
                export(out / name, out / "codecs" / name)
                console.print(f"{name} codec trained")
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def _as_they_end(running: Mapping[str, subprocess.Popen[bytes]]) -> Iterator[str]:
    """Names of processes, the first that ends first: a failure is told at once."""
    waiting = dict(running)
    while waiting:
        ended = [name for name, process in waiting.items() if process.poll() is not None]
        for name in ended:
            del waiting[name]
        yield from ended
        if not ended:
            time.sleep(POLL_SECONDS)


def _failure(out: Path, name: str, code: int) -> str:
    log = _log(out, name)
    said = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it wrote nothing"]
    return f"{name} codec: training failed (exit code {code}), see {log}: {said[0].strip()}"


def _log(out: Path, name: str) -> Path:
    return out / f"{name}.log"


def _exported(out: Path, name: str) -> bool:
    return (out / "codecs" / name / "config.json").exists()


def _tokenize(
    raw: Path, out: Path, tokenizer: Path, templates: Sequence[Template], documents: int
) -> None:
    config = TokenizeConfig(documents_per_sample=documents)
    processes = RunConfig(workers=os.cpu_count() or 1)
    summary = tokenize_shards(raw, out, tokenizer, templates, config, processes)
    if summary.failed:
        raise ValueError(f"{out}: {len(summary.failed)} shards failed; see {out / 'failed'}")


def _set_defaults(bundle: Path, recipe: Recipe) -> None:
    """Put the recipe's sampling defaults into the bundle."""
    reopen(bundle)
    write_json(bundle / GENERATION_FILE, recipe.generation)
    seal(bundle)


def _judge(
    bundle: Path,
    recipe: Recipe,
    out: Path,
    data: Path | None,
    samples: int,
    clock: Stopwatch,
    console: Console,
) -> Judgement:
    lm, tok = UnifiedLM.from_pretrained(bundle), UnifiedTokenizer.from_pretrained(bundle)
    shipped = bundle / JUDGES_FOLDER
    with clock.step("judges", console):
        judged = judges(recipe.world, data, shipped if shipped.is_dir() else out / JUDGES_FOLDER)
    scenes = validation_scenes(recipe.world, data, samples)

    def answer(prompts: list[Document], way: Direction, seeds: list[int]) -> list[Document]:
        if way.via is not None:
            prompts = generate_batch(lm, tok, prompts, way.via, seeds=seeds)
        return generate_batch(
            lm, tok, prompts, way.target, guidance=way.guidance, seeds=seeds, **way.options
        )

    results: list[DirectionResult] = []
    with clock.step("any to any", console):
        for direction in recipe.directions:
            prompts = prompts_for(direction, scenes)
            judge = judged.judges[direction.target]
            result = measure(
                direction, prompts.documents, prompts.answers, answer, judge, batch_size=100
            )
            results.append(result)
            console.print(f"{direction.name:>14}: {result.share}")
    with clock.step("report", console):
        write_answers(out, results)
        page = write_page(out, tok, results, judged, scenes, clock.seconds)
    write_results(
        out / "results.json",
        accuracy=accuracies(results),
        seconds=clock.seconds,
        directions=[result.to_dict() for result in results],
        judges=judged.accuracy,
        recipe=yaml.safe_load((recipe.folder / RECIPE_FILE).read_text()),
    )
    console.print(f"report: {page}")
    return Judgement(results, judged)


def _finish(
    bundle: Path, recipe: Recipe, out: Path, judgement: Judgement, clock: Stopwatch
) -> None:
    """Give a bundle that this run made its card and, where the recipe says so, its judges."""
    reopen(bundle)
    shipped = bundle / JUDGES_FOLDER
    if recipe.ship_judges and not shipped.is_dir():
        shutil.copytree(out / JUDGES_FOLDER, shipped)
    bundle_card(bundle, recipe, *judgement, clock.seconds).write(bundle)  # hashes every file
    seal(bundle)
