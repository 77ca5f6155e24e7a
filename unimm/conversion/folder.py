"""A Hugging Face model folder: its config, its tensors one by one, and nothing that runs code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from unimm.checkpoint import read_json

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class HuggingFaceFolder:
    """A folder with `config.json` and `model.safetensors`, whole or in shards.

    Args:
        folder: where it is.

    Raises:
        ValueError: there is no such folder, no config, or no safetensors; says what is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.config: dict[str, Any] = read_json(self.path / CONFIG)
        if not isinstance(self.config, dict) or "model_type" not in self.config:
            raise ValueError(f"{self.path / CONFIG}: names no model_type: no Hugging Face model")
        self.files = self._files()
        self.taken: set[str] = set()

    def _files(self) -> dict[str, Path]:
        """Tensor name -> its file."""
        if (self.path / INDEX).exists():
            names = read_json(self.path / INDEX).get("weight_map", {})
        elif (self.path / WEIGHTS).exists():
            with _opened(self.path / WEIGHTS) as file:
                names = dict.fromkeys(file.keys(), WEIGHTS)
        else:
            pickles = [p.name for p in (*self.path.glob("*.bin"), *self.path.glob("*.pt*"))]
            hint = f"; {pickles[0]} can run code and is not read: save it as safetensors"
            raise ValueError(f"{self.path}: holds no {WEIGHTS}{hint if pickles else ''}")
        for name in set(names.values()):
            if Path(name).name != name:
                raise ValueError(f"{self.path / INDEX}: names a file elsewhere: {name!r}")
            if not (self.path / name).exists():
                raise ValueError(f"{self.path / name}: the file is missing")
        return {name: self.path / file for name, file in names.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def tensor(self, name: str) -> Tensor:
        """One tensor, in its stored dtype.

        Raises:
            ValueError: there is none of that name, or the file is damaged.
        """
        if name not in self.files:
            raise ValueError(f"{self.path}: the weights hold no {name!r}")
        self.taken.add(name)
        with _opened(self.files[name]) as file:
            return file.get_tensor(name)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All tensors of a prefix, without it."""
        names = [name for name in self.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensor(name) for name in names}

    def left(self) -> Iterator[str]:
        """Tensors that nobody has asked for; buffers that are made anew left out."""
        return (
            n for n in self.files if n not in self.taken and not n.endswith("rotary_emb.inv_freq")
        )

    def special(self, key: str) -> int | None:
        """A special id such as "bos_token_id": of the config, else of the generation config."""
        for config in (self.config, self._generation()):
            value = config.get(key)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int):
                return value
        return None

    def _generation(self) -> Mapping[str, Any]:
        path = self.path / GENERATION
        return read_json(path) if path.exists() else {}


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from None


def rope_of(config: Mapping[str, Any], where: str) -> tuple[float, dict[str, Any]]:
    """Rotary base and scaling of a config, written as `transformers` 5 or as 4 writes them.

    Raises:
        ValueError: a kind of scaling that is not known here, or a partial rotation.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = given.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{where}: rotary scaling {kind!r} is unknown; known are default, llama3")
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{where}: heads that are turned in part are unknown here")
    return float(base), dict(given) if kind == "llama3" else {}
