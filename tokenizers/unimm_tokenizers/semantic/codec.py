"""Semantic codecs: a picture to a varying number of codes, and back from the codes alone.

`SemanticCodec` is what they share; `SeTokCodec` is a discrete SeTok (arXiv 2406.05127), whose
published tokenizer keeps its region features continuous: here each is one code. Codes stand in
the raster order of their region's first cell; the decoder predicts the layout of the regions from
the codes. `encode` runs in float64: which point is a centre and which code is nearest are decided
by comparisons, and in float32 the last bit of a batched product depends on the size of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unimm_tokenizers.codec import PADDING_CODE, Codec, CodecOutput, register_codec
from unimm_tokenizers.quantize import ResidualVectorQuantizer
from unimm_tokenizers.semantic.config import SemanticConfig, SeTokConfig
from unimm_tokenizers.semantic.detokenizer import Detokenizer, Painted
from unimm_tokenizers.semantic.encoder import RegionEncoder, Tokens


class Described(NamedTuple):
    """A training pass, and what it says of each picture.

    output: see `Codec.forward`.
    embedding: (B, codebook_dim), mean of the picture's quantized tokens.
    """

    output: CodecOutput
    embedding: Tensor


class SemanticCodec(Codec):
    """Pictures (B, C, H, W) of one size to codes (B, 1, max_tokens), padded with -1.

    Args:
        config: the codec's config.
        encoder: pictures to `Tokens`.
        head: see `Detokenizer`.
    """

    config: SemanticConfig
    modalities = ("semantic",)

    def __init__(
        self, config: SemanticConfig, encoder: nn.Module, head: nn.Module | None = None
    ) -> None:
        super().__init__(config)
        self.encoder = encoder
        self.quantizer = ResidualVectorQuantizer(
            config.codebook_dim, config.codebook_size, num_codebooks=1, cosine=True
        )
        self.detokenizer = Detokenizer(config, head)
        self.steps: Tensor
        self.register_buffer("steps", torch.tensor(0))  # training passes, for the warm-up

    @property
    def downsample(self) -> tuple[int, ...]:
        """(h, w) pixels per cell, the unit of which regions are made."""
        return self.config.cell, self.config.cell

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

    @property
    def codebook(self) -> Tensor:
        """(codebook_size, codebook_dim), unit vectors."""
        every = torch.arange(self.codebook_size, device=self.steps.device)
        return self.quantizer.lookup(every[None, None])[0].T

    def _exact_tokens(self, x: Tensor) -> Tokens:
        """Tokens in float64, of the codec as it is after training."""
        self._check(x)
        weights = {name: value.double() for name, value in self.encoder.named_parameters()}
        training = self.encoder.training
        self.encoder.eval()
        try:
            with torch.autocast(x.device.type, enabled=False):
                return functional_call(self.encoder, weights, (x.double(),))
        finally:
            self.encoder.train(training)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> int64 (B, 1, max_tokens), rows of -1 after the last token.

        Raises:
            ValueError: not a signal for this codec, or not of its size.
        """
        tokens = self._exact_tokens(x)
        codes = (tokens.vectors @ self.codebook.double().T).argmax(-1)
        return codes.masked_fill(~tokens.used, PADDING_CODE)[:, None]

    @torch.no_grad()
    def explain(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> int64 (B, h, w): the place in `encode(x)` of each cell's token."""
        assignment = self._exact_tokens(x).assignment
        return assignment.unflatten(1, (self.config.cells, self.config.cells))

    @torch.no_grad()
    def stats(self, x: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) -> "tokens" and "merged", int64 (B,): regions, and those beyond the bound.

        The cells of a merged region went to a stronger one.
        """
        tokens = self._exact_tokens(x)
        return {"tokens": tokens.used.sum(1), "merged": tokens.merged}

    @torch.no_grad()
    def embed(self, codes: Tensor) -> Tensor:
        """Codes (B, 1, n) -> (B, codebook_dim), the mean of their vectors; zero without codes."""
        self.check_codes(codes, 1)
        used = codes[:, 0] != PADDING_CODE
        return _mean(self.codebook[codes[:, 0].clamp(min=0)], used)

    def layout(self, codes: Tensor) -> Tensor:
        """Codes (B, 1, n), n at least 1 -> int64 (B, h, w): which code each cell is painted by."""
        cells = self.config.cells
        return self._paint(codes).layout.argmax(-1).unflatten(1, (cells, cells))

    def decode(self, codes: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """(B, 1, n) -> (B, C, H, W) in [-1, 1]; any n, -1 anywhere is skipped, no code is grey."""
        self.check_codes(codes, 1)
        codes = F.pad(codes, (0, int(codes.shape[2] == 0)), value=PADDING_CODE)
        some = (codes != PADDING_CODE).any(2)[..., None, None]
        signal = self.signal(self._paint(codes).made).clamp(-1, 1) * some
        return signal if size is None else signal[:, :, : size[0], : size[1]]

    def _paint(self, codes: Tensor) -> Painted:
        self.check_codes(codes, 1)
        vectors = self.codebook[codes[:, 0].clamp(min=0)]
        return self.detokenizer(vectors, codes[:, 0] != PADDING_CODE)

    def signal(self, made: Tensor) -> Tensor:
        """What the detokenizer's head made -> (B, C, H, W), in about [-1, 1]."""
        return made

    def painting_loss(self, painted: Painted, tokens: Tokens, x: Tensor) -> Tensor:
        """What the detokenizer learns of x (B, C, H, W) beside the picture itself; scalar."""
        layout = F.cross_entropy(painted.layout.transpose(1, 2), tokens.assignment)
        return self.config.layout_weight * layout

    def forward(self, x: Tensor) -> CodecOutput:
        """See `Codec.forward`; while the quantizer warms up, codes do not exist yet: all are -1."""
        return self.describe(x).output

    def describe(self, x: Tensor) -> Described:
        """`forward`, with what is compared with words."""
        self._check(x)
        tokens: Tokens = self.encoder(x)
        used, vectors = tokens.used, tokens.vectors.float()
        codes = torch.full_like(used, PADDING_CODE, dtype=torch.int64)
        loss = tokens.loss.float()
        if self.training:
            self.steps += 1
        if not self.training or self.steps > self.config.warmup_steps:
            found = self.quantizer(vectors[used].T[None])
            codes[used] = found.codes.flatten()
            vectors = found.quantized.new_zeros(vectors.shape)
            vectors[used] = found.quantized[0].T
            loss = loss + found.loss
        taught = tokens.assignment if self.training else None
        painted = self.detokenizer(vectors, used, taught)
        loss = loss + self.painting_loss(painted, tokens, x)
        output = CodecOutput(self.signal(painted.made), x, codes[:, None], loss)
        return Described(output, _mean(vectors, used))


def _mean(vectors: Tensor, used: Tensor) -> Tensor:
    """Mean of the used ones of vectors (B, M, d): (B, d)."""
    share = used.to(vectors.dtype)
    return (vectors * share[..., None]).sum(1) / share.sum(1, keepdim=True).clamp(min=1)


@register_codec("setok")
class SeTokCodec(SemanticCodec):
    """One code for each region of density-peaks clustering."""

    config_class = SeTokConfig
    config: SeTokConfig

    def __init__(self, config: SeTokConfig) -> None:
        super().__init__(config, RegionEncoder(config))
