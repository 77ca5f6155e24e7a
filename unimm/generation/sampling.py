"""From logits to ids: temperature, top-k, top-p; one uniform number per row and step.

A row's numbers come from its own seed alone, so what it samples does not depend on the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How ids are drawn.

    temperature: 0 takes the most likely id. top_k: keep the k most likely. top_p: keep the most
    likely ones that together reach this probability. guidance: classifier-free guidance scale,
    1 is off (Ho and Salimans, arXiv 2207.12598).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # nor what is no number
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")


def guided(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Logits (B, V) pushed away from the unconditional ones by `scale`."""
    return unconditional + scale * (conditional - unconditional)


def sample(logits: Tensor, allowed: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draw one id per row.

    Args:
        logits: float (B, V).
        allowed: bool (B, V), at least one per row.
        uniform: (B,) in [0, 1), the rows' random numbers.
        sampling: how to draw.

    Returns:
        int64 (B,).
    """
    logits = logits.float().masked_fill(~allowed, float("-inf"))
    if sampling.temperature == 0:
        return logits.argmax(1)
    logits = (logits - logits.amax(1, keepdim=True)).double()  # 0 at most: no overflow below
    probabilities = (logits / sampling.temperature).softmax(1)
    if sampling.top_k is None and sampling.top_p is None:
        return _inverse_cdf(probabilities, uniform)
    count = min(sampling.top_k or logits.shape[1], logits.shape[1])
    kept, ids = probabilities.topk(count, dim=1)
    if sampling.top_p is not None:
        before = kept.cumsum(1) - kept
        kept = torch.where(before < sampling.top_p, kept, 0.0)
    return ids.gather(1, _inverse_cdf(kept, uniform)[:, None])[:, 0]


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index whose share of the cumulated weights (B, n) holds `uniform` (B,)."""
    cumulated = weights.cumsum(1)
    mark = uniform.double()[:, None] * cumulated[:, -1:]
    index = torch.searchsorted(cumulated, mark, right=True)[:, 0]
    # Rounding can put the mark past the last id of positive weight: take that one then.
    last = weights.shape[1] - 1 - (weights.flip(1) > 0).long().argmax(1)
    return torch.minimum(index, last)
