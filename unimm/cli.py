"""One command: `unimm ...`. Each sub-command imports only the room that it needs.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 preempted and resumable, 76 stopped on non-finite
loss. An error that a user can cause is one line; `--debug` adds the traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from unimm import __version__

FAILED, USAGE = 1, 2
MODALITIES = ("text", "image", "audio", "video", "semantic")
Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # Two processes on two cores ruin each other's rate when idle threads spin: a 6-fold loss.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("fit", "validate"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        return options.run(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if options.debug:
            traceback.print_exc()
        print(f"unimm: error: {_line(error)}", file=sys.stderr)
        return FAILED


def _line(error: object) -> str:
    """A message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unimm",
        description="Native autoregressive multimodal models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        # Without a default of its own: a sub-command's False would undo a True given before it.
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
        )
        command.set_defaults(run=run)
        return command

    demo = add("demo", _demo, "the whole main job on the embedded dial-pad world")
    demo.add_argument("--out", type=Path, default=Path("demo"))
    demo.add_argument("--fast", action="store_true", help="use the shipped bundle, train nothing")

    run = add("run", _run, "every step of a recipe folder: shards, codecs, tokens, model, report")
    run.add_argument("recipe", help="a folder, or the name of a shipped one: dialpad, digits")
    run.add_argument("--data", type=Path, help="folder of the recipe's data, where it needs some")
    run.add_argument("--out", type=Path, required=True)

    evaluate = add("evaluate", _evaluate, "any-to-any accuracy of a bundle, judged")
    evaluate.add_argument("--model", required=True, help="bundle: shipped name or folder")
    evaluate.add_argument("--recipe", required=True, help="recipe whose directions are measured")
    evaluate.add_argument("--data", type=Path, help="folder of the recipe's data")
    evaluate.add_argument("--samples", type=int, help="per direction; default: the recipe's")
    evaluate.add_argument("--out", type=Path, required=True)

    for name, text in (
        ("fit", "train a codec or a language model; run again, it resumes"),
        ("validate", "validate a checkpoint"),
    ):
        fit = add(name, _fit, text + "; -c RECIPE.yaml and dotted overrides (--a.b c)")
        fit.add_argument("-c", "--config", action="append", default=[], metavar="RECIPE.yaml")

    shards = add("shards", _shards, "pictures, sounds, films, captions -> raw shards")
    shards.add_argument("source", help="folder, JSONL, or 'dialpad' (made by rule)")
    shards.add_argument("--out", type=Path, required=True)
    shards.add_argument("--world", choices=("dialpad", "digits"), help="how to read the source")
    shards.add_argument("--split", choices=("train", "val"), default="train", help="digits only")
    shards.add_argument("--count", type=int, help="samples to make (dialpad, digits)")
    shards.add_argument("--seed", type=int, default=0)

    tokenizer = add("tokenizer", _tokenizer, "codecs and a text model -> a tokenizer bundle")
    tokenizer.add_argument("--codec", action="append", default=[], help="codec folder; repeat")
    tokenizer.add_argument("--text-from", required=True, help="raw shards whose words train it")
    tokenizer.add_argument("--audio-layout", choices=("frame", "level"), default="frame")
    tokenizer.add_argument("--out", type=Path, required=True)

    tokenize = add("tokenize", _tokenize, "raw shards -> token shards")
    tokenize.add_argument("shards", help="for example 'raw-{000000..000099}.tar'")
    tokenize.add_argument("--tokenizer", required=True)
    tokenize.add_argument(
        "--templates",
        type=Path,
        help="YAML list of document templates; default: text and media both ways",
    )
    tokenize.add_argument("--documents-per-sample", type=int, default=1)
    tokenize.add_argument("--out", type=Path, required=True)
    tokenize.add_argument("--workers", type=int, default=1)
    tokenize.add_argument("--seed", type=int, default=0)
    tokenize.add_argument("--overwrite", action="store_true")
    tokenize.add_argument("--verify", action="store_true", help="check sha256 of sources")

    generate = add("generate", _generate, "continue a document")
    generate.add_argument("--model", required=True)
    generate.add_argument(
        "--prompt", action="append", default=[], help="text, or a picture or sound file; repeat"
    )
    generate.add_argument("--modality", choices=MODALITIES)
    generate.add_argument("--out", type=Path, required=True)
    generate.add_argument("--num-samples", type=int, default=1)
    generate.add_argument("--seed", type=int)
    for name in ("temperature", "top-p", "guidance"):
        generate.add_argument(f"--{name}", type=float)
    generate.add_argument("--top-k", type=int)

    bench = add("bench", _bench, "reconstruction benchmark of codecs")
    bench.add_argument("codecs", nargs="+", metavar="CODEC")
    bench.add_argument("--data", required=True)
    bench.add_argument("--out", type=Path, required=True)

    export = add("export", _export, "training checkpoint or run folder -> bundle (safetensors)")
    export.add_argument("source", type=Path)
    export.add_argument("out", type=Path)
    export.add_argument("--tokenizer", help="the bundle that the language model was trained with")
    export.add_argument("--half", action="store_true", help="store weights in half precision")

    inspect = add("inspect", _inspect, "what a bundle, a codec, a checkpoint or a shard holds")
    inspect.add_argument("path")
    add("doctor", _doctor, "what this machine can do, and what would stop a run")
    return parser


