"""What every adapter of another library's tokenizer shares.

An adapter states shapes and calls the other library; checks, padding to whole codes, cropping and
files are done here. It is a `Codec`: it can be benchmarked, saved into a bundle, and given to a
`UnifiedTokenizer` to write a model's training data. Training the codec itself stays with the
library that it came from.
"""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from unimm_tokenizers.codec import Codec, CodecOutput
from unimm_tokenizers.quantize import Quantized, Quantizer


class ForeignQuantizer(Quantizer):
    """Number and size of the codes of a model whose quantizer lives in the model itself."""

    def __init__(self, num_codebooks: int, codebook_size: int) -> None:
        super().__init__()
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size

    def quantize(self, latents: Tensor) -> Quantized:
        """Refused: latents of another library have a form of their own."""
        return self._refuse()

    def lookup(self, codes: Tensor) -> Tensor:
        """Refused, likewise."""
        return self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError("an adapted codec quantizes inside its own model: call encode and decode")


class AdaptedCodec(Codec):
    """Base of adapters: `code` and `sound_out` work on whole codes, this class does the rest."""

    @property
    @abstractmethod
    def downsample(self) -> tuple[int, ...]:
        """Signal units per code on each grid axis; (t, h, w) of a codec of pictures and film."""

    @property
    def receptive_field(self) -> tuple[int, ...]:
        """Unknown of a foreign model: a whole signal, as attention and recurrence make it."""
        return tuple(2**31 for _ in self.downsample)

    @abstractmethod
    def to_codes(self, x: Tensor) -> Tensor:
        """Checked signal of whole codes (B, C, *signal) -> codes (B, K, *grid)."""

    @abstractmethod
    def to_signal(self, codes: Tensor) -> Tensor:
        """Checked codes (B, K, *grid) -> signal (B, C, *signal)."""

    def _axes(self, shape: tuple[int, ...]) -> int:
        """Signal axes of (B, C, *signal) or (B, K, *grid): film is told from pictures by them."""
        film = "video" in self.modalities and len(shape) == 5
        return 3 if film else 1 if self.modality == "audio" else 2

    def _whole_frames(self, frames: int) -> int:
        """Frames to add, so that a film of `frames` has whole codes."""
        return -frames % self.downsample[0]

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Signal (B, C, *signal) in [-1, 1] -> int64 (B, K, *grid), padded to whole codes.

        Sound is padded with silence, pictures and films with their last row, column and frame.

        Raises:
            ValueError: not a signal for this codec.
        """
        axes = self._axes(tuple(x.shape))
        x = self.check_signal(x, axes)
        if axes == 1:
            return self.to_codes(F.pad(x, (0, -x.shape[-1] % self.downsample[-1]))).long()
        missing = [-n % d for n, d in zip(x.shape[-2:], self.downsample[-2:], strict=True)]
        extra = (0, missing[1], 0, missing[0])
        if axes == 3:
            extra = (*extra, 0, self._whole_frames(x.shape[2]))
        return self.to_codes(F.pad(x, extra, mode="replicate") if any(extra) else x).long()

    @torch.no_grad()
    def decode(self, codes: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """Codes (B, K, *grid) -> signal in [-1, 1], cropped to `size`.

        A model that gives back fewer samples than it took (DAC's odd strides) gets silence added.

        Raises:
            ValueError: not codes of this codec, or `size` is larger than they can hold.
        """
        axes = self._axes(tuple(codes.shape))
        self.check_codes(codes, axes)
        signal = self.to_signal(codes).clamp(-1, 1)
        if size is None:
            return signal
        if axes == 1 and size[0] <= codes.shape[-1] * self.downsample[-1]:
            signal = F.pad(signal, (0, max(0, size[0] - signal.shape[-1])))
        if any(n > m for n, m in zip(size, signal.shape[2:], strict=True)):
            raise ValueError(
                f"{self.name}: {codes.shape[2:].numel()} codes hold "
                f"{prod(signal.shape[2:])} values, not {size}"
            )
        return signal[(..., *(slice(0, n) for n in size))]

    def forward(self, x: Tensor) -> CodecOutput:
        """One pass without gradients: an adapted codec is not trained here."""
        codes = self.encode(x)
        return CodecOutput(self.decode(codes, tuple(x.shape[2:])), x, codes, x.new_zeros(()))
