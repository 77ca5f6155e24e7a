"""What each sub-command does: arguments in, an `Outcome` out. Rooms are imported when called."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FAILED, USAGE = 1, 2
RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    words: for people. facts: plain data that say the same, for `--json`. errors: lines for the
    error stream. code: the exit code.
    """

    words: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    code: int = 0


def demo(options: argparse.Namespace) -> Outcome:
    """`unimm demo`."""
    from unimm.evaluation.pipeline import demo

    return _judged(demo(options.out, fast=options.fast), options.out)


def run(options: argparse.Namespace) -> Outcome:
    """`unimm run`."""
    from unimm.evaluation.pipeline import run

    return _judged(run(options.recipe, options.out, options.data), options.out)


def evaluate(options: argparse.Namespace) -> Outcome:
    """`unimm evaluate`."""
    from unimm.evaluation.pipeline import evaluate

    code = evaluate(options.model, options.recipe, options.out, options.data, options.samples)
    return _judged(code, options.out)


def _judged(code: int, out: Path) -> Outcome:
    """What a judged run has written; it has told its figures on the way."""
    from unimm.checkpoint import read_json

    results = read_json(out / RESULTS_FILE)
    facts = {name: results[name] for name in ("accuracy", "seconds")}
    return Outcome(facts={"out": str(out), **facts}, code=code)


def fit(options: argparse.Namespace) -> Outcome:
    """`unimm fit` and `unimm validate`."""
    from unimm.evaluation.recipe import find_recipe_file
    from unimm.training.launch import launch
    from unimm.training.stops import RunStopped

    if not options.config:
        return Outcome(errors=("unimm: error: name a recipe with -c RECIPE.yaml",), code=USAGE)
    files = [str(find_recipe_file(name)) for name in options.config]
    recipes = [part for file in files for part in ("-c", file)]
    try:
        trainer = launch(
            [*recipes, *options.rest], subcommand=options.command, wandb=options.wandb
        ).trainer
    except RunStopped as stopped:
        return Outcome(errors=(f"unimm: {stopped}",), code=stopped.exit_code)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    run = str(trainer.default_root_dir)
    return Outcome(facts={"run": run, "step": trainer.global_step, "metrics": metrics})


def shards(options: argparse.Namespace) -> Outcome:
    """`unimm shards`."""
    from unimm.data.worlds import MADE_BY_RULE, make_shards

    made = make_shards(
        options.source,
        options.out,
        world=options.source if options.source in MADE_BY_RULE else options.world,
        split=options.split,
        count=options.count,
        seed=options.seed,
    )
    facts = {"out": str(options.out), "samples": made.samples, "skipped": made.skipped}
    return Outcome(f"{options.out}: {made}", facts)


def tokenizer(options: argparse.Namespace) -> Outcome:
    """`unimm tokenizer`."""
    from unimm.data.worlds import assemble_tokenizer

    made = assemble_tokenizer(
        options.codec, options.text_from, options.out, audio_layout=options.audio_layout
    )
    vocabulary = made.vocabulary
    facts = {"out": str(options.out), "ids": len(vocabulary), "vocabulary": vocabulary.fingerprint}
    return Outcome(f"{options.out}: {made}", facts)


def tokenize(options: argparse.Namespace) -> Outcome:
    """`unimm tokenize`."""
    from unimm.data.templates import load_templates
    from unimm.data.tokenize import TokenizeConfig
    from unimm.data.tokenize_many import RunConfig, tokenize_shards

    config = TokenizeConfig(
        documents_per_sample=options.documents_per_sample,
        seed=options.seed,
        max_skipped=options.max_skipped,
        batch_size=options.batch_size,
        decoders=options.decoders,
        verify=options.verify,
    )
    run = RunConfig(
        engine=options.engine,
        workers=options.workers,
        device=options.device,
        ray_address=options.ray_address,
        max_failed=options.max_failed,
        allow_pipe=options.allow_pipe,
    )
    summary = tokenize_shards(
        options.shards,
        options.out,
        options.tokenizer,
        None if options.templates is None else load_templates(options.templates),
        config,
        run,
        overwrite=options.overwrite,
        progress=not options.quiet,
    )
    return Outcome(
        str(summary),
        {"out": str(options.out), **asdict(summary)},
        tuple(f"unimm: error: {shard}: {error}" for shard, error in summary.failed.items()),
        FAILED if summary.failed else 0,
    )


