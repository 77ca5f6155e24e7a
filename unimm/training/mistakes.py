"""A complaint about a recipe in one line, with a hint for a misspelled key."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightning
import yaml

from unimm.checkpoint import did_you_mean

_UNKNOWN = re.compile(
    r"accept option '([^']+)'|Option '([^']+)' is not accepted|unrecognized arguments: --([\w.]+)"
)
_KEY = re.compile(r'Parser key "([^"]+)":')
# Lines that jsonargparse puts around what is wrong.
FRAME = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Problem with given class_path",
    "Expected a <class 'NoneType'>",
    "Given value",
    "Subclass types expect one of",
    "a class path",
    "a dict with",
)


def explained(message: str, arguments: Sequence[str]) -> str:
    """The complaint of jsonargparse or Lightning, with what stands around it left out."""
    recipes = [value for flag, value in itertools.pairwise(arguments) if flag in ("-c", "--config")]
    where = ", ".join(recipes) or "recipe"
    unknown = _UNKNOWN.search(message)
    if unknown is None:
        path = ".".join(_KEY.findall(message))
        lines = [_KEY.split(line)[-1].strip(" -") for line in message.splitlines()]
        told = " ".join(line for line in lines if line and not line.startswith(FRAME))
        return f"{where}: {path}: {told}"[:500] if path else f"{where}: {told}"[:500]
    key = next(group for group in unknown.groups() if group)
    known = sorted(_known_keys(recipes))
    misspelled = next((part for part in key.split(".") if part not in known), key)
    hint = did_you_mean(misspelled, known)
    return f"{where}: unknown key {key!r}{hint}"


def _known_keys(recipes: Sequence[str]) -> set[str]:
    """Every key that the classes named in the recipes, or Lightning's trainer, would take."""
    keys = {"model", "data", "trainer", "seed_everything", "ckpt_path", "class_path", "init_args"}
    keys |= set(inspect.signature(lightning.Trainer.__init__).parameters)
    for recipe in recipes:
        for path in _class_paths(yaml.safe_load(Path(recipe).read_text())):
            keys |= _parameters(path)
    return keys - {"self"}


def _class_paths(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("class_path"), str):
            yield node["class_path"]
        for value in node.values():
            yield from _class_paths(value)
    elif isinstance(node, list):
        for value in node:
            yield from _class_paths(value)


def _parameters(class_path: str) -> set[str]:
    """Parameters of a class, and the fields of the config dataclasses among them."""
    module, _, name = class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None) if module else None
    if found is None:
        return set()
    keys = set(inspect.signature(found.__init__).parameters)
    try:
        hints = get_type_hints(found.__init__)
    except NameError:  # a class of another package that imports its types for checkers alone
        return keys
    for hint in hints.values():
        for part in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(part):
                keys |= {field.name for field in dataclasses.fields(part)}
    return keys
