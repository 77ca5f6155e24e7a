"""Index backpropagation (IBQ: Shi et al., arXiv 2412.02692): the gradient reaches every code.

Forward, the best code of a softmax over all; backward, the whole softmax (straight through its
one-hot). That takes N x K numbers, so rows go through in parts that are computed again in the
backward pass: memory is O(part * K), not O(N K).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unimm_kernels import nearest_code
from unimm_tokenizers.quantize.base import Quantized, Quantizer

COMMITMENT = 0.25
PART_SCORES = 2**24  # scores held at once: 64 MiB of float32


class IndexBackpropagationQuantizer(Quantizer):
    """A learned codebook chosen from by dot product; K = 1.

    Args:
        dim: channels D of the latents.
        codebook_size: number of codes.
        codebook_dim: channels in which codes live; None: D itself.
        entropy: weight of the entropy penalty.
        temperature: of the softmax in it.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        *,
        entropy: float = 0.05,
        temperature: float = 0.01,
    ) -> None:
        super().__init__()
        self.num_codebooks = 1
        self.codebook_size = codebook_size
        self.entropy, self.temperature = entropy, temperature
        width = codebook_dim or dim
        self.project_in = nn.Linear(dim, width) if width != dim else nn.Identity()
        self.project_out = nn.Linear(width, dim) if width != dim else nn.Identity()
        self.codebook = nn.Parameter(torch.empty(codebook_size, width))
        nn.init.normal_(self.codebook, std=width**-0.5)

    def quantize(self, latents: Tensor) -> Quantized:
        """See `Quantizer.quantize`."""
        grid = latents.shape[2:]
        with torch.autocast(latents.device.type, enabled=False):
            rows = self.project_in(latents.float().flatten(2).transpose(1, 2))
            flat = rows.flatten(0, 1)
            if self.training:
                vectors, codes, loss = self._trained(flat)
            else:
                codes = self._codes(flat)
                vectors, loss = self.codebook[codes], flat.new_zeros(())
            quantized = self.project_out(vectors.view_as(rows))
        quantized = quantized.transpose(1, 2).unflatten(2, grid)
        return Quantized(quantized, codes.view(rows.shape[:2])[:, None].unflatten(2, grid), loss)

    def _codes(self, rows: Tensor) -> Tensor:
        """argmax of x.c, as the nearest of the codes with a channel that makes lengths equal.

        |x|^2 - 2 x.c + |c|^2 orders by x.c once all |c| are equal; the channel that x lacks (0)
        holds sqrt(max |c|^2 - |c|^2).
        """
        book = self.codebook.detach()
        length = book.square().sum(-1)
        missing = (length.max() - length).sqrt()
        return nearest_code(
            F.pad(rows.detach(), (0, 1)), torch.cat([book, missing[:, None]], dim=1)
        )

    def _trained(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (N, d) with gradients to all codes, codes (N,), loss."""
        part = max(1, PART_SCORES // self.codebook_size)
        made = [checkpoint(self._part, x, use_reentrant=False) for x in rows.split(part)]
        vectors, codes, own, mean = (list(column) for column in zip(*made, strict=True))
        quantized = torch.cat(vectors)
        # The paper's double quantization loss: the soft choice and the latents, each to the other.
        loss = (
            F.mse_loss(quantized, rows)
            + F.mse_loss(quantized.detach(), rows)
            + COMMITMENT * F.mse_loss(quantized, rows.detach())
        )
        average = torch.stack(mean).sum(0) / len(rows)
        spread = -(average * average.clamp(min=1e-9).log()).sum()
        penalty = torch.stack(own).sum() / len(rows) - spread
        return quantized, torch.cat(codes), loss + self.entropy * penalty

    def _part(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Vectors, codes, sum of entropies, sum of soft choices (K,) of some rows."""
        scores = rows @ self.codebook.T
        soft = scores.softmax(-1)
        codes = scores.argmax(-1)
        hard = F.one_hot(codes, self.codebook_size).to(soft.dtype)
        vectors = (hard + soft - soft.detach()) @ self.codebook
        sharp = (scores / self.temperature).log_softmax(-1)
        entropy = -(sharp.exp() * sharp).sum()
        return vectors, codes, entropy, sharp.exp().sum(0)

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`."""
        vectors = self.project_out(self.codebook[codes.flatten(1)])
        return vectors.transpose(1, 2).unflatten(2, codes.shape[2:])
