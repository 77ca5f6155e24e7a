"""One command: `unimm ...`. Each sub-command imports only the room that it needs.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 preempted and resumable, 76 stopped on non-finite
loss. An error that a user can cause is one line; `--debug` adds the traceback. `--quiet` leaves out
everything but the result and errors; `--json` writes the result as one JSON object to the standard
output, and what is told on the way to the error stream.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from unimm import __version__
from unimm import cli_commands as do
from unimm.cli_commands import FAILED, Outcome

MODALITIES = ("text", "image", "audio", "video", "semantic")
WORLDS = ("dialpad", "dialpad-talk", "digits")
SHELLS = ("bash", "zsh", "tcsh")
_FLAGS = {
    "--debug": "show tracebacks",
    "--quiet": "only the result, and errors",
    "--json": "the result as one JSON object",
}
Command = Callable[[argparse.Namespace], Outcome]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # How long idle threads spin before they sleep. A small decoder's step on two cores takes 1.5
    # times as long if they never do; two processes that share the cores 4 times if they always do.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("fit", "validate"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        with _voice(options):
            outcome = options.run(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if options.debug:
            traceback.print_exc()
        line = _line(error)
        outcome = Outcome("", {"error": line}, (f"unimm: error: {line}",), FAILED)
    if options.json:
        _print(json.dumps(_plain({"command": options.command, **outcome.facts})))
    elif outcome.words:
        _print(outcome.words)
    for line in outcome.errors:
        print(_line(line), file=sys.stderr)
    return outcome.code


def _print(text: str) -> None:
    """To the standard output, whose reader, such as `head`, may have seen enough."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python writes what is left at its end (its manual, "signal", note on SIGPIPE).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _voice(options: argparse.Namespace) -> Iterator[None]:
    """Where what a command tells on its way goes to."""
    if options.quiet:
        loggers = [logging.getLogger(n) for n in ("unimm", "lightning.pytorch", "lightning.fabric")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    elif options.json:
        with redirect_stdout(sys.stderr):
            yield
    else:
        yield


def _plain(value: object) -> object:
    """What JSON can hold: null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(error: object) -> str:
    """A message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _completion(options: argparse.Namespace) -> Outcome:
    """The completion script of a shell."""
    import shtab

    parser = _parser()
    commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for command in commands[0].choices.values():
        for action in command._actions:
            if action.type is Path or action.metavar == "RECIPE.yaml":
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    script = shtab.complete(parser, options.shell)
    return Outcome(script, {"script": script})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unimm",
        description="Native autoregressive multimodal models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    for name, text in _FLAGS.items():
        parser.add_argument(name, action="store_true", help=text)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        # Without a default of its own: a sub-command's False would undo a True given before it.
        for flag, meaning in _FLAGS.items():
            command.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=meaning)
        command.set_defaults(run=run)
        return command

    demo = add("demo", do.demo, "the whole main job on the embedded dial-pad world")
    demo.add_argument("--out", type=Path, default=Path("demo"))
    demo.add_argument("--fast", action="store_true", help="use the shipped bundle, train nothing")

    run = add(
        "run",
        do.run,
        "every step of a recipe folder: shards, codecs, tokens, model, report",
    )
    run.add_argument("recipe", help="a folder, or the name of a shipped one: dialpad, digits")
    run.add_argument("--data", type=Path, help="folder of the recipe's data, where it needs some")
    run.add_argument("--out", type=Path, required=True)

    evaluate = add("evaluate", do.evaluate, "any-to-any accuracy of a bundle, judged")
    evaluate.add_argument("--model", required=True, help="bundle: shipped name or folder")
    evaluate.add_argument("--recipe", required=True, help="recipe whose directions are measured")
    evaluate.add_argument("--data", type=Path, help="folder of the recipe's data")
    evaluate.add_argument("--samples", type=int, help="per direction; default: the recipe's")
    evaluate.add_argument("--out", type=Path, required=True)

    for name, text in (
        ("fit", "train a codec or a language model; run again, it resumes"),
        ("validate", "validate a checkpoint"),
    ):
        fit = add(name, do.fit, text + "; -c RECIPE.yaml and dotted overrides (--a.b c)")
        fit.add_argument("-c", "--config", action="append", default=[], metavar="RECIPE.yaml")
        fit.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases, too")

    shards = add("shards", do.shards, "pictures, sounds, films, captions -> raw shards")
    shards.add_argument(
        "source", help="folder, JSONL, CSV, Parquet; 'dialpad' or 'dialpad-talk' (made by rule)"
    )
    shards.add_argument("--out", type=Path, required=True)
    shards.add_argument("--world", choices=WORLDS, help="how to read the source, or make it")
    shards.add_argument("--split", choices=("train", "val"), default="train", help="digits only")
    shards.add_argument("--count", type=int, help="samples to make, of a world")
    shards.add_argument("--seed", type=int, default=0)

    tokenizer = add("tokenizer", do.tokenizer, "codecs and a text model -> a tokenizer bundle")
    tokenizer.add_argument("--codec", action="append", default=[], help="codec folder; repeat")
    tokenizer.add_argument("--text-from", required=True, help="raw shards whose words train it")
    tokenizer.add_argument("--audio-layout", choices=("frame", "level"), default="frame")
    tokenizer.add_argument("--out", type=Path, required=True)

    tokenize = add("tokenize", do.tokenize, "raw shards -> token shards")
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

    generate = add("generate", do.generate, "continue a document")
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

    serve = add("serve", do.serve, "the web page of a bundle, on this machine")
    serve.add_argument("--model", required=True, help="bundle: shipped name or folder")
    serve.add_argument("--host", default="127.0.0.1", help="address; default: this machine alone")
    serve.add_argument("--port", type=int, default=7860)
    serve.add_argument("--max-upload-mb", type=int, default=20)

    converse = add("converse", do.converse, "judged conversations of four turns, dial-pad world")
    converse.add_argument("--model", required=True, help="bundle: shipped name or folder")
    converse.add_argument("--runs", type=int, default=100)
    converse.add_argument("--seed", type=int, default=0)
    converse.add_argument("--out", type=Path, required=True)

    bench = add("bench", do.bench, "reconstruction benchmark of codecs")
    bench.add_argument("codecs", nargs="+", metavar="CODEC")
    bench.add_argument(
        "--data", action="append", required=True, help="shards or a folder of media; repeat"
    )
    bench.add_argument("--split", default="", help="a name for the data, kept with the results")
    bench.add_argument("--limit", type=int, help="samples of each modality; default: all")
    bench.add_argument("--weights", type=Path, help="folder with weights.json, for LPIPS and rFID")
    bench.add_argument("--out", type=Path, required=True)

    export = add("export", do.export, "training checkpoint or run folder -> bundle (safetensors)")
    export.add_argument("source", type=Path)
    export.add_argument("out", type=Path)
    export.add_argument("--tokenizer", help="the bundle that the language model was trained with")
    export.add_argument("--half", action="store_true", help="store weights in half precision")

    convert = add("convert", do.convert, "Hugging Face folder <-> bundle, by what the source is")
    convert.add_argument("source", help="folder, shipped bundle or Hub id owner/name@revision")
    convert.add_argument("out", type=Path)
    convert.add_argument("--codec", action="append", default=[], help="codec to grow by; repeat")
    convert.add_argument("--vqgan", type=Path, help="Chameleon's picture tokenizer with decoder")

    card = add("card", do.card, "the card (README.md) of a bundle or a codec folder")
    card.add_argument("folder", type=Path)
    card.add_argument("--title", help="heading; default: the folder's name")
    card.add_argument("--licence", help="SPDX name in small letters, or other; default: unknown")
    card.add_argument("--data", help="what it was trained on; default: not stated")
    card.add_argument("--results", type=Path, help="folder of `unimm bench`: its table")
    card.add_argument("--overwrite", action="store_true", help="replace a card that is there")

    push = add("push", do.push, "upload a bundle or a codec folder to the Hugging Face Hub")
    push.add_argument("folder", type=Path)
    push.add_argument("repository", help="owner/name")
    push.add_argument("--revision", help="branch to write to")
    push.add_argument("--private", action="store_true", default=None)

    inspect = add("inspect", do.inspect, "what a bundle, a codec, a checkpoint or a shard holds")
    inspect.add_argument("path")
    inspect.add_argument(
        "--html", type=Path, help="also write a page of a shard's samples, decoded"
    )
    inspect.add_argument("--tokenizer", help="codes and decodes what the page shows")
    inspect.add_argument("--raw", type=Path, help="raw shard to show beside a token shard")
    add("doctor", do.doctor, "what this machine can do, and what would stop a run")

    completion = add("completion", _completion, "a shell's completion script, to be sourced")
    completion.add_argument("shell", choices=SHELLS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