def generate(options: argparse.Namespace) -> Outcome:
    """`unimm generate`."""
    from unimm.evaluation.writing import generate_to_folder

    paths = generate_to_folder(
        options.model,
        options.prompt,
        options.modality,
        options.out,
        num_samples=options.num_samples,
        seed=options.seed,
        size=options.size,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        guidance=options.guidance,
    )
    files = [str(path) for path in paths]
    return Outcome("\n".join(files), {"files": files})


def serve(options: argparse.Namespace) -> Outcome:
    """`unimm serve`."""
    from unimm.evaluation.serve import serve

    code = serve(
        options.model, host=options.host, port=options.port, max_upload_mb=options.max_upload_mb
    )
    return Outcome(code=code)


def converse(options: argparse.Namespace) -> Outcome:
    """`unimm converse`."""
    from unimm.evaluation.conversation import converse

    found = converse(options.model, options.out, runs=options.runs, seed=options.seed)
    turns = [share.to_dict() for share in found.turns]
    return Outcome(str(found), {"whole": found.whole.to_dict(), "turns": turns})


def bench(options: argparse.Namespace) -> Outcome:
    """`unimm bench`."""
    from unimm.evaluation.reconstruction import Protocol, bench, read_weights

    results = bench(
        options.codecs,
        options.data,
        options.out,
        Protocol(split=options.split, limit=options.limit),
        weights=None if options.weights is None else read_weights(options.weights),
        progress=not options.quiet,
    )
    return Outcome(str(results), {"out": str(options.out), **results.to_dict()})


def export(options: argparse.Namespace) -> Outcome:
    """`unimm export`."""
    import torch

    from unimm.training.export import export

    dtype = torch.float16 if options.half else None
    out = str(export(options.source, options.out, options.tokenizer, dtype))
    return Outcome(out, {"out": out})


def convert(options: argparse.Namespace) -> Outcome:
    """`unimm convert`."""
    from unimm.conversion import convert
    from unimm.tokenizer import load_codec

    codecs = [load_codec(name) for name in options.codec]
    out = str(convert(options.source, options.out, codecs, options.vqgan))
    return Outcome(out, {"out": out})


def push(options: argparse.Namespace) -> Outcome:
    """`unimm push`."""
    from unimm.checkpoint import push_to_hub

    commit = push_to_hub(
        options.folder, options.repository, revision=options.revision, private=options.private
    )
    facts = {"repository": options.repository, "commit": commit}
    return Outcome(f"{options.repository}@{commit}", facts)


def card(options: argparse.Namespace) -> Outcome:
    """`unimm card`."""
    from unimm.evaluation.card import write_card

    path = write_card(
        options.folder,
        title=options.title,
        licence=options.licence,
        data=options.data,
        results=options.results,
        overwrite=options.overwrite,
    )
    return Outcome(str(path), {"card": str(path)})


def inspect(options: argparse.Namespace) -> Outcome:
    """`unimm inspect`."""
    from unimm.evaluation.inspection import inspect
    from unimm.evaluation.inspection_page import write_shard_page
    from unimm.tokenizer import UnifiedTokenizer

    found = inspect(options.path)
    words, facts = str(found), found.data()
    if options.html is not None:
        name = options.tokenizer
        tok = None if name is None else UnifiedTokenizer.from_pretrained(name)
        page = str(write_shard_page(options.path, options.html, tok, raw=options.raw))
        words, facts = f"{found}\n{page}", {**facts, "page": page}
    return Outcome(words, facts)


def doctor(options: argparse.Namespace) -> Outcome:
    """`unimm doctor`."""
    from unimm.evaluation.machine import checks

    found = checks(Path.cwd())
    return Outcome(
        "\n".join(str(check) for check in found), {"checks": [check._asdict() for check in found]}
    )
