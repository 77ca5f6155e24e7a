"""The static key-value cache of a batch of sequences that grow at their own pace."""

from __future__ import annotations

import torch
from torch import Tensor

from unimm.model.config import ModelConfig


class KVCache:
    """Keys and values of every layer, allocated once.

    Args:
        config: the model's shape.
        batch: rows.
        max_length: ids that a row can hold.
        device, dtype: where and in what the cache lives.

    Attributes:
        lengths: int64 (B,), ids stored in each row.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_layers, batch, max_length, config.kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._reach = 0  # upper bound of the lengths, known without asking the device

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, t, G, D) behind each row's length; returns the caches up to the longest row."""
        new = keys.shape[1]
        reach = self._reach + new
        assert reach <= self.keys.shape[2], "the cache is too short for these ids"
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        slots = self.lengths[:, None] + torch.arange(new, device=keys.device)
        self.keys[layer, rows, slots] = keys.to(self.keys.dtype)
        self.values[layer, rows, slots] = values.to(self.values.dtype)
        return self.keys[layer, :, :reach], self.values[layer, :, :reach]

    def advance(self, count: int, lengths: Tensor | None = None) -> None:
        """Count ids as stored: `count` in every row, or `lengths` (B,) of them row by row."""
        self._reach += count
        self.lengths = self.lengths + (count if lengths is None else lengths)
