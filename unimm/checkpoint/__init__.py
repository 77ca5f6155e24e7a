# pyright: strict
# torch's own types are partly unknown, and what users give is checked whatever its annotation says.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnnecessaryIsInstance=false

"""Bundles: folders of safetensors and JSON that hold a tokenizer, a language model, or both.

    vocabulary.json  text.model | tokenizer.json  codecs/<modality>/{config.json, model.safetensors}
    lm/{config.json, model.safetensors}  generation.json  README.md  index.json

Weights above 5 GB stand in shards, as on the Hub. `index.json` holds the sha256 of every other
file: safetensors does not notice a changed byte.
Nothing in a bundle can run code.
"""

from __future__ import annotations

import difflib
from pathlib import Path, PurePosixPath
from typing import TypeVar

from unimm.checkpoint.card import CARD_FILE, Card, Score, markdown_table, scores_of
from unimm.checkpoint.pushing import HubMixin, fits
from unimm.checkpoint.weights import adopt, load_weights, save_weights, weight_files
from unimm_tokenizers.codec import config_from_dict
from unimm_tokenizers.storage import (
    CONFIG_FILE,
    read_json,
    replacing,
    sha256,
    write_json,
    write_text,
)

__all__ = [
    "CARD_FILE",
    "CODECS_FOLDER",
    "GENERATION_FILE",
    "INDEX_FILE",
    "LM_FOLDER",
    "VOCABULARY_FILE",
    "Card",
    "HubMixin",
    "Score",
    "adopt",
    "did_you_mean",
    "find_bundle",
    "lm_folder",
    "load_weights",
    "markdown_table",
    "push_to_hub",
    "read_config",
    "read_json",
    "reopen",
    "replacing",
    "save_weights",
    "scores_of",
    "seal",
    "sha256",
    "shipped_bundles",
    "verify",
    "weight_files",
    "write_json",
    "write_text",
]

VOCABULARY_FILE = "vocabulary.json"
CODECS_FOLDER = "codecs"
LM_FOLDER = "lm"
GENERATION_FILE = "generation.json"
INDEX_FILE = "index.json"
SHIPPED = Path(__file__).parents[1] / "pretrained"

Config = TypeVar("Config")


def shipped_bundles() -> list[str]:
    """Names of the bundles in the wheel."""
    return sorted(folder.name for folder in SHIPPED.iterdir() if (folder / INDEX_FILE).exists())


def find_bundle(name_or_path: str | Path, revision: str | None = None) -> Path:
    """Folder of a bundle: a local folder first, then a shipped name, then a Hub repository id.

    Args:
        name_or_path: folder, shipped name, "owner/name" or "owner/name@revision".
        revision: commit, tag or branch of a Hub repository. What the Hub's cache holds of it is
            taken from there; only a commit names the same files for ever.

    Raises:
        ValueError: nothing is found, or a file of it was changed; says what was looked for.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        verify(folder)
        return folder
    name = str(name_or_path)
    if name in shipped_bundles():
        verify(SHIPPED / name)
        return SHIPPED / name
    looked = f"no folder {name!r} and no shipped bundle of that name ({_listed(shipped_bundles())})"
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or folder.exists():
        raise ValueError(f"{looked}; give a folder, a shipped name or a Hub id 'owner/name'")
    from unimm.checkpoint.hub import cached

    repository, _, pinned = name.partition("@")
    local = cached(repository, revision or pinned or None, looked)
    verify(local)
    return local


def push_to_hub(
    folder: str | Path,
    repository: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    message: str = "Upload with unimm",
) -> str:
    """Upload a bundle or a codec folder to the Hub; a sealed one is checked first.

    Args:
        folder: what to upload; it may hold data alone, nothing that could run code.
        repository: "owner/name"; made where there is none.
        revision: branch to write to; None: the main one.
        private: of a repository that is made; None: the owner's own default.
        message: of the commit.

    Returns:
        The commit's id: what `revision` names for ever.

    Raises:
        ValueError: a file was changed since the bundle was sealed, or is of a kind that bundles do
            not hold, or the Hub refuses.
    """
    verify(folder)
    foreign = [name for name in _files(Path(folder)) if not fits(name)]
    if foreign:
        raise ValueError(f"{folder}: bundles hold no such file as {foreign[0]!r}: take it away")
    from unimm.checkpoint.hub import upload

    return upload(folder, repository, revision, private, message)


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none is shipped"


def lm_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """Folder of a bundle's language model.

    Raises:
        ValueError: there is no such bundle, or it holds no language model.
    """
    folder = find_bundle(name_or_path, revision) / LM_FOLDER
    if not folder.is_dir():
        raise ValueError(f"{folder.parent}: this bundle holds no language model")
    return folder


def read_config(config_class: type[Config], folder: str | Path) -> Config:
    """Read `config.json` into a config dataclass.

    Raises:
        ValueError: the file is missing, not JSON, or has an unknown or missing key.
    """
    path = Path(folder) / CONFIG_FILE
    return config_from_dict(config_class, read_json(path), str(path))


def reopen(folder: str | Path) -> None:
    """Drop `index.json`: the bundle is about to be written again; `seal` it once it is whole."""
    (Path(folder) / INDEX_FILE).unlink(missing_ok=True)


def seal(folder: str | Path) -> None:
    """Write `index.json`: the sha256 of every file in the bundle."""
    folder = Path(folder)
    hashes = {name: sha256(folder / name) for name in _files(folder)}
    write_json(folder / INDEX_FILE, {"format": 1, "sha256": hashes})


def verify(folder: str | Path) -> None:
    """Compare a bundle with its `index.json`; a folder without one is still being made.

    Raises:
        ValueError: a file is missing or was changed, or the index is no index; names the first.
    """
    folder = Path(folder)
    index_path = folder / INDEX_FILE
    if not index_path.exists():
        return
    index = read_json(index_path)
    if not isinstance(index, dict) or not isinstance(index.get("sha256"), dict):
        raise ValueError(f"{index_path}: this is no index of a bundle; get the bundle again")
    for name, expected in index["sha256"].items():
        # By the name alone: the Hub's cache keeps a bundle's files as links to a folder beside it.
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError(f"{index_path}: names a file outside the bundle: {name!r}")
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: the file is missing; get the bundle again")
        if sha256(path) != expected:
            raise ValueError(f"{path}: the file differs from index.json; get the bundle again")


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != INDEX_FILE and not path.name.startswith(".")
    )


def did_you_mean(word: str, known: list[str]) -> str:
    """A hint such as " (did you mean 'image'?)", or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
