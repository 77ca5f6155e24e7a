"""Finite scalar quantization (Mentzer et al., arXiv 2309.15505), by `vector-quantize-pytorch`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unimm_tokenizers.quantize.base import Quantized, Quantizer


class FiniteScalarQuantizer(Quantizer):
    """Rounds a few channels to a few levels each; nothing to learn, nothing to collapse.

    Args:
        dim: channels D of the latents.
        levels: levels per channel; their product is the codebook size. The paper's advice:
            (8, 6, 5) for 240 codes, (8, 5, 5, 5) for 1,000, (7, 5, 5, 5, 5) for 4,375.

    Raises:
        ValueError: a level below 3, which has no middle to round to.
    """

    def __init__(self, dim: int, levels: tuple[int, ...]) -> None:
        # Late: with it come sympy and torch.compile's front end, half of the library's import time.
        from vector_quantize_pytorch import FSQ

        super().__init__()
        if not levels or min(levels) < 3:
            raise ValueError(f"finite scalar levels must each be 3 or more, got {levels}")
        self.num_codebooks = 1
        self.codebook_size = math.prod(levels)
        self.fsq = FSQ(levels=list(levels), dim=dim)

    def quantize(self, latents: Tensor) -> Quantized:
        """See `Quantizer.quantize`; the loss is zero."""
        grid = latents.shape[2:]
        with torch.autocast(latents.device.type, enabled=False):
            quantized, codes = self.fsq(latents.float().flatten(2).transpose(1, 2))
        quantized = quantized.transpose(1, 2).unflatten(2, grid)
        codes = codes.long()[:, None].unflatten(2, grid)
        return Quantized(quantized, codes, latents.new_zeros((), dtype=torch.float32))

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`."""
        grid = codes.shape[2:]
        # FSQ's own way back makes float32 of integers, whatever its projection's dtype is.
        levels, basis = self.fsq.get_buffer("_levels"), self.fsq.get_buffer("_basis")
        digits, middle = codes.flatten(1)[..., None] // basis % levels, levels // 2
        project = self.fsq.project_out
        dtype = next((p.dtype for p in project.parameters()), torch.float32)
        quantized = project(((digits - middle) / middle).to(dtype))
        return quantized.transpose(1, 2).unflatten(2, grid)
