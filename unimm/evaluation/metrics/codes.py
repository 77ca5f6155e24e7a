"""What codes cost: bits at fixed length, usage, and rates."""

from __future__ import annotations

from math import log2

import torch
from torch import Tensor

from unimm_tokenizers.quantize.base import CodeUsage, code_usage


def code_bits(codes: Tensor, codebook_size: int) -> Tensor:
    """Bits of each sample's codes (B, K, *grid) at fixed length; padding (negative) is free."""
    return (codes >= 0).flatten(1).sum(dim=1).double() * log2(codebook_size)


def bits_per_pixel(bits: Tensor, signal: Tensor) -> Tensor:
    """Bits (B,) over the pixels of pictures or film (B, C, *signal)."""
    return bits / signal[0, 0].numel()


def kilobits_per_second(bits: Tensor, signal: Tensor, sample_rate: int) -> Tensor:
    """Bits (B,) over the duration of sounds (B, C, T), in kbit/s."""
    return bits / 1000 / (signal.shape[-1] / sample_rate)


def usage(codes: list[Tensor], codebook_size: int) -> CodeUsage:
    """Usage, perplexity and entropy per level (K,), over the codes (B, K, *grid) of all samples."""
    flat = torch.cat([code.movedim(1, 0).flatten(1) for code in codes], dim=1)
    return code_usage(flat[None], codebook_size)
