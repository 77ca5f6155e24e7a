"""Files that are whole or absent: atomic writes, hashes, safetensors beside a JSON config."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path` in one step.

    The temporary file stands in the target's own folder: `os.replace` is atomic only within a
    file system, and pods often mount /tmp elsewhere.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors 0.8 puts a file of its own there that its owner alone may read (0600).
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: the file is missing or not JSON; names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: the file is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_model(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Write `config.json` and `model.safetensors`.

    `dtype` casts floating tensors (half size); one whose range it cannot hold stays as it is.
    """
    folder = Path(folder)
    stored = {name: as_stored(tensor, dtype) for name, tensor in tensors.items()}
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file(stored, temporary)
    write_json(folder / CONFIG_FILE, config)


def as_stored(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor as a file holds it: on the CPU, in memory of its own; see `save_model`."""
    value = tensor.detach().cpu()
    if dtype is not None and value.is_floating_point():
        cast = value.to(dtype)
        # Counts of a codebook's use reach above float16's 65,504 and would become infinite.
        value = cast if bool((cast.isfinite() == value.isfinite()).all()) else value
    return value.contiguous().clone()  # safetensors refuses shared memory


def load_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """Read `model.safetensors`; half precision comes back as float32.

    Raises:
        ValueError: the file is missing or damaged; names it.
    """
    path = Path(folder) / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: the file is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from None
    half = (torch.float16, torch.bfloat16)
    return {name: t.float() if t.dtype in half else t for name, t in tensors.items()}


def load_weights(
    module: torch.nn.Module,
    folder: str | Path,
    upgraded: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
) -> None:
    """Read `model.safetensors` into a module: every tensor of it, and no other.

    Args:
        module: what they are for.
        folder: where the file is.
        upgraded: renames what older files hold, and adds what files leave out.

    Raises:
        ValueError: the file is missing or damaged, or does not fit the module.
    """
    state = upgraded(load_tensors(folder))
    expected = module.state_dict()
    wrong = sorted(
        key
        for key in expected.keys() | state.keys()
        if key not in state or key not in expected or state[key].shape != expected[key].shape
    )
    if wrong:
        raise ValueError(f"{folder}: weights do not fit the config, first at {wrong[0]!r}")
    module.load_state_dict(state)
