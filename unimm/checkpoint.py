"""Bundles: folders of safetensors and JSON that hold a tokenizer, a language model, or both.

    vocabulary.json  text.model  codecs/<modality>/{config.json, model.safetensors}
    lm/{config.json, model.safetensors}  generation.json  README.md  index.json

`index.json` holds the sha256 of every other file: safetensors does not notice a changed byte.
Nothing in a bundle can run code.
"""

from __future__ import annotations

import difflib
from pathlib import Path, PurePosixPath
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from unimm_tokenizers.codec import config_from_dict
from unimm_tokenizers.storage import (
    CONFIG_FILE,
    load_weights,
    read_json,
    replacing,
    save_model,
    sha256,
    write_json,
    write_text,
)

__all__ = [
    "CODECS_FOLDER",
    "GENERATION_FILE",
    "LM_FOLDER",
    "TEXT_FILE",
    "VOCABULARY_FILE",
    "did_you_mean",
    "find_bundle",
    "lm_folder",
    "load_weights",
    "read_config",
    "read_json",
    "reopen",
    "replacing",
    "save_model",
    "seal",
    "sha256",
    "shipped_bundles",
    "verify",
    "write_json",
    "write_text",
]

VOCABULARY_FILE = "vocabulary.json"
TEXT_FILE = "text.model"
CODECS_FOLDER = "codecs"
LM_FOLDER = "lm"
GENERATION_FILE = "generation.json"
INDEX_FILE = "index.json"
SHIPPED = Path(__file__).parent / "pretrained"

Config = TypeVar("Config")


def shipped_bundles() -> list[str]:
    """Names of the bundles in the wheel."""
    return sorted(folder.name for folder in SHIPPED.iterdir() if (folder / INDEX_FILE).exists())


def find_bundle(name_or_path: str | Path) -> Path:
    """Folder of a bundle: a local folder first, then a shipped name, then a Hub repository id.

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
    try:
        local = snapshot_download(name, local_files_only=True)
    except LocalEntryNotFoundError:
        local = _download(name, looked)
    verify(Path(local))
    return Path(local)


def _download(name: str, looked: str) -> str:
    try:
        # Without this short question first, the download retries for about 23 s when offline.
        HfApi().model_info(name, timeout=1.0)
        return snapshot_download(name)
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{looked}; the Hub gave no repository {name!r}: {reason}") from None


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none is shipped"


def lm_folder(name_or_path: str | Path) -> Path:
    """Folder of a bundle's language model.

    Raises:
        ValueError: there is no such bundle, or it holds no language model.
    """
    folder = find_bundle(name_or_path) / LM_FOLDER
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
