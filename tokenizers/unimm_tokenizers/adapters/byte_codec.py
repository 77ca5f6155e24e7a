"""Classical codecs behind the codec interface: their files are their codes.

A file of n bytes is n codes of one level with 256 values (the view of JPEG-LM, Han et al., arXiv
2408.08459), so that rates count every byte, headers too, and nothing is measured another way than
for a learned codec. A batch's shorter files are padded with -1.

A codec is set by its own setting (JPEG quality, CRF, kbit/s), or by a rate: then each signal takes
the best setting that stays within the rate, or the smallest there is where none does.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unimm_tokenizers.adapters.base import ForeignQuantizer
from unimm_tokenizers.codec import PADDING_CODE, Codec, CodecOutput


@dataclass(frozen=True, kw_only=True)
class ClassicalConfig:
    """Which codec, and how good: one of `setting` (its own scale) and `rate`.

    `rate` is in bits per pixel of pictures and film, kbit/s of sound.
    """

    format: str
    setting: int | None = None
    rate: float | None = None
    num_channels: int = 3
    sample_rate: int | None = None
    fps: float = 10.0


class ByteCodec(Codec):
    """Base of classical codecs; a subclass writes and reads one file."""

    config_class = ClassicalConfig
    config: ClassicalConfig
    formats: dict[str, Sequence[int]]  # name -> its settings, from the smallest file to the largest

    def __init__(self, config: ClassicalConfig) -> None:
        super().__init__(config)
        if config.format not in self.formats:
            raise ValueError(f"{self.name}: format {config.format!r} is none of {self.known()}")
        self.settings = self.formats[config.format]
        if (config.setting is None) == (config.rate is None) and len(self.settings) > 1:
            raise ValueError(f"{config.format}: give a setting or a rate, and not both")
        if config.setting is not None and config.setting not in self.settings:
            raise ValueError(
                f"{config.format}: setting {config.setting} is none of {self.settings[0]} to "
                f"{self.settings[-1]}"
            )
        self.quantizer = ForeignQuantizer(1, 256)
        self.register_parameter("anchor", torch.nn.Parameter(torch.zeros(0)))  # device and dtype

    @classmethod
    def known(cls) -> str:
        """Names of the formats, for messages."""
        return ", ".join(cls.formats)

    @property
    def downsample(self) -> tuple[int, ...]:
        """Bytes stand on no grid of the signal."""
        return (1,)

    @property
    def receptive_field(self) -> tuple[int, ...]:
        """A byte can depend on everything before it."""
        return (2**31,)

    @abstractmethod
    def write(self, signal: Tensor, setting: int) -> bytes:
        """Signal (C, *signal) in [-1, 1] -> a file."""

    @abstractmethod
    def read(self, data: bytes, size: tuple[int, ...] | None) -> Tensor:
        """A file -> signal (C, *signal) in [-1, 1], of `size` where it is given."""

    @abstractmethod
    def budget(self, signal: Tensor, rate: float) -> float:
        """Bytes that a rate allows for this signal."""

    @property
    def _axes(self) -> int:
        return {"audio": 1, "image": 2, "video": 3}[self.modality]

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Signal (B, C, *signal) in [-1, 1] -> bytes int64 (B, 1, n).

        Raises:
            ValueError: not a signal for this codec.
        """
        x = self.check_signal(x, self._axes).float().cpu()
        files = [torch.tensor(list(self._file(signal))) for signal in x]
        return pad_sequence(files, batch_first=True, padding_value=PADDING_CODE)[:, None]

    def _file(self, signal: Tensor) -> bytes:
        if self.config.rate is None:
            return self.write(signal, self.config.setting or self.settings[0])
        allowed = self.budget(signal, self.config.rate)
        files: dict[int, bytes] = {}

        def size(setting: int) -> int:
            files[setting] = self.write(signal, setting)
            return len(files[setting])

        best = self.settings[max(0, bisect_right(self.settings, allowed, key=size) - 1)]
        return files.get(best) or self.write(signal, best)

    @torch.no_grad()
    def decode(self, codes: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """Bytes (B, 1, n), -1 after the end -> signal (B, C, *signal).

        Raises:
            ValueError: not bytes, or not a file of this codec.
        """
        if codes.ndim != 3 or codes.shape[1] != 1 or codes.dtype != torch.int64:
            raise ValueError(
                f"{self.name}: expected bytes int64 (batch, 1, n), got {tuple(codes.shape)}"
            )
        if codes.numel() and not -1 <= int(codes.min()) <= int(codes.max()) < 256:
            raise ValueError(f"{self.name}: bytes must lie in 0 to 255, or be -1 after the end")
        files = [bytes(row[0][row[0] >= 0].tolist()) for row in codes.cpu()]
        try:
            signals = [self.read(data, size) for data in files]
        except (
            ValueError,
            OSError,
            EOFError,
            SyntaxError,
            IndexError,
        ) as error:  # what Pillow and PyAV raise
            raise ValueError(f"{self.config.format}: not a file of it ({error})") from None
        return torch.stack(signals)

    def forward(self, x: Tensor) -> CodecOutput:
        """One pass; there is nothing to train."""
        codes = self.encode(x)
        return CodecOutput(self.decode(codes, tuple(x.shape[2:])), x, codes, x.new_zeros(()))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Refused: a grammar has no place for codes without a grid."""
        raise ValueError(f"{self.config.format}: a classical codec has no weights to save")


def even(frames: Tensor) -> Tensor:
    """Pad (..., H, W) to even sides: chroma is stored at half size."""
    height, width = frames.shape[-2:]
    pad = (0, width % 2, 0, height % 2)
    return torch.nn.functional.pad(frames, pad, mode="replicate") if any(pad) else frames


def to_bytes(signal: Tensor) -> Tensor:
    """Signal in [-1, 1] -> uint8."""
    return ((signal + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
