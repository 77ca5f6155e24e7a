"""Weights of a language model: one safetensors file, or shards of at most 5 GB with their index.

The file names and the index are those of the Hub, so that its tools read them. Every file is whole
or absent; the index is written last, and what it replaces is removed after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unimm_tokenizers.storage import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    as_stored,
    read_json,
    replacing,
    write_json,
)

SHARD_BYTES = 5 * 10**9
INDEX_FILE = WEIGHTS_FILE + ".index.json"
_SHARDS = "model-*-of-*.safetensors"


def save_weights(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `config.json` and the weights; what stood there before is replaced.

    Args:
        folder: where.
        config: plain data.
        tensors: by name.
        dtype: cast floating tensors to it; None keeps theirs.
        shard_bytes: most bytes of a file; a single tensor above it has a file of its own.
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # late: see hub.py

    folder = Path(folder)

    def stored_bytes(tensor: Tensor) -> int:
        cast = dtype is not None and tensor.is_floating_point()
        return tensor.numel() * (dtype.itemsize if cast and dtype else tensor.itemsize)

    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=stored_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    old = {*folder.glob(_SHARDS), folder / WEIGHTS_FILE, folder / INDEX_FILE}
    for file, names in split.filename_to_tensors.items():
        shard = {name: as_stored(tensors[name], dtype) for name in names}
        with replacing(folder / file) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
    written = {folder / file for file in split.filename_to_tensors}
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX_FILE, index)
        written.add(folder / INDEX_FILE)
    write_json(folder / CONFIG_FILE, config)
    for path in old - written:
        path.unlink(missing_ok=True)


def load_weights(
    module: torch.nn.Module, folder: str | Path, dtype: torch.dtype | None = torch.float32
) -> None:
    """Read a module's weights: every tensor of it, and no other.

    Args:
        module: takes the tensors as they are read; it may be without weights (on "meta").
        folder: where they are.
        dtype: of floating tensors; None keeps what is stored.

    Raises:
        ValueError: a file is missing or damaged, or the weights do not fit the module.
    """
    state = {
        name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        for file in weight_files(folder)
        for name, tensor in _read(file).items()
    }
    adopt(module, state, str(folder))


def adopt(module: torch.nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Make these tensors a module's own: every one of it, and no other.

    Raises:
        ValueError: they do not fit; names `where` and the first that does not.
    """
    expected = module.state_dict()
    wrong = sorted(
        key
        for key in expected.keys() | state.keys()
        if key not in state or key not in expected or state[key].shape != expected[key].shape
    )
    if wrong:
        raise ValueError(f"{where}: weights do not fit the config, first at {wrong[0]!r}")
    module.load_state_dict(state, assign=True)


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a folder's weights: one, or the shards that its index names.

    Raises:
        ValueError: the index is no index of weights, or names a file elsewhere.
    """
    folder = Path(folder)
    index_path = folder / INDEX_FILE
    if not index_path.exists():
        return [folder / WEIGHTS_FILE]
    index = read_json(index_path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index_path}: this is no index of weights")
    files = sorted(set(names.values()))
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index_path}: names a file outside its folder: {name!r}")
    return [folder / name for name in files]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: the file is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from None
