"""A discrete SeTok (arXiv 2406.05127): a picture to a few codes, one per region, and back.

The published tokenizer keeps its region features continuous; here each is one code. Codes stand in
the raster order of their region's first patch; the decoder predicts the layout of the regions from
the codes, so the codes alone are enough. `encode` runs in float64: which patch is a centre and
which code is nearest are decided by comparisons, and in float32 the last bit of a batched product
depends on the size of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from unimm_tokenizers.codec import PADDING_CODE, Codec, CodecOutput, register_codec
from unimm_tokenizers.quantize import ResidualVectorQuantizer
from unimm_tokenizers.semantic.config import SeTokConfig
from unimm_tokenizers.semantic.detokenizer import Detokenizer
from unimm_tokenizers.semantic.encoder import RegionEncoder, RegionTokens


@register_codec("setok")
class SeTokCodec(Codec):
    """Pictures (B, C, H, W) of one size to codes (B, 1, max_regions), padded with -1."""

    config_class = SeTokConfig
    config: SeTokConfig
    modalities = ("semantic",)

    def __init__(self, config: SeTokConfig) -> None:
        super().__init__(config)
        self.encoder = RegionEncoder(config)
        self.quantizer = ResidualVectorQuantizer(
            config.codebook_dim, config.codebook_size, num_codebooks=1, cosine=True
        )
        self.detokenizer = Detokenizer(config)
        self.steps: Tensor
        self.register_buffer("steps", torch.tensor(0))  # training passes, for the warm-up

    @property
    def downsample(self) -> tuple[int, ...]:
        """(h, w) pixels per patch, the unit of which regions are made."""
        return self.config.patch, self.config.patch

    @property
    def receptive_field(self) -> tuple[int, ...]:
        """(h, w): the whole picture."""
        return self.config.image_size, self.config.image_size

    def _check(self, x: Tensor) -> None:
        self.check_signal(x, 2)
        side = self.config.image_size
        if tuple(x.shape[2:]) != (side, side):
            raise ValueError(
                f"{self.name}: takes pictures of {side} x {side} pixels, got {x.shape[2]} x "
                f"{x.shape[3]}: resize them first"
            )

    def _codebook(self) -> Tensor:
        """(codebook_size, codebook_dim)."""
        every = torch.arange(self.codebook_size, device=self.steps.device)
        return self.quantizer.lookup(every[None, None])[0].T

    def _exact_tokens(self, x: Tensor) -> RegionTokens:
        """Region tokens in float64."""
        self._check(x)
        weights = {name: value.double() for name, value in self.encoder.named_parameters()}
        return functional_call(self.encoder, weights, (x.double(),))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> int64 (B, 1, max_regions), rows of -1 after the last region.

        Raises:
            ValueError: not a signal for this codec, or not of its size.
        """
        tokens, regions = self._exact_tokens(x)
        codes = (tokens @ self._codebook().double().T).argmax(-1)
        unused = ~regions.used(self.config.max_regions)
        return codes.masked_fill(unused, PADDING_CODE)[:, None]

    @torch.no_grad()
    def explain(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> int64 (B, h, w): the place in `encode(x)` of each patch's token."""
        assignment = self._exact_tokens(x).regions.assignment
        return assignment.unflatten(1, (self.config.side, self.config.side))

    def decode(self, codes: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """(B, 1, n) -> (B, C, H, W) in [-1, 1]; any n, -1 anywhere is skipped, no code is grey."""
        self.check_codes(codes, 1)
        codes = F.pad(codes, (0, int(codes.shape[2] == 0)), value=PADDING_CODE)
        vectors = self._codebook()[codes[:, 0].clamp(min=0)]
        signal = self.detokenizer(vectors, codes[:, 0] != PADDING_CODE).signal.clamp(-1, 1)
        return signal if size is None else signal[:, :, : size[0], : size[1]]

    def forward(self, x: Tensor) -> CodecOutput:
        """See `Codec.forward`; while the quantizer warms up, codes do not exist yet: all are -1."""
        self._check(x)
        features = self.encoder.backbone(x)
        if self.training:
            self.encoder.standard.observe(features)
        tokens, regions = self.encoder.merged(features)
        used = regions.used(self.config.max_regions)
        codes = torch.full_like(used, PADDING_CODE, dtype=torch.int64)
        loss = x.new_zeros((), dtype=torch.float32)
        if self.training:
            self.steps += 1
        if not self.training or self.steps > self.config.warmup_steps:
            quantized, flat_codes, loss = self.quantizer(tokens[used].T[None])
            codes[used] = flat_codes.flatten()
            tokens = quantized.new_zeros(tokens.shape)
            tokens[used] = quantized[0].T
        painted = self.detokenizer(tokens, used, regions.assignment if self.training else None)
        layout_loss = F.cross_entropy(painted.layout.transpose(1, 2), regions.assignment)
        loss = loss + self.config.layout_weight * layout_loss
        return CodecOutput(painted.signal, x, codes[:, None], loss)
