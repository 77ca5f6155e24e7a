"""What the sound codecs' configs share, and the quantizer that they name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from unimm_tokenizers.quantize import (
    FactorizedResidualQuantizer,
    FiniteScalarQuantizer,
    Quantizer,
    ResidualVectorQuantizer,
)

QuantizerName = Literal["residual", "factorized"]


@dataclass(frozen=True, kw_only=True)
class SoundConfig:
    """Sound, latents and codes.

    `fsq_levels` chooses finite scalar quantization, one code per frame. Otherwise `quantizer` makes
    `num_codebooks` levels of `codebook_size` codes (1 level: plain vector quantization), each on
    what the ones before it left over:

    - "residual": all in one space of `codebook_dim` channels (None: the latents' own).
    - "factorized": each level in its own `codebook_dim` channels (None: 8), compared by angle; DAC.

    `quantizer_dropout` is the share of training sounds that get fewer levels, at random, so that
    the first n levels are a codec of their own. `attention_layers` transformer blocks on either
    side of the quantizer see `attention_context` frames.

    Raises:
        ValueError: a value is out of range.
    """

    num_channels: int = 1
    sample_rate: int = 24000
    latent_channels: int = 128
    num_codebooks: int = 8
    codebook_size: int = 1024
    quantizer: QuantizerName = "residual"
    codebook_dim: int | None = None
    fsq_levels: tuple[int, ...] = ()
    quantizer_dropout: float = 0.0
    attention_layers: int = 0
    attention_context: int = 64

    def __post_init__(self) -> None:
        positive = ("sample_rate", "latent_channels", "num_codebooks", "attention_context")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_channels not in (1, 2):
            raise ValueError(f"num_channels must be 1 or 2, got {self.num_channels}")
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size must be at least 2, got {self.codebook_size}")
        if self.quantizer not in get_args(QuantizerName):
            known = ", ".join(get_args(QuantizerName))
            raise ValueError(f"quantizer must be one of {known}, got {self.quantizer!r}")
        if self.fsq_levels and self.num_codebooks != 1:
            raise ValueError("fsq_levels make one code per frame: set num_codebooks to 1")
        if not 0 <= self.quantizer_dropout <= 1 or self.attention_layers < 0:
            raise ValueError(
                "quantizer_dropout must lie in 0 to 1, and attention_layers be 0 or more"
            )


def build_quantizer(config: SoundConfig) -> Quantizer:
    """The quantizer that a config names, untrained."""
    dim, size, levels = config.latent_channels, config.codebook_size, config.num_codebooks
    if config.fsq_levels:
        return FiniteScalarQuantizer(dim, config.fsq_levels)
    if config.quantizer == "factorized":
        width = config.codebook_dim or 8
        return FactorizedResidualQuantizer(dim, size, levels, width, config.quantizer_dropout)
    return ResidualVectorQuantizer(
        dim, size, levels, config.codebook_dim, dropout=config.quantizer_dropout
    )
