"""A recipe folder: `recipe.yaml` says which steps make and judge a bundle, and with which files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from unimm.checkpoint import did_you_mean
from unimm.data.worlds import World
from unimm.evaluation.accuracy import Direction
from unimm.vocabulary import AudioLayout

_HERE = Path(__file__).resolve().parents[1]
RECIPE_FILE = "recipe.yaml"
# In the wheel recipes stand inside the package, in a checkout beside it.
_SHELVES = (_HERE / "recipes", _HERE.parent / "recipes")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `recipe.yaml` holds; file names are relative to its folder.

    world: where raw samples come from. train, val: how many. codecs: modality -> training recipe.
    templates: document templates. documents_per_sample: drawn of them for each sample. model:
    training recipe of the language model. generation: modality -> sampling defaults of the bundle.
    directions: what is judged, each with its goal. samples: prompts per direction.
    """

    folder: Path
    world: World
    train: int
    val: int
    codecs: Mapping[str, str]
    templates: str
    documents_per_sample: int
    model: str
    generation: Mapping[str, Mapping[str, Any]]
    directions: tuple[Direction, ...]
    samples: int
    audio_layout: AudioLayout = "frame"
    title: str = field(default="")

    def __post_init__(self) -> None:
        if self.world not in get_args(World):
            raise ValueError(f"{self.folder / RECIPE_FILE}: world {self.world!r} is unknown")

    def file(self, name: str) -> Path:
        """A file of the recipe.

        Raises:
            ValueError: it is missing.
        """
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"{path}: the recipe names this file, but it is missing")
        return path


def find_recipe(name_or_path: str | Path) -> Path:
    """Folder of a recipe: a path, or a shipped name.

    Raises:
        ValueError: there is none; names what was looked for.
    """
    for folder in (Path(name_or_path), *(shelf / name_or_path for shelf in _SHELVES)):
        if (folder / RECIPE_FILE).is_file():
            return folder
    shipped = sorted(
        {path.parent.name for shelf in _SHELVES for path in shelf.glob(f"*/{RECIPE_FILE}")}
    )
    hint = did_you_mean(str(name_or_path), shipped)
    raise ValueError(
        f"no recipe {str(name_or_path)!r}: neither a folder with {RECIPE_FILE} nor one of "
        f"{', '.join(shipped)}{hint}"
    )


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        ValueError: it is missing, not YAML, or has an unknown or missing key.
    """
    folder = find_recipe(name_or_path)
    where = folder / RECIPE_FILE
    try:
        data = yaml.safe_load(where.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML ({error})") from None
    data["directions"] = tuple(
        _build(Direction, entry, f"{where}: direction") for entry in data.get("directions", [])
    )
    return _build(Recipe, {"folder": folder, **data}, str(where))


def _build(kind: type, data: Mapping[str, Any], where: str) -> Any:
    fields = [entry.name for entry in dataclasses.fields(kind)]
    for key in data:
        if key not in fields:
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(key, fields)}")
    try:
        return kind(**data)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None
