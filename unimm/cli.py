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
    shards.add_argument("source", help="folder, JSONL, CSV, Parquet, or 'dialpad' (made by rule)")
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
    tokenize.add_argument("--seed", type=int, default=0)
    tokenize.add_argument("--engine", choices=("local", "ray"), default="local")
    tokenize.add_argument("--workers", type=int, help="processes, or Ray actors")
    tokenize.add_argument("--device", default="cpu", help="of the codecs: cpu, cuda, cuda:1")
    tokenize.add_argument("--ray-address", help="of a running cluster; default: start one here")
    tokenize.add_argument("--batch-size", type=int, default=64, help="signals coded together")
    tokenize.add_argument("--decoders", type=int, default=1, help="decoding threads of a worker")
    tokenize.add_argument(
        "--max-skipped", type=float, default=0.001, help="share of a shard that may be unusable"
    )
    tokenize.add_argument(
        "--max-failed", type=float, help="shards that may fail; below 1, a share of all"
    )
    tokenize.add_argument("--overwrite", action="store_true")
    tokenize.add_argument(
        "--verify", action="store_true", help="compare committed shards byte for byte, too"
    )
    tokenize.add_argument("--allow-pipe", action="store_true", help="run 'pipe:' commands")

    generate = add("generate", _generate, "continue a document")
    generate.add_argument("--model", required=True)
    generate.add_argument(
        "--prompt", action="append", default=[], help="text, or a picture or sound file; repeat"
    )
    generate.add_argument("--modality", choices=MODALITIES)
    generate.add_argument("--out", type=Path, required=True)
    generate.add_argument("--num-samples", type=int, default=1)
    generate.add_argument("--seed", type=int)
    generate.add_argument(
        "--size", help="pixels as HEIGHTxWIDTH, seconds, or FRAMESxHEIGHTxWIDTH; default: any"
    )
    generate.add_argument("--max-new-tokens", type=int)
    for name in ("temperature", "top-p", "min-p", "repetition-penalty", "guidance"):
        generate.add_argument(f"--{name}", type=float)
    generate.add_argument("--top-k", type=int)

    serve = add("serve", _serve, "the web page of a bundle, on this machine")
    serve.add_argument("--model", required=True, help="bundle: shipped name or folder")
    serve.add_argument("--host", default="127.0.0.1", help="address; default: this machine alone")
    serve.add_argument("--port", type=int, default=7860)
    serve.add_argument("--max-upload-mb", type=int, default=20)

    converse = add("converse", _converse, "judged conversations of four turns, dial-pad world")
    converse.add_argument("--model", required=True, help="bundle: shipped name or folder")
    converse.add_argument("--runs", type=int, default=100)
    converse.add_argument("--seed", type=int, default=0)
    converse.add_argument("--out", type=Path, required=True)

    bench = add("bench", _bench, "reconstruction benchmark of codecs")
    bench.add_argument("codecs", nargs="+", metavar="CODEC")
    bench.add_argument("--data", required=True)
    bench.add_argument("--out", type=Path, required=True)

    export = add("export", _export, "training checkpoint or run folder -> bundle (safetensors)")
    export.add_argument("source", type=Path)
    export.add_argument("out", type=Path)
    export.add_argument("--tokenizer", help="the bundle that the language model was trained with")
    export.add_argument("--half", action="store_true", help="store weights in half precision")

    convert = add("convert", _convert, "Hugging Face folder <-> bundle, by what the source is")
    convert.add_argument("source", help="folder, shipped bundle or Hub id owner/name@revision")
    convert.add_argument("out", type=Path)
    convert.add_argument("--codec", action="append", default=[], help="codec to grow by; repeat")
    convert.add_argument("--vqgan", type=Path, help="Chameleon's picture tokenizer with decoder")

    push = add("push", _push, "upload a bundle or a codec folder to the Hugging Face Hub")
    push.add_argument("folder", type=Path)
    push.add_argument("repository", help="owner/name")
    push.add_argument("--revision", help="branch to write to")
    push.add_argument("--private", action="store_true", default=None)

    inspect = add("inspect", _inspect, "what a bundle, a codec, a checkpoint or a shard holds")
    inspect.add_argument("path")
    inspect.add_argument(
        "--html", type=Path, help="also write a page of a shard's samples, decoded"
    )
    inspect.add_argument("--tokenizer", help="codes and decodes what the page shows")
    inspect.add_argument("--raw", type=Path, help="raw shard to show beside a token shard")
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
    from unimm.training.stops import RunStopped

    if not options.config:
        print("unimm: error: name a recipe with -c RECIPE.yaml", file=sys.stderr)
        return USAGE
    recipes = [part for recipe in options.config for part in ("-c", recipe)]
    try:
        launch([*recipes, *options.rest], subcommand=options.command)
    except RunStopped as stopped:
        print(f"unimm: {_line(stopped)}", file=sys.stderr)
        return stopped.exit_code
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
        size=options.size,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        guidance=options.guidance,
    )
    print("\n".join(str(path) for path in paths))
    return 0


def _serve(options: argparse.Namespace) -> int:
    from unimm.evaluation.serve import serve

    return serve(
        options.model, host=options.host, port=options.port, max_upload_mb=options.max_upload_mb
    )


def _converse(options: argparse.Namespace) -> int:
    from unimm.evaluation.conversation import converse

    print(converse(options.model, options.out, runs=options.runs, seed=options.seed))
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


def _convert(options: argparse.Namespace) -> int:
    from unimm.conversion import convert
    from unimm.tokenizer import load_codec

    codecs = [load_codec(name) for name in options.codec]
    print(convert(options.source, options.out, codecs, options.vqgan))
    return 0


def _push(options: argparse.Namespace) -> int:
    from unimm.checkpoint import push_to_hub

    commit = push_to_hub(
        options.folder, options.repository, revision=options.revision, private=options.private
    )
    print(f"{options.repository}@{commit}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from unimm.evaluation.inspection import inspect
    from unimm.evaluation.inspection_page import write_shard_page
    from unimm.tokenizer import UnifiedTokenizer

    print(inspect(options.path))
    if options.html is not None:
        name = options.tokenizer
        tokenizer = None if name is None else UnifiedTokenizer.from_pretrained(name)
        print(write_shard_page(options.path, options.html, tokenizer, raw=options.raw))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from unimm.evaluation.machine import doctor

    print(doctor())
    return 0


if __name__ == "__main__":
    sys.exit(main())
