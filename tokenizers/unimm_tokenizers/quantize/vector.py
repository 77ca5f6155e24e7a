"""Residual vector quantization (K = 1: plain VQ) with moving-average codebooks.

van den Oord et al. (arXiv 1711.00937) and SoundStream (arXiv 2107.03312, section III.C). Search and
update run in float32 with memory O(N + K d): vector-quantize-pytorch builds an N x K one-hot and an
N x K distance matrix. Each level's commitment loss reaches the latents, and the gradient of the
quantized latents passes straight through once, whatever the number of levels.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_kernels import residual_nearest_code
from unimm_tokenizers.quantize.base import Quantized, Quantizer
from unimm_tokenizers.quantize.codebooks import KeptScores, MovingCodebooks, StartPool

COMMITMENT = 0.25
POOL = 2  # vectors per code that k-means starts from


def random_levels(rows: Tensor, count: int, dropout: float) -> Tensor:
    """How many levels each row of a batch gets: int64 (B,); `dropout`: the share with fewer."""
    levels = torch.full(rows.shape[:1], count, device=rows.device)
    if dropout:
        fewer = torch.randint(1, count + 1, rows.shape[:1], device=rows.device)
        chosen = torch.rand(rows.shape[:1], device=rows.device) < dropout
        levels = torch.where(chosen, fewer, levels)
    return levels


class ResidualVectorQuantizer(Quantizer):
    """K codebooks, each on what the ones before it left over.

    The first training batches pass through unquantized (codes -1, loss 0) until there are `POOL`
    vectors per code, which k-means then starts from: one batch is too few for a large codebook.

    Args:
        dim: channels D of the latents.
        codebook_size: codes per level.
        num_codebooks: K; a smaller number, set later, uses the first levels alone.
        codebook_dim: channels in which codes live; None: D itself.
        cosine: compare on the unit sphere (LlamaGen's choice for pictures); K = 1 only.
        dropout: share of the rows of a training batch that get a random number of levels (DAC:
            0.5), which makes a ladder of bitrates; levels that are left out have code -1.
    """

    statistics = ("codebooks.counts", "codebooks.sums", "codebooks.idle")

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        codebook_dim: int | None = None,
        cosine: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if cosine and num_codebooks > 1:
            raise ValueError("cosine codes have unit length and cannot be added up: use K = 1")
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.dropout = dropout
        self.cosine = cosine
        width = codebook_dim or dim
        self.project_in = nn.Linear(dim, width) if width != dim else nn.Identity()
        self.project_out = nn.Linear(width, dim) if width != dim else nn.Identity()
        self.codebooks = MovingCodebooks(num_codebooks, codebook_size, width, cosine=cosine)
        self.started: Tensor
        self.register_buffer("started", torch.tensor(False))
        self._pool = StartPool(POOL * codebook_size)
        self._scores = KeptScores(cosine=cosine)

    def restart_statistics(self) -> None:
        """See `Quantizer.restart_statistics`."""
        self.codebooks.restart()

    def quantize(self, latents: Tensor) -> Quantized:
        """See `Quantizer.quantize`."""
        grid = latents.shape[2:]
        with torch.autocast(latents.device.type, enabled=False):
            rows = self._rows(latents)
            if self.training and not self._start(rows.detach()):
                passed = self.project_out(rows).transpose(1, 2).unflatten(2, grid)
                return self.passed_through(passed)
            quantized, codes, loss = self._code(rows)
            quantized = self.project_out(rows + (quantized - rows).detach())
        quantized = quantized.transpose(1, 2).unflatten(2, grid)
        return Quantized(quantized, codes.unflatten(2, grid), loss)

    def nearest(self, latents: Tensor) -> Tensor:
        """See `Quantizer.nearest`."""
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            codes = self._search(self._rows(latents))
        return codes.transpose(0, 1).unflatten(2, latents.shape[2:])

    def _rows(self, latents: Tensor) -> Tensor:
        """Latents (B, D, *grid) -> vectors (B, N, d) where the codes live."""
        rows = self.project_in(latents.float().flatten(2).transpose(1, 2))
        return F.normalize(rows, dim=-1) if self.cosine else rows

    def _search(self, rows: Tensor) -> Tensor:
        """(B, N, d) -> codes (K, B, N)."""
        metric = "cosine" if self.cosine else "euclidean"
        books, used = self.codebooks.codes, slice(self.num_codebooks)
        scored = self._scores.of(books, used)
        codes = residual_nearest_code(rows.flatten(0, 1), books[used], metric=metric, scored=scored)
        return codes.T.unflatten(1, rows.shape[:2])

    def _code(self, rows: Tensor) -> Quantized:
        """(B, N, d) -> sum of codes (B, N, d), codes (B, K, N), loss."""
        books, codes = self.codebooks.codes[: self.num_codebooks], self._search(rows.detach())
        # Codes as they are now: the update below moves them in place.
        vectors = [book[level] for book, level in zip(books, codes, strict=True)]
        levels = random_levels(rows, self.num_codebooks, self.dropout if self.training else 0.0)
        total, loss = torch.zeros_like(rows), rows.new_zeros(())
        for level, vector in enumerate(vectors):
            residual = rows - total
            used = (level < levels)[:, None, None]
            loss = loss + COMMITMENT * (used * (residual - vector).square()).mean()
            if self.training:
                left = residual.detach().flatten(0, 1)
                self.codebooks.update(level, left, codes[level].flatten())
            total = total + vector
        kept = torch.stack([v * (n < levels)[:, None, None] for n, v in enumerate(vectors)]).sum(0)
        dropped = torch.arange(self.num_codebooks, device=rows.device)[:, None] >= levels
        codes = codes.masked_fill(dropped[:, :, None], -1).transpose(0, 1)
        return Quantized(kept, codes, loss)

    def _start(self, rows: Tensor) -> bool:
        """Whether the codebooks have started, with these vectors or before."""
        if self.started:
            return True
        pool = self._pool.add(rows.flatten(0, 1))
        if pool is not None:
            self.codebooks.start(pool)
            self.started.fill_(True)
        return pool is not None

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`; levels with code -1 add nothing."""
        flat, grid = codes.flatten(2), codes.shape[2:]
        levels = torch.arange(flat.shape[1], device=flat.device)[:, None]
        vectors = self.codebooks.codes[levels, flat.clamp(min=0)] * (flat >= 0)[..., None]
        total, *rest = vectors.unbind(1)
        for vector in rest:  # one by one, so that no sum depends on how much is looked up
            total = total + vector
        return self.project_out(total).transpose(1, 2).unflatten(2, grid)

    def first_levels(self, count: int) -> dict[str, Tensor]:
        """See `Quantizer.first_levels`."""
        state = self.state_dict()
        return {k: v[:count] if k.startswith("codebooks.") else v for k, v in state.items()}

    def upgraded(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Quantizer.upgraded`: files of 0.1 hold one (1, K, d) tensor per level."""
        old = re.compile(r"vq\.layers\.(\d+)\._codebook\.embed")
        levels = {int(m[1]): state[name][0] for name in state if (m := old.fullmatch(name))}
        if not levels:
            return state
        new = {
            name.removeprefix("vq."): tensor
            for name, tensor in state.items()
            if not name.startswith("vq.layers.")
        }
        new["codebooks.codes"] = torch.stack([levels[level] for level in sorted(levels)])
        return new
