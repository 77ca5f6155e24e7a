"""Codebooks that follow the vectors they code: moving averages, k-means start, revival.

Averages after van den Oord et al. (arXiv 1711.00937, appendix A.1), over a window of so many
vectors per code: a fixed decay makes each of 16,384 codes the noisy mean of the last four vectors
where a batch brings one for eight codes. The sums are kept, not the means, so that a code that is
set anew is set in all places: EnCodec's revival writes the code alone, and the next update
overwrites it from stale sums. A code is dead when 32 K vectors in a row did not choose it: one that
is chosen as often as the mean never is, one chosen a tenth as often in 4% of such rows (e^-3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_kernels import ScoredCodes, code_sums, nearest_code, scored_codes
from unimm_tokenizers.ranks import (
    from_first_rank,
    gather_rows,
    least_over_ranks,
    sum_over_ranks,
    world_size,
)

WINDOW = 16  # vectors per code that the averages reach back
FASTEST = 0.97  # decay at least, however large the batch
IDLE = 32  # vectors per code after which a code that none of them chose is dead
CANDIDATES = 1024  # vectors that may replace dead codes in one step, fixed for all ranks
KMEANS_ROUNDS = 10


class StartPool:
    """Vectors of the first training batches: one batch is too few to start a large codebook from.

    Args:
        size: vectors that are wanted, from all ranks together.
    """

    def __init__(self, size: int) -> None:
        self.share = -(-size // world_size())
        self.parts: list[Tensor] = []

    def add(self, rows: Tensor) -> Tensor | None:
        """Keep vectors (n, d); all that were kept, once every rank has its share."""
        have = sum(len(part) for part in self.parts)
        self.parts.append(rows[: self.share - have])
        if least_over_ranks(have + len(self.parts[-1]), rows.device) < self.share:
            return None
        pool, self.parts = torch.cat(self.parts), []
        return pool


class KeptScores:
    """`scored_codes` of codes that rarely change: they cost a stream's search more than itself.

    Args:
        cosine: codes are compared by angle.
    """

    def __init__(self, *, cosine: bool) -> None:
        self.cosine = cosine
        self._made: tuple[Tensor, int, ScoredCodes] | None = None

    def of(self, codes: Tensor, part: int | slice) -> ScoredCodes | None:
        """Those of codes[part], made again for another tensor (..., K, d) and for changed values.

        None where a search makes its own: in Triton, and what is compiled.
        """
        if codes.is_cuda or codes.is_inference() or torch.compiler.is_compiling():
            return None
        # What writes into a tensor counts its version up, in all views of it; `.data` does not.
        if self._made is None or self._made[0] is not codes or self._made[1] != codes._version:
            self._made = codes, codes._version, scored_codes(codes, self.cosine)
        scored, bias = self._made[2]
        return ScoredCodes(scored[part], bias[part])


class MovingCodebooks(nn.Module):
    """L codebooks of K codes in d channels.

    Args:
        levels: L.
        size: K.
        dim: d.
        cosine: codes have unit length, and so have the vectors that come.
    """

    def __init__(self, levels: int, size: int, dim: int, *, cosine: bool = False) -> None:
        super().__init__()
        self.cosine = cosine
        self.codes: Tensor
        self.counts: Tensor
        self.idle: Tensor
        self.sums: Tensor
        # Random codes, so that an untrained codec has a full codebook.
        start = torch.randn(levels, size, dim)
        self.register_buffer("codes", F.normalize(start, dim=-1) if cosine else start)
        self.register_buffer("counts", torch.ones(levels, size))
        self.register_buffer("sums", self.codes.clone())
        self.register_buffer("idle", torch.zeros(levels, size))  # vectors since the last choice

    def restart(self) -> None:
        """Set the statistics to what they would be had each code been used once."""
        self.counts.fill_(1.0)
        self.idle.zero_()
        self.sums.copy_(self.codes)

    @torch.no_grad()
    def start(self, pool: Tensor) -> None:
        """k-means on vectors (n, d), level by level on what is left; the same on every rank."""
        residual = gather_rows(pool)
        generator = torch.Generator().manual_seed(0)
        for level in range(len(self.codes)):
            codes = self._kmeans(residual, generator)
            self.codes[level] = from_first_rank(codes)
            residual = residual - codes[nearest_code(residual, codes)]
        self.restart()

    def _kmeans(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Codes (K, d) by Lloyd's rounds from a random choice of vectors."""
        size = self.codes.shape[1]
        chosen = torch.randperm(len(x), generator=generator)[:size]
        if len(x) < size:  # too few vectors: some are taken more than once
            chosen = torch.randint(len(x), (size,), generator=generator)
        codes = x[chosen.to(x.device)].clone()
        for _ in range(KMEANS_ROUNDS):
            counts, sums = code_sums(x, nearest_code(x, codes), size)
            codes = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codes)
            codes = F.normalize(codes, dim=-1) if self.cosine else codes
        return codes

    @torch.no_grad()
    def update(self, level: int, x: Tensor, chosen: Tensor) -> None:
        """Move one level towards the vectors (n, d) that chose its codes (n,)."""
        book, count, total = self.codes[level], self.counts[level], self.sums[level]
        idle = self.idle[level]
        size, arrived = len(book), len(x) * world_size()
        counts, sums = code_sums(x, chosen, size)
        both = sum_over_ranks(torch.cat([counts[:, None], sums], dim=1))
        decay = max(FASTEST, 1 - arrived / (WINDOW * size))
        count.mul_(decay).add_(both[:, 0], alpha=1 - decay)
        total.mul_(decay).add_(both[:, 1:], alpha=1 - decay)
        idle.add_(arrived).mul_(both[:, 0] == 0)
        self._revive(level, x)
        moved = total / count.clamp(min=1e-8)[:, None]
        book.copy_(F.normalize(moved, dim=-1) if self.cosine else moved)

    def _revive(self, level: int, x: Tensor) -> None:
        """Set dead codes on vectors of this batch, as if used as often as the mean.

        No host waits: the n-th dead code takes the n-th candidate, and codes beyond the candidates
        wait for the next step. Candidates are rank 0's, so that all ranks revive alike.
        """
        count, total, idle = self.counts[level], self.sums[level], self.idle[level]
        dead = idle > IDLE * len(idle)
        place = dead.cumsum(0) - 1
        drawn = torch.randint(len(x), (CANDIDATES,), device=x.device)
        candidates = from_first_rank(x[drawn].float().contiguous())
        taken = dead & (place < CANDIDATES)
        fresh = candidates[place.clamp(0, CANDIDATES - 1)]
        mean = count.mean()
        total.copy_(torch.where(taken[:, None], fresh * mean, total))
        count.copy_(torch.where(taken, mean, count))
        idle.mul_(~taken)
