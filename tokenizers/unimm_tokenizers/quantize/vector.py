"""Residual vector quantization (K = 1: plain VQ), by `vector-quantize-pytorch`.

EMA codebooks (van den Oord et al., arXiv 1711.00937, appendix A.1), k-means start and revival of
dead codes (SoundStream, arXiv 2107.03312, section III.C). Search and update run in float32. The
library passes the gradient straight through every level, so K levels give the encoder K times it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vector_quantize_pytorch import ResidualVQ

from unimm_tokenizers.quantize.base import Quantized, Quantizer


class ResidualVectorQuantizer(Quantizer):
    """K codebooks, each on what the ones before it left over.

    Args:
        dim: channels D of the latents.
        codebook_size: codes per level.
        num_codebooks: K.
        codebook_dim: channels in which codes live; None: D itself.
        cosine: compare on the unit sphere (LlamaGen's choice for pictures); K = 1 only.
        dropout: while training, use a random number of levels (bitrate ladder).
    """

    statistics = ("_codebook.cluster_size", "_codebook.embed_avg")

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        codebook_dim: int | None = None,
        cosine: bool = False,
        dropout: bool = False,
    ) -> None:
        super().__init__()
        if cosine and num_codebooks > 1:
            raise ValueError("cosine codes have unit length and cannot be added up: use K = 1")
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.started: Tensor
        self.vq = ResidualVQ(
            dim=dim,
            num_quantizers=num_codebooks,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            quantize_dropout=dropout,
            use_cosine_sim=cosine,
            decay=0.97,
            kmeans_init=True,
            kmeans_iters=10,
            # A higher threshold churns codes when a batch brings about one vector per code.
            threshold_ema_dead_code=0.5,
            commitment_weight=0.25,
            rotation_trick=False,
        )
        # Random codes until training starts, so that an untrained codec has a full codebook; the
        # first training batch then starts k-means (the library would also start it in eval mode).
        self.register_buffer("started", torch.tensor(False))
        for codebook in self._codebooks:
            start = torch.randn_like(codebook.embed)
            codebook.embed.copy_(F.normalize(start, dim=-1) if cosine else start)
            codebook.initted.fill_(True)

    @property
    def _codebooks(self) -> list[Any]:
        """The library's codebook of each level."""
        layers: Any = self.vq.layers
        return [layer._codebook for layer in layers]

    def restart_statistics(self) -> None:
        """See `Quantizer.restart_statistics`."""
        for codebook in self._codebooks:
            codebook.cluster_size.fill_(1.0)
            codebook.embed_avg.copy_(codebook.embed)

    def quantize(self, latents: Tensor) -> Quantized:
        """See `Quantizer.quantize`."""
        if self.training and not self.started:
            self.started.fill_(True)
            for codebook in self._codebooks:
                codebook.initted.fill_(False)
        grid = latents.shape[2:]
        flat = latents.float().flatten(2).transpose(1, 2)
        with torch.autocast(latents.device.type, enabled=False):
            quantized, codes, loss = self.vq(flat)[:3]
        quantized = quantized.transpose(1, 2).unflatten(2, grid)
        return Quantized(quantized, codes.transpose(1, 2).unflatten(2, grid), loss.sum())

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`."""
        grid = codes.shape[2:]
        quantized = self.vq.get_output_from_indices(codes.flatten(2).transpose(1, 2))
        return quantized.transpose(1, 2).unflatten(2, grid)
