"""What people import says what it takes, what it gives and what it refuses.

A docstring names every parameter (a class's own one those of its constructor), and says "Raises"
where the source raises. A parameter counts as named where the docstring has its name as a word.
"""

import ast
import doctest
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import unimm
import unimm.generation
import unimm.training
import unimm_kernels
import unimm_tokenizers

ROOT = Path(__file__).parents[1]
ROOMS = (unimm, unimm.generation, unimm.training, unimm_kernels, unimm_tokenizers)
SAYS_SO = r"Raises|Refuse|error|^See "
EXAMPLES = [
    path
    for folder in ("unimm", "kernels/unimm_kernels", "tokenizers/unimm_tokenizers")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ">>>" in path.read_text()
]


def ours(cls: type) -> bool:
    """Whether a class is of this library; what overrides another's method is described there."""
    return cls.__module__.startswith("unimm")


def public() -> Iterator[tuple[str, object]]:
    """Every public name of every room, and the public methods of what are classes of ours."""
    for room in ROOMS:
        for name in room.__all__:
            thing = getattr(room, name)
            if not callable(thing):
                continue
            yield f"{room.__name__}.{name}", thing
            if inspect.isclass(thing):
                for method, value in vars(thing).items():
                    function = value.__func__ if isinstance(value, classmethod) else value
                    theirs = any(hasattr(b, method) for b in thing.__mro__ if not ours(b))
                    if not method.startswith("_") and inspect.isfunction(function) and not theirs:
                        yield f"{room.__name__}.{name}.{method}", function


def parameters(thing: object) -> list[str]:
    """Names of what has to be given, or may be."""
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return []
    found = inspect.signature(thing).parameters  # pyright: ignore[reportArgumentType]
    return [n for n, p in found.items() if n not in ("self", "cls") and p.kind != p.VAR_POSITIONAL]


def raises(thing: object) -> bool:
    """Whether the source of a function, or of a class's constructor, raises by itself."""
    source: Any = vars(thing).get("__init__") if inspect.isclass(thing) else thing
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(source)))
    except (OSError, TypeError):  # a NamedTuple's or a dataclass's constructor has no source
        return False
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree))


def test_everything_public_has_a_docstring() -> None:
    assert [name for name, thing in public() if not inspect.getdoc(thing)] == []


def test_every_parameter_is_described() -> None:
    """Of what takes two or more: a single one is what the first line is about."""
    missing = []
    for name, thing in public():
        text = inspect.getdoc(thing) or ""
        # "See `Task.forward`": the other docstring has them.
        wanted = parameters(thing)
        if text.startswith("See ") or "; see `" in text or len(wanted) < 2:
            continue
        missing += [f"{name}: {p}" for p in wanted if not re.search(rf"\b{p}\b", text)]
    assert missing == []


def test_what_raises_says_so() -> None:
    silent = [
        name
        for name, thing in public()
        if raises(thing) and not re.search(SAYS_SO, inspect.getdoc(thing) or "")
    ]
    assert silent == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings_run(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(part for part in parts if part not in ("kernels", "tokenizers", "__init__"))
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert failed == 0