def _demo(options: argparse.Namespace) -> int:
    from unimm.evaluation.pipeline import demo

    return demo(options.out, fast=options.fast)


def _run(options: argparse.Namespace) -> int:
    from unimm.evaluation.pipeline import run

    return run(options.recipe, options.out, options.data)


def _evaluate(options: argparse.Namespace) -> int:
    from unimm.evaluation.pipeline import evaluate

    return evaluate(options.model, options.recipe, options.out, options.data, options.samples)


def _fit(options: argparse.Namespace) -> int:
    from unimm.training.launch import launch

    if not options.config:
        print("unimm: error: name a recipe with -c RECIPE.yaml", file=sys.stderr)
        return USAGE
    recipes = [part for recipe in options.config for part in ("-c", recipe)]
    launch([*recipes, *options.rest], subcommand=options.command)
    return 0


def _shards(options: argparse.Namespace) -> int:
    from unimm.data.worlds import make_shards

    made = make_shards(
        options.source,
        options.out,
        world="dialpad" if options.source == "dialpad" else options.world,
        split=options.split,
        count=options.count,
        seed=options.seed,
    )
    print(f"{made} samples in {options.out}")
    return 0


def _tokenizer(options: argparse.Namespace) -> int:
    from unimm.data.worlds import assemble_tokenizer

    tokenizer = assemble_tokenizer(
        options.codec, options.text_from, options.out, audio_layout=options.audio_layout
    )
    print(f"{options.out}: {tokenizer}")
    return 0


def _tokenize(options: argparse.Namespace) -> int:
    from unimm.data.shards import ShardReader, expand
    from unimm.data.templates import default_templates, load_templates
    from unimm.data.tokenize import TokenizeConfig
    from unimm.data.tokenize_many import tokenize_shards
    from unimm.tokenizer import UnifiedTokenizer

    if options.templates is not None:
        templates = load_templates(options.templates)
    else:
        vocabulary = UnifiedTokenizer.from_pretrained(options.tokenizer).vocabulary
        first = ShardReader(expand(options.shards)[0])
        if not len(first):
            raise ValueError(f"{first.path}: holds no sample")
        templates = default_templates(first.samples[0], vocabulary.modalities)
    config = TokenizeConfig(
        documents_per_sample=options.documents_per_sample,
        seed=options.seed,
        verify=options.verify,
    )
    summary = tokenize_shards(
        options.shards,
        options.out,
        options.tokenizer,
        templates,
        config,
        workers=options.workers,
        overwrite=options.overwrite,
    )
    print(summary)
    for shard, error in summary.failed.items():
        print(f"unimm: error: {shard}: {_line(error)}", file=sys.stderr)
    return FAILED if summary.failed else 0


def _generate(options: argparse.Namespace) -> int:
    from unimm.evaluation.writing import generate_to_folder

    paths = generate_to_folder(
        options.model,
        options.prompt,
        options.modality,
        options.out,
        num_samples=options.num_samples,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        guidance=options.guidance,
    )
    print("\n".join(str(path) for path in paths))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from unimm.evaluation.reconstruction import bench

    print(bench(options.codecs, options.data, options.out))
    return 0


def _export(options: argparse.Namespace) -> int:
    import torch

    from unimm.training.export import export

    dtype = torch.float16 if options.half else None
    print(export(options.source, options.out, options.tokenizer, dtype))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from unimm.evaluation.inspection import inspect

    print(inspect(options.path))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from unimm.evaluation.machine import doctor

    print(doctor())
    return 0


if __name__ == "__main__":
    sys.exit(main())
