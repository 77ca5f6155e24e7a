"""Every step of a recipe in order: shards, codecs, tokens, language model, bundle, judgement, page.

Each step is what a `unimm` command does, and is done only once: run again, the pipeline goes on
where it was stopped. `unimm demo` is this pipeline on the dial-pad recipe.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from rich.console import Console

from unimm.checkpoint import find_bundle, seal, write_text
from unimm.data.templates import load_templates
from unimm.data.tokenize import TokenizeConfig
from unimm.data.tokenize_many import tokenize_shards
from unimm.data.worlds import assemble_tokenizer, make_shards
from unimm.evaluation.accuracy import Direction, DirectionResult, accuracies, measure
from unimm.evaluation.page import write_page
from unimm.evaluation.recipe import Recipe, load_recipe
from unimm.evaluation.report import write_results
from unimm.evaluation.worlds import judges, prompts_for, validation_scenes
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
    out.mkdir(parents=True, exist_ok=True)
    console, clock = Console(), Stopwatch(out / SECONDS_FILE)
    train, val = out / "raw/train", out / "raw/val"
    with clock.step("raw shards", console):
        _make(recipe, data, train, "train")
        _make(recipe, data, val, "val")
    with clock.step("codecs", console):
        _train_codecs(recipe, out, console)
    with clock.step("tokens", console):
        folders = [out / "codecs" / name for name in recipe.codecs]
        tokenizer = out / "tokenizer"
        if not (tokenizer / "index.json").exists():
            assemble_tokenizer(folders, train, tokenizer, audio_layout=recipe.audio_layout)
        for split in (train, val):
            _tokenize(recipe, tokenizer, split, out / "tokens" / split.name)
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
    return _judge(bundle, recipe, out, data, recipe.samples, clock, console)


def evaluate(
    model: str, name_or_path: str, out: Path, data: Path | None, samples: int | None
) -> int:
    """Judge a bundle in every direction of a recipe; returns the exit code."""
    recipe = load_recipe(name_or_path)
    out.mkdir(parents=True, exist_ok=True)
    wanted = recipe.samples if samples is None else samples
    return _judge(find_bundle(model), recipe, out, data, wanted, Stopwatch(), Console())


def _make(recipe: Recipe, data: Path | None, out: Path, split: str) -> None:
    """Write one split of raw shards, once."""
    done, training = out / ".complete", split == "train"
    if done.exists():
        return
    if recipe.world == "digits" and data is None:
        raise ValueError(f"recipe {recipe.folder.name}: name the folder of its data with --data")
    make_shards(
        data if recipe.world == "digits" and data is not None else recipe.world,
        out,
        world=recipe.world,
        split="train" if training else "val",
        count=recipe.train if training else recipe.val,
        seed=0 if training else VAL_SEED,
    )
    write_text(done, "")


def _train_codecs(recipe: Recipe, out: Path, console: Console) -> None:
    """All codecs at once, one process each: small networks do not fill two cores one by one."""
    waiting = {name: file for name, file in recipe.codecs.items() if not _exported(out, name)}
    if not waiting:
        return
    threads = max(1, (os.cpu_count() or 1) // len(waiting))
    running: dict[str, subprocess.Popen[bytes]] = {}
    logs = {name: out / f"{name}.log" for name in waiting}
    for name, file in waiting.items():
        command = [
            *(sys.executable, "-m", "unimm.cli", "fit", "-c", str(recipe.file(file))),
            *("--trainer.default_root_dir", str(out / name)),
            *("--trainer.enable_progress_bar", "false"),
            *("--data.init_args.shards", str(out / "raw/train")),
            *("--data.init_args.val_shards", str(out / "raw/val")),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with logs[name].open("wb") as log:
            running[name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
    try:
        with console.status(f"training {', '.join(waiting)}"):
            for name, process in running.items():
                if process.wait() != 0:
                    tail = logs[name].read_text(errors="replace").strip().splitlines()[-1:]
                    raise ValueError(f"{name} codec: training failed, see {logs[name]}: {tail}")
                export(out / name, out / "codecs" / name)
                console.print(f"{name} codec trained")
    finally:
        for process in running.values():
            process.terminate()


def _exported(out: Path, name: str) -> bool:
    return (out / "codecs" / name / "config.json").exists()


def _tokenize(recipe: Recipe, tokenizer: Path, raw: Path, out: Path) -> None:
    summary = tokenize_shards(
        raw,
        out,
        tokenizer,
        load_templates(recipe.file(recipe.templates)),
        TokenizeConfig(documents_per_sample=recipe.documents_per_sample),
    )
    if summary.failed:
        raise ValueError(f"{out}: {len(summary.failed)} shards failed; see {out / 'failed'}")


def _set_defaults(bundle: Path, recipe: Recipe) -> None:
    """Put the recipe's sampling defaults into the bundle."""
    tok = UnifiedTokenizer.from_pretrained(bundle)
    tok.defaults = {modality: dict(values) for modality, values in recipe.generation.items()}
    tok.save_pretrained(bundle, torch.float16)
    seal(bundle)


def _judge(
    bundle: Path,
    recipe: Recipe,
    out: Path,
    data: Path | None,
    samples: int,
    clock: Stopwatch,
    console: Console,
) -> int:
    lm, tok = UnifiedLM.from_pretrained(bundle), UnifiedTokenizer.from_pretrained(bundle)
    shipped = bundle / JUDGES_FOLDER
    with clock.step("judges", console):
        judged = judges(recipe.world, data, shipped if shipped.is_dir() else out / JUDGES_FOLDER)
    scenes = validation_scenes(recipe.world, data, samples)

    def answer(prompts: list[Document], way: Direction, seeds: list[int]) -> list[Document]:
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
        page = write_page(out, tok, results, judged, scenes, clock.seconds)
    write_results(
        out / "results.json",
        accuracy=accuracies(results),
        seconds=clock.seconds,
        directions=[result.to_dict() for result in results],
        judges=judged.accuracy,
        recipe=yaml.safe_load((recipe.folder / "recipe.yaml").read_text()),
    )
    console.print(f"report: {page}")
    return 0
