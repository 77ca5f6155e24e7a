"""Which codes are used, counted over many batches: one batch cannot show more codes than it has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unimm_tokenizers.quantize.base import CodeUsage, usage_of_counts
from unimm_tokenizers.ranks import sum_over_ranks


class UsageCounter(nn.Module):
    """Counts of every code of every level.

    Args:
        num_codebooks: K.
        codebook_size: codes per level.
    """

    def __init__(self, num_codebooks: int, codebook_size: int) -> None:
        super().__init__()
        self.counts: Tensor
        counts = torch.zeros(num_codebooks, codebook_size, dtype=torch.int64)
        self.register_buffer("counts", counts, persistent=False)

    @torch.no_grad()
    def update(self, codes: Tensor) -> None:
        """Count codes (B, K, *grid); negative ones are left out."""
        for level, count in zip(codes.movedim(1, 0), self.counts, strict=True):
            used = level[level >= 0].flatten()
            count += torch.bincount(used, minlength=len(count))

    @torch.no_grad()
    def finish(self) -> CodeUsage:
        """Figures over all ranks; counting begins anew."""
        counts = sum_over_ranks(self.counts.clone())
        self.counts.zero_()
        return usage_of_counts(counts)
