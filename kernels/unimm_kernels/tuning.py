"""Which variant of attention's kernels runs, in which tiles: safe defaults, and what was measured.

The defaults compile for sm_80 and sm_90 without spills and within shared memory (`aot.py`). What is
faster on a device is measured there by `benchmarks/kernel_tuning.py`, which writes `tuning.json`
beside this file: device name -> kernel -> "head dimension-dtype" -> variant, tiles and time. A
device or a shape that is not in it gets the default, which is never the warp-specialised variant.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("tuning.json")
# The kernel that loads by pointers; the others are attention_tma.VARIANTS.
PLAIN = "triton-tl"


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps and pipeline stages of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


class Choice(NamedTuple):
    """A variant of a kernel and its tiles."""

    variant: str
    tiles: Tiles


def choice(kernel: str, x: Tensor) -> Choice:
    """What runs for queries `x` (B, T, H, D) of `kernel`, a key of `DEFAULTS`."""
    if x.is_cuda:
        by_kernel = table().get(torch.cuda.get_device_name(x.device), {})
        found = by_kernel.get(kernel, {}).get(shape_key(x.shape[3], x.dtype))
        if found is not None:
            return Choice(found["variant"], Tiles(*found["tiles"]))
    return Choice(PLAIN, DEFAULTS[kernel](x.shape[3], x.element_size()))


def shape_key(head_dim: int, dtype: torch.dtype) -> str:
    """The key of `tuning.json`, such as "128-bfloat16"."""
    return f"{head_dim}-{str(dtype).removeprefix('torch.')}"


@lru_cache
def table() -> dict[str, Any]:
    """What `tuning.json` holds."""
    return json.loads(TABLE.read_text())


def forward_tiles(head_dim: int, element_size: int) -> Tiles:
    """Default tiles of the forward pass."""
    if element_size == 4:
        return Tiles(32, 32, 4, 1)
    if head_dim <= 64:
        return Tiles(128, 128, 8, 2)
    return Tiles(128, 64, 8, 3) if head_dim <= 128 else Tiles(128, 32, 8, 2)


def query_gradient_tiles(head_dim: int, element_size: int) -> Tiles:
    """Default tiles of the kernel of dQ, which holds Q, dO and dQ."""
    if element_size == 4:
        return Tiles(32, 32, 4, 1)
    return Tiles(128, 64, 8, 2) if head_dim <= 128 else Tiles(128, 32, 8, 1)


def key_gradient_tiles(head_dim: int, element_size: int) -> Tiles:
    """Default tiles of the kernel of dK and dV, which holds K, V, dK and dV."""
    if element_size == 4:
        return Tiles(32, 32, 4, 1)
    if head_dim <= 64:
        return Tiles(64, 128, 8, 2)
    return Tiles(32, 128, 8, 2) if head_dim <= 128 else Tiles(64, 32, 8, 1)


DEFAULTS = {
    "attention.forward": forward_tiles,
    "attention.query_gradient": query_gradient_tiles,
    "attention.key_gradient": key_gradient_tiles,
}
