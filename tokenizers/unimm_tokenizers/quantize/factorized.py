"""Residual quantization in a few channels per level, compared by angle.

After DAC (Kumar et al., arXiv 2306.06546, section 3.2): each level projects what is left over into
8 channels, finds the code of the nearest direction, and projects that code back. Codes are moving
averages with the revival of `codebooks` instead of DAC's gradients. What earlier levels coded is
detached, and one straight-through gradient passes the whole sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unimm_kernels import nearest_code
from unimm_tokenizers.quantize.base import Quantized, Quantizer
from unimm_tokenizers.quantize.codebooks import KeptScores, MovingCodebooks, StartPool
from unimm_tokenizers.quantize.vector import COMMITMENT, POOL, random_levels


class _Level(nn.Module):
    """One codebook of K codes in d channels between two projections."""

    def __init__(self, dim: int, size: int, width: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(dim, width)
        self.project_out = nn.Linear(width, dim)
        self.book = MovingCodebooks(1, size, width)
        self._scores = KeptScores(cosine=True)

    def nearest(self, x: Tensor) -> Tensor:
        """Rows (N, d) -> int64 (N,)."""
        scored = self._scores.of(self.book.codes, 0)
        return nearest_code(x, self.book.codes[0], metric="cosine", scored=scored)

    def decode(self, codes: Tensor) -> Tensor:
        """int64 (...) -> (..., D)."""
        return self.project_out(self.book.codes[0][codes])


class FactorizedResidualQuantizer(Quantizer):
    """Latents (B, D, *grid) <-> codes (B, K, *grid).

    As in `ResidualVectorQuantizer`, the first training batches pass through until there are enough
    vectors for k-means.

    Args:
        dim: channels D of the latents.
        codebook_size: codes per level.
        num_codebooks: K; a smaller number, set later, uses the first levels alone.
        codebook_dim: channels in which codes live.
        dropout: share of the rows of a training batch that get a random number of levels; those
            that are left out have code -1.
    """

    statistics = ("book.counts", "book.sums", "book.idle")

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        codebook_dim: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.dropout = dropout
        self.levels = nn.ModuleList(
            _Level(dim, codebook_size, codebook_dim) for _ in range(num_codebooks)
        )
        self.started: Tensor
        self.register_buffer("started", torch.tensor(False))
        self._pool = StartPool(POOL * codebook_size)

    def _used(self) -> list[_Level]:
        return [level for level in self.levels[: self.num_codebooks] if isinstance(level, _Level)]

    def restart_statistics(self) -> None:
        """See `Quantizer.restart_statistics`."""
        for level in self._used():
            level.book.restart()

    def quantize(self, latents: Tensor) -> Quantized:
        """See `Quantizer.quantize`."""
        grid = latents.shape[2:]
        with torch.autocast(latents.device.type, enabled=False):
            rows = latents.float().flatten(2).transpose(1, 2)
            if self.training and not self._start(rows.detach()):
                return self.passed_through(latents)
            total, codes, loss = self._code(rows)
        quantized = total + (rows - rows.detach())
        quantized = quantized.transpose(1, 2).unflatten(2, grid)
        return Quantized(quantized, codes.unflatten(2, grid), loss)

    def _code(self, rows: Tensor) -> Quantized:
        """(B, N, D) -> sum of codes (B, N, D), codes (B, K, N), loss."""
        used = random_levels(rows, self.num_codebooks, self.dropout if self.training else 0.0)
        total, loss = torch.zeros_like(rows), rows.new_zeros(())
        chosen: list[Tensor] = []
        coded = torch.zeros_like(rows)  # by all levels so far, also those that a row goes without
        for number, level in enumerate(self._used()):
            kept = (number < used)[:, None, None]
            left = rows - coded.detach()
            inner = level.project_in(left)
            codes = level.nearest(inner.detach().flatten(0, 1))
            vectors = level.book.codes[0][codes].view(inner.shape)
            loss = loss + COMMITMENT * (kept * (inner - vectors).square()).mean()
            if self.training:
                level.book.update(0, inner.detach().flatten(0, 1), codes)
            # The projections learn what to keep from the sound, the encoder from the outer gradient
            # alone. Of the commitment alone `project_in` learns to give out nothing.
            own = level.project_in(left.detach())
            part = level.project_out(own + (vectors - own).detach())
            # Each level explains what it can, so that the first ones are a codec of their own.
            loss = loss + (kept * (left.detach() - part).square()).mean() / self.num_codebooks
            coded = coded + part
            total = total + part * kept
            chosen.append(codes.view(rows.shape[:2]).masked_fill(~kept[..., 0], -1))
        return Quantized(total, torch.stack(chosen, dim=1), loss)

    @torch.no_grad()
    def _start(self, rows: Tensor) -> bool:
        """Whether the codebooks have started, with these vectors or before."""
        if self.started:
            return True
        left = self._pool.add(rows.flatten(0, 1))
        if left is None:
            return False
        for level in self._used():
            inner = level.project_in(left)
            level.book.start(inner)
            # The projection back begins as the least-squares answer to the one before the codes.
            codes = level.book.codes[0][level.nearest(inner)]
            ones = torch.cat([codes, codes.new_ones(len(codes), 1)], dim=1)
            fitted = torch.linalg.lstsq(ones, left).solution
            level.project_out.weight.copy_(fitted[:-1].T)
            level.project_out.bias.copy_(fitted[-1])
            left = left - level.project_out(codes)
        self.started.fill_(True)
        return True

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`; levels with code -1 add nothing."""
        flat, grid = codes.flatten(2), codes.shape[2:]
        parts = [
            level.decode(own.clamp(min=0)) * (own >= 0)[..., None]
            for level, own in zip(self._used(), flat.unbind(1), strict=False)
        ]
        return torch.stack(parts).sum(0).transpose(1, 2).unflatten(2, grid)

    def first_levels(self, count: int) -> dict[str, Tensor]:
        """See `Quantizer.first_levels`."""
        left_out = tuple(f"levels.{number}." for number in range(count, len(self.levels)))
        return {k: v for k, v in self.state_dict().items() if not k.startswith(left_out)}
