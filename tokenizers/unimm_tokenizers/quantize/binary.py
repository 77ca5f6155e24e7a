"""Codes that are the signs of a few channels: LFQ and BSQ, up to 2^18 codes and no codebook.

LFQ: MAGVIT-v2 (Yu et al., arXiv 2310.05737, section 3.1); BSQ: Zhao et al. (arXiv 2406.07548),
which first brings latents to the unit sphere. The entropy penalty asks each vector to choose surely
and all vectors together to choose evenly. Over sign codes the softmax of scores 2 x.c / temperature
is a product of one Bernoulli distribution per channel: its entropy is a sum over channels, exact
and without the N x K softmax (10.7 GB of float32 for 10,240 vectors and 2^18 codes).
The entropy of the mean does not split up so; BSQ's equation 8 bounds it by the same sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.quantize.base import Quantized, Quantizer

COMMITMENT = 0.25


class BinaryQuantizer(Quantizer):
    """Signs of `bits` channels; K = 1.

    Args:
        dim: channels D of the latents.
        bits: the codebook has 2^bits codes.
        spherical: BSQ; otherwise LFQ.
        entropy: weight of the entropy penalty (Open-MAGVIT2: 0.1).
        temperature: of the softmax in it.

    Raises:
        ValueError: bits is not in 1 to 24.
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        *,
        spherical: bool = False,
        entropy: float = 0.1,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not 1 <= bits <= 24:
            raise ValueError(f"binary codes need 1 to 24 bits, got {bits}")
        self.num_codebooks = 1
        self.codebook_size = 2**bits
        self.bits, self.spherical = bits, spherical
        self.entropy, self.temperature = entropy, temperature
        self.project_in = nn.Linear(dim, bits) if bits != dim else nn.Identity()
        self.project_out = nn.Linear(bits, dim) if bits != dim else nn.Identity()

    @property
    def _size(self) -> float:
        """Magnitude of a channel of a code."""
        return self.bits**-0.5 if self.spherical else 1.0

    def quantize(self, latents: Tensor) -> Quantized:
        """See `Quantizer.quantize`."""
        grid = latents.shape[2:]
        with torch.autocast(latents.device.type, enabled=False):
            rows = self.project_in(latents.float().flatten(2).transpose(1, 2))
            rows = F.normalize(rows, dim=-1) if self.spherical else rows
            up = rows > 0
            vectors = torch.where(up, self._size, -self._size)
            codes = (up.long() << torch.arange(self.bits, device=rows.device)).sum(-1)
            loss = COMMITMENT * F.mse_loss(rows, vectors) + self.entropy * self._penalty(rows)
            quantized = self.project_out(rows + (vectors - rows).detach())
        quantized = quantized.transpose(1, 2).unflatten(2, grid)
        return Quantized(quantized, codes[:, None].unflatten(2, grid), loss)

    def _penalty(self, rows: Tensor) -> Tensor:
        """Mean entropy of each vector's choice minus that of the mean choice, in nats."""
        # The two codes of a channel differ by 2 * size, the scores 2 x.c by 4 * size * x.
        logits = 4 * self._size * rows / self.temperature
        mean = logits.sigmoid().mean((0, 1))
        return _bernoulli_entropy(logits.sigmoid()).sum(-1).mean() - _bernoulli_entropy(mean).sum()

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`."""
        bits = (codes.flatten(1)[..., None] >> torch.arange(self.bits, device=codes.device)) & 1
        vectors = self.project_out((2.0 * bits - 1.0) * self._size)
        return vectors.transpose(1, 2).unflatten(2, codes.shape[2:])


def _bernoulli_entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())
