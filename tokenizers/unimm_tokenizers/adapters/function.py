"""Two Python functions as a codec: the shortest way to measure something new."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unimm_tokenizers.adapters.base import AdaptedCodec, ForeignQuantizer


@dataclass(frozen=True, kw_only=True)
class FunctionConfig:
    """What the functions take and give. `modality`: "image", "audio" or "video"."""

    modality: str
    codebook_size: int
    num_codebooks: int = 1
    downsample: tuple[int, ...] = (1, 1)
    num_channels: int = 3
    sample_rate: int | None = None
    fps: float = 10.0


class FunctionCodec(AdaptedCodec):
    """A codec of two callables.

    Args:
        config: shapes and code count.
        encode: (B, C, *signal) float in [-1, 1] of whole codes -> integers (B, K, *grid).
        decode: int64 (B, K, *grid) -> float (B, C, *signal).
    """

    name = "function"
    config_class = FunctionConfig
    config: FunctionConfig

    def __init__(
        self,
        config: FunctionConfig,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(config)
        self.modalities = (config.modality,)
        self.quantizer = ForeignQuantizer(config.num_codebooks, config.codebook_size)
        self._encode, self._decode = encode, decode
        self.register_parameter("anchor", torch.nn.Parameter(torch.zeros(0)))  # device and dtype

    @property
    def downsample(self) -> tuple[int, ...]:
        """Signal units per code on each grid axis."""
        return self.config.downsample

    def to_codes(self, x: Tensor) -> Tensor:
        """The first function."""
        return self._encode(x)

    def to_signal(self, codes: Tensor) -> Tensor:
        """The second function."""
        return self._decode(codes)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Refused: functions are no weights."""
        raise ValueError("a codec of two functions cannot be saved: make it a class of its own")
