"""The signature that every quantizer has, and the figures that every quantizer reports."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Quantized(NamedTuple):
    """quantized: (B, D, *grid), straight-through; codes: int64 (B, K, *grid); loss: scalar."""

    quantized: Tensor
    codes: Tensor
    loss: Tensor


class CodeUsage(NamedTuple):
    """Per level (K,): share of codes used, perplexity, entropy in bits per code."""

    usage: Tensor
    perplexity: Tensor
    entropy: Tensor


class Quantizer(nn.Module, ABC):
    """Latents (B, D, *grid) to codes and back.

    While `warming_up` is set, training passes latents through as they are (codes -1, loss 0): an
    auto-encoder that has found what matters gives k-means a better start than a random one.
    """

    num_codebooks: int
    codebook_size: int
    warming_up: bool = False
    statistics: tuple[str, ...] = ()  # endings of the names of buffers that only training needs

    def restart_statistics(self) -> None:
        """Set the statistics to what they would be had each code been used once."""

    def first_levels(self, count: int) -> dict[str, Tensor]:
        """State of a quantizer that has only the first `count` of these levels.

        Raises:
            ValueError: this kind has no levels that could be left out.
        """
        raise ValueError(f"{type(self).__name__} has no levels to leave out")

    def upgraded(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """This quantizer's stored tensors under the names that they have today."""
        return state

    def forward(self, latents: Tensor) -> Quantized:
        """Quantize, in float32 whatever the autocast type; updates codebooks while training."""
        if self.training and self.warming_up:
            return self.passed_through(latents)
        return self.quantize(latents)

    def passed_through(self, latents: Tensor) -> Quantized:
        """Latents (B, D, *grid) as they are, in float32, with codes -1 and no loss."""
        shape = (len(latents), self.num_codebooks, *latents.shape[2:])
        codes = torch.full(shape, -1, dtype=torch.int64, device=latents.device)
        return Quantized(latents.float(), codes, latents.new_zeros((), dtype=torch.float32))

    @abstractmethod
    def quantize(self, latents: Tensor) -> Quantized:
        """`forward` without the warm-up."""

    def nearest(self, latents: Tensor) -> Tensor:
        """Codes (B, K, *grid) alone, for use and not for training."""
        return self(latents).codes

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, K, *grid) -> quantized latents (B, D, *grid)."""


def code_usage(codes: Tensor, codebook_size: int) -> CodeUsage:
    """Usage figures of codes (B, K, *grid); negative codes (padding) are left out."""
    counts = [
        torch.bincount(level[level >= 0].flatten(), minlength=codebook_size)
        for level in codes.movedim(1, 0)
    ]
    return usage_of_counts(torch.stack(counts))


def usage_of_counts(counts: Tensor) -> CodeUsage:
    """Usage figures of how often each code was chosen: (K, codebook_size)."""
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    nats = -(share * share.clamp(min=1e-12).log()).sum(1)
    usage = (counts > 0).double().mean(1)
    return CodeUsage(usage.float(), nats.exp().float(), (nats / math.log(2)).float())
