"""JPEG, WebP, AVIF and palette PNG through Pillow, as codecs of pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimm_tokenizers.adapters.byte_codec import ByteCodec, to_bytes

_OPTIONS: dict[str, dict[str, Any]] = {
    "jpeg": {"format": "JPEG", "optimize": True},  # 4:2:0, Huffman tables of its own
    "webp": {"format": "WEBP", "method": 4},
    "avif": {"format": "AVIF", "speed": 6, "max_threads": 1},
}


class PillowCodec(ByteCodec):
    """Pictures (3, H, W). Settings: quality; of `png`, the number of colours of the palette."""

    name = "pillow"
    modalities = ("image",)
    formats: ClassVar[dict[str, Sequence[int]]] = {
        "jpeg": range(1, 96),
        "webp": range(0, 101),
        "avif": range(0, 101),
        "png": (2, 4, 8, 16, 32, 64, 128, 256),
    }

    def write(self, signal: Tensor, setting: int) -> bytes:
        """(3, H, W) -> a file without metadata."""
        picture = Image.fromarray(to_bytes(signal).permute(1, 2, 0).contiguous().numpy())
        file = io.BytesIO()
        if self.config.format == "png":
            palette = picture.quantize(setting, dither=Image.Dither.NONE)
            palette.save(file, "PNG", optimize=True)
        else:
            picture.save(file, quality=setting, **_OPTIONS[self.config.format])
        return file.getvalue()

    def read(self, data: bytes, size: tuple[int, ...] | None) -> Tensor:
        """A file -> (3, H, W)."""
        with Image.open(io.BytesIO(data), formats=[self.config.format.upper()]) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB")))
        return pixels.permute(2, 0, 1).float() / 127.5 - 1

    def budget(self, signal: Tensor, rate: float) -> float:
        """Bytes at `rate` bits per pixel."""
        return rate * signal[0].numel() / 8
