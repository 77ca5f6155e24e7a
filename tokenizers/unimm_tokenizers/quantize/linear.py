"""SimVQ (Zhu et al., arXiv 2411.02038): a frozen random codebook, and one linear map that moves it.

Every update of the map moves all codes, so none is left behind. Nearest codes are found without the
N x K matrix, by `unimm_kernels.nearest_code`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_kernels import nearest_code
from unimm_tokenizers.quantize.base import Quantized, Quantizer

COMMITMENT = 0.25


class SimVectorQuantizer(Quantizer):
    """Codes W c_j of a frozen codebook c; K = 1.

    Args:
        dim: channels D of the latents.
        codebook_size: number of codes.
        codebook_dim: channels in which codes live; None: D itself.
    """

    def __init__(self, dim: int, codebook_size: int, codebook_dim: int | None = None) -> None:
        super().__init__()
        self.num_codebooks = 1
        self.codebook_size = codebook_size
        width = codebook_dim or dim
        self.project_in = nn.Linear(dim, width) if width != dim else nn.Identity()
        self.project_out = nn.Linear(width, dim) if width != dim else nn.Identity()
        self.frozen: Tensor
        self.register_buffer("frozen", torch.randn(codebook_size, width) * width**-0.5)
        self.turn = nn.Linear(width, width, bias=False)

    def quantize(self, latents: Tensor) -> Quantized:
        """See `Quantizer.quantize`."""
        grid = latents.shape[2:]
        with torch.autocast(latents.device.type, enabled=False):
            rows = self.project_in(latents.float().flatten(2).transpose(1, 2))
            book = self.turn(self.frozen)
            codes = nearest_code(rows.detach().flatten(0, 1), book.detach())
            codes = codes.view(rows.shape[:2])
            vectors = self.turn(self.frozen[codes])
            loss = F.mse_loss(vectors, rows.detach()) + COMMITMENT * F.mse_loss(
                rows, vectors.detach()
            )
            quantized = self.project_out(rows + (vectors - rows).detach())
        quantized = quantized.transpose(1, 2).unflatten(2, grid)
        return Quantized(quantized, codes[:, None].unflatten(2, grid), loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`."""
        vectors = self.project_out(self.turn(self.frozen[codes.flatten(1)]))
        return vectors.transpose(1, 2).unflatten(2, codes.shape[2:])
