"""Chameleon's, Janus's and Emu3's picture tokenizers as `transformers` has them.

Chameleon: arXiv 2405.09818; Janus-Pro: arXiv 2501.17811; Emu3: arXiv 2409.18869. Codes are
(B, 1, h, w), of Emu3's films (B, 1, t, h, w).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unimm_tokenizers.adapters.base import ForeignQuantizer
from unimm_tokenizers.adapters.transformers_base import TransformersCodec, TransformersConfig
from unimm_tokenizers.codec import register_codec


class _ImageAdapter(TransformersCodec):
    """Pictures of any size, padded to whole codes."""

    modalities = ("image",)

    def __init__(self, config: TransformersConfig, model: nn.Module | None = None) -> None:
        super().__init__(config, model)
        own = self.model.config
        size = getattr(own, "num_embeddings", None) or own.codebook_size
        self.quantizer = ForeignQuantizer(1, size)

    @property
    def downsample(self) -> tuple[int, ...]:
        """(h, w) pixels per code."""
        space = 2 ** (len(self.model.config.channel_multiplier) - 1)
        return (space, space)

    def to_codes(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1, h, w)."""
        height, width = (n // d for n, d in zip(x.shape[-2:], self.downsample, strict=True))
        return self.model.encode(x).image_tokens.view(len(x), 1, height, width)


@register_codec("transformers-chameleon")
class ChameleonAdapter(_ImageAdapter):
    """Chameleon's VQ-GAN, one way: `transformers` has its encoder alone."""

    model_class = "ChameleonVQVAE"

    def to_signal(self, codes: Tensor) -> Tensor:
        """Refused: there is no decoder to call."""
        raise ValueError(
            f"{self.name}: transformers has no decoder for these codes; they can only be read"
        )


@register_codec("transformers-janus")
class JanusAdapter(_ImageAdapter):
    """Janus's VQ-16 (LlamaGen's tokenizer)."""

    model_class = "JanusVQVAE"

    def to_signal(self, codes: Tensor) -> Tensor:
        """(B, 1, h, w) -> (B, 3, H, W)."""
        # The model keeps the grid of its own training size there, and refuses every other.
        self.model.quantize.quant_state_dims = list(codes.shape[2:])
        return self.model.decode(codes.flatten(1))


@register_codec("transformers-emu3")
class Emu3Adapter(_ImageAdapter):
    """Emu3's tokenizer: pictures, and films in groups of `temporal_downsample_factor` frames."""

    model_class = "Emu3VQVAE"
    modalities = ("image", "video")

    @property
    def downsample(self) -> tuple[int, ...]:
        """(t, h, w) signal units per code."""
        return (self.model.config.temporal_downsample_factor, *super().downsample)

    def to_codes(self, x: Tensor) -> Tensor:
        """(B, 3, [T,] H, W) -> (B, 1, [t,] h, w)."""
        # The sizes serve to cut what a batch was padded with; this one is cut by the slices below.
        frames = x.transpose(1, 2) if x.ndim == 5 else x
        sizes = torch.tensor([x.shape[-2:]] * len(x)) * 2**20
        return torch.stack(self.model.encode(frames, sizes).image_tokens)[:, None]

    def to_signal(self, codes: Tensor) -> Tensor:
        """(B, 1, [t,] h, w) -> (B, 3, [T,] H, W)."""
        made = self.model.decode(codes[:, 0])
        return made.transpose(1, 2) if codes.ndim == 5 else made
