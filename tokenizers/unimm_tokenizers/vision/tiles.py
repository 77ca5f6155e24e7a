"""Pictures larger than memory: tiles with a margin as wide as the network sees, as the whole."""

from __future__ import annotations

from abc import abstractmethod
from itertools import product

import torch
from torch import Tensor

from unimm_tokenizers.codec import Codec
from unimm_tokenizers.vision.layers import pad_to_multiple


class TiledCodec(Codec):
    """A codec of pictures (B, C, H, W) that sees a bounded distance."""

    @property
    @abstractmethod
    def encoder_reach(self) -> int:
        """Pixels beyond its own cell, on each side, that a code sees."""

    @property
    @abstractmethod
    def decoder_reach(self) -> int:
        """Codes beyond its own cell, on each side, that a pixel sees."""

    @torch.no_grad()
    def encode_tiled(self, x: Tensor, tile: int) -> Tensor:
        """`encode` of pictures in tiles of tile x tile pixels plus margin: the same codes.

        Args:
            x: (B, C, H, W) in [-1, 1].
            tile: side in pixels, a multiple of the spatial downsampling.

        Raises:
            ValueError: x is no picture, or tile is not a positive multiple of the downsampling.
        """
        x = self.check_signal(x, 2)
        cell = self.downsample[-1]
        if tile < cell or tile % cell:
            raise ValueError(f"{self.name}: tile must be a multiple of {cell}, got {tile}")
        margin = -(-self.encoder_reach // cell) * cell
        x = pad_to_multiple(x, cell, (2, 3))
        height, width = x.shape[2:]
        codes = torch.empty(
            (x.shape[0], self.num_codebooks, height // cell, width // cell),
            dtype=torch.int64,
            device=x.device,
        )
        for top, left in product(range(0, height, tile), range(0, width, tile)):
            y0, x0 = max(0, top - margin), max(0, left - margin)
            part = self.encode(x[:, :, y0 : top + tile + margin, x0 : left + tile + margin])
            place = codes[:, :, top // cell : (top + tile) // cell, left // cell :]
            place = place[..., : tile // cell]
            place.copy_(_inner(part, (top - y0) // cell, (left - x0) // cell, place))
        return codes

    @torch.no_grad()
    def decode_tiled(self, codes: Tensor, tile: int, size: tuple[int, ...] | None = None) -> Tensor:
        """`decode` of pictures in tiles of tile x tile codes plus margin: the same picture.

        Raises:
            ValueError: codes of a film, out of range, or a tile below 1.
        """
        self.check_codes(codes, 2)
        if tile < 1:
            raise ValueError(f"{self.name}: tile must be at least 1 code, got {tile}")
        cell, margin = self.downsample[-1], self.decoder_reach
        rows, columns = codes.shape[2:]
        like = next(self.parameters())
        signal = torch.empty(
            (codes.shape[0], self.num_channels, rows * cell, columns * cell),
            dtype=like.dtype,
            device=codes.device,
        )
        for top, left in product(range(0, rows, tile), range(0, columns, tile)):
            y0, x0 = max(0, top - margin), max(0, left - margin)
            part = self.decode(codes[:, :, y0 : top + tile + margin, x0 : left + tile + margin])
            place = signal[:, :, top * cell : (top + tile) * cell, left * cell :]
            place = place[..., : tile * cell]
            place.copy_(_inner(part, (top - y0) * cell, (left - x0) * cell, place))
        return signal if size is None else signal[:, :, : size[0], : size[1]]


def _inner(part: Tensor, top: int, left: int, place: Tensor) -> Tensor:
    """What of a tile with its margin belongs to `place`, which the far edge may have cut."""
    height, width = place.shape[2:]
    return part[:, :, top : top + height, left : left + width]
