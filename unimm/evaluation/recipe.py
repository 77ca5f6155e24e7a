"""A recipe folder: `recipe.yaml` says which steps make and judge a bundle, and with which files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from unimm.checkpoint import did_you_mean
from unimm.data.worlds import World
from unimm.evaluation.accuracy import Direction
from unimm.generation.sampling import Sampling
from unimm.vocabulary import AudioLayout, Modality

_HERE = Path(__file__).resolve().parents[1]
RECIPE_FILE = "recipe.yaml"
JUDGED = ("text", "image", "audio", "video")  # what a scene of a world shows, and judges read
# In the wheel recipes stand inside the package, in a checkout beside it.
_SHELVES = (_HERE / "recipes", _HERE.parent / "recipes")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `recipe.yaml` holds; file names are relative to its folder.

    world: where raw samples come from. train, val: how many. conversations: how many documents of
    several turns there are besides to train on (dialpad). codecs: modality -> training recipe.
    templates: document templates. documents_per_sample: drawn of them for each sample. model:
    training recipe of the language model. generation: modality -> sampling defaults of the bundle.
    directions: what is judged, each with its goal. samples: prompts per direction. title, data,
    licence: what the bundle's card says. ship_judges: put the judges into the bundle.

    What would fail only after the training is checked when it is made.

    Raises:
        ValueError: names the file and what is wrong.
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
    title: str = ""
    data: str = ""
    licence: str = "apache-2.0"
    ship_judges: bool = False
    conversations: int = 0

    def __post_init__(self) -> None:
        where = self.folder / RECIPE_FILE
        _require_one_of("world", self.world, get_args(World), where)
        _require_one_of("audio_layout", self.audio_layout, get_args(AudioLayout), where)
        for name in ("train", "val", "documents_per_sample", "samples"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{where}: {name} must be a whole number above 0, got {value!r}")
        if not isinstance(self.conversations, int) or self.conversations < 0:
            raise ValueError(
                f"{where}: conversations must be a whole number, got {self.conversations!r}"
            )
        if self.conversations and self.world != "dialpad":
            raise ValueError(f"{where}: conversations: only the world dialpad has any")
        for name in ("codecs", "generation"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{where}: {name} must map modalities, such as image: ...")
        if not isinstance(self.directions, tuple) or not self.directions:
            raise ValueError(f"{where}: directions: list at least one, such as text to image")
        for direction in self.directions:
            for modality in (direction.source, direction.target):
                _require_one_of(f"direction {direction.name}", modality, JUDGED, where)
            known = [*_names(Sampling), "size", "max_new_tokens"]
            _require_known(direction.options, known, f"{where}: direction {direction.name}")
        for modality, values in self.generation.items():
            _require_one_of("generation", modality, (*get_args(Modality), "any"), where)
            _build(Sampling, values, f"{where}: generation of {modality}")
        for name in (*self.codecs.values(), self.templates, self.model):
            self.file(name)

    def file(self, name: str) -> Path:
        """A file of the recipe.

        Raises:
            ValueError: it is missing.
        """
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"{self.folder / RECIPE_FILE}: names {name}, but there is no {path}")
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


def find_recipe_file(name_or_path: str | Path) -> Path:
    """A training recipe: a YAML file, or one of a shipped recipe, as in "dialpad/lm.yaml".

    Raises:
        ValueError: there is none; names what was looked for.
    """
    for path in (Path(name_or_path), *(shelf / name_or_path for shelf in _SHELVES)):
        if path.is_file():
            return path
    shipped = sorted(
        {
            path.relative_to(shelf).as_posix()
            for shelf in _SHELVES
            for recipe in shelf.glob(f"*/{RECIPE_FILE}")
            for path in recipe.parent.glob("*.yaml")
        }
    )
    hint = did_you_mean(str(name_or_path), shipped)
    raise ValueError(
        f"no recipe file {str(name_or_path)!r}: neither a file nor one that ships, such as "
        f"dialpad/lm.yaml{hint}"
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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected keys and values, such as world: dialpad")
    _require_known(data, [name for name in _names(Recipe) if name != "folder"], str(where))
    given = data.get("directions")
    if isinstance(given, list):
        numbered = enumerate(given, start=1)
        data["directions"] = tuple(_direction(e, f"{where}: direction {n}") for n, e in numbered)
    return _build(Recipe, {**data, "folder": folder}, str(where))


def _direction(data: Any, where: str) -> Direction:
    direction: Direction = _build(Direction, data, where)
    sizes = {key: tuple(v) if isinstance(v, list) else v for key, v in direction.options.items()}
    return dataclasses.replace(direction, options=sizes)


def _build(kind: type, data: Any, where: str) -> Any:
    """A dataclass from what YAML holds."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected keys and values, got {data!r}")
    _require_known(data, _names(kind), where)
    missing = [
        entry.name
        for entry in dataclasses.fields(kind)
        if entry.name not in data
        and entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: key {missing[0]!r} is missing")
    try:
        return kind(**data)
    except (ValueError, TypeError) as error:
        told = str(error)
        raise ValueError(told if told.startswith(where) else f"{where}: {told}") from None


def _names(kind: type) -> list[str]:
    return [entry.name for entry in dataclasses.fields(kind)]


def _require_known(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(str(key), list(known))}")


def _require_one_of(what: str, value: Any, known: Sequence[str], where: Path) -> None:
    if value not in known:
        hint = did_you_mean(str(value), list(known))
        raise ValueError(f"{where}: {what}: {value!r} is none of {', '.join(known)}{hint}")
