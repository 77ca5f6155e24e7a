"""The static key-value cache of a batch of sequences that grow at their own pace."""

from __future__ import annotations

import torch
from torch import Tensor

from unimm.model.config import ModelConfig
from unimm_kernels.backend import Remembered

# On a CPU one tensor for all layers of a step, which then look at it once.
_remembered_ends = Remembered(lambda lengths, new: lengths + new)


class KVCache:
    """Keys and values of every layer, allocated once.

    Args:
        config: the model's shape.
        batch: rows.
        max_length: ids that a row can hold.
        device, dtype: where and in what the cache lives.
        static: give attention the whole cache at every step, so that all shapes stay the same
            (for compiled steps and CUDA graphs); otherwise the part that the longest row fills.

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
        *,
        static: bool = False,
    ) -> None:
        # A head's keys lie side by side: products over them need no copy, as (B, S, G, D) would.
        # A tensor for each layer, written where it lies: a compiled step copies the whole of one
        # for all layers, or of a view that is written to (16 rows of 6 layers of 320 ids on one
        # core of an AMD EPYC: 76 ms a step with one for all, 40 with a view, 8.8 so).
        shape = (batch, config.kv_heads, max_length, config.head_dim)
        self._layers = [
            (
                torch.zeros(shape, device=device, dtype=dtype),
                torch.zeros(shape, device=device, dtype=dtype),
            )
            for _ in range(config.num_layers)
        ]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.static = static
        self._rows = torch.arange(batch, device=device)[:, None]
        self._reach = 0  # upper bound of the lengths, known without asking the device
        self._even = True  # all rows are that long
        if static:
            # CUDA graphs write into these where they lie, instead of into copies of inputs.
            for tensor in (self.lengths, *(own for pair in self._layers for own in pair)):
                torch._dynamo.mark_static_address(tensor)

    @property
    def max_length(self) -> int:
        """Ids that a row can hold."""
        return self._layers[0][0].shape[2]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, t, G, D) behind each row's length; returns the caches up to the longest row.

        Returns:
            keys and values (B, S, G, D), views of the cache.
        """
        own, new = self._layers[layer], keys.shape[1]
        length = self.max_length
        if not self.static:  # a compiled step must not depend on what changes as rows grow
            length = self._reach + new
            assert length <= self.max_length, "the cache is too short for these ids"
        for stored, given in zip(own, (keys, values), strict=True):
            if not self.static and self._even:  # at once; rows of other lengths are scattered
                stored.narrow(2, self._reach, new).copy_(given.transpose(1, 2))
            else:
                self._scatter(stored, given)
        all_keys, all_values = (stored.narrow(2, 0, length).transpose(1, 2) for stored in own)
        return all_keys, all_values

    def ends(self, new: int) -> Tensor:
        """Ids of each row with `new` more behind them, int64 (B,)."""
        return _remembered_ends(self.lengths, new)

    def _scatter(self, stored: Tensor, given: Tensor) -> None:
        """Write (B, t, G, D) into (B, G, S, D), each row behind its own length."""
        slots = self.lengths[:, None] + torch.arange(given.shape[1], device=given.device)
        stored[self._rows, :, slots] = given.to(stored.dtype)

    def advance(self, count: int, lengths: Tensor | None = None) -> None:
        """Count ids as stored: `count` in every row, or `lengths` (B,) of them row by row."""
        self._reach += count
        assert self._reach <= self.max_length, "the cache is too short for these ids"
        # In place: a CUDA graph reads the lengths where they were when it was recorded.
        self.lengths += count if lengths is None else lengths
        if lengths is not None:
            self._even = self._even and bool((lengths == count).all())

    def copy_rows(self, source: KVCache, rows: Tensor) -> None:
        """Begin with rows (B,) of another cache: a prompt that many rows share is read once."""
        reach = source._reach
        assert reach <= self.max_length, "the cache is too short for these ids"
        for pair, given in zip(self._layers, source._layers, strict=True):
            for own, other in zip(pair, given, strict=True):
                own[:, :, :reach] = other[rows, :, :reach]
        self.lengths.copy_(source.lengths[rows])
        self._reach, self._even = reach, source._even
