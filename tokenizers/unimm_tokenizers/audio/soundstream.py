"""Waveform codec after SoundStream (Zeghidour et al., arXiv 2107.03312, section III).

Causal strided convolutions, dilated residual units, residual vector quantization; no recurrent
layer and no per-clip normalisation, so that the receptive field is bounded and known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from unimm_tokenizers.audio.attention import bottleneck
from unimm_tokenizers.audio.config import SoundConfig, build_quantizer
from unimm_tokenizers.audio.layers import (
    CausalConv,
    CausalStack,
    CausalUpsample,
    Past,
    ResidualUnit,
    activation,
    reach,
)
from unimm_tokenizers.audio.streaming import StreamingCodec
from unimm_tokenizers.codec import register_codec

Activation = Literal["elu", "snake"]


@dataclass(frozen=True, kw_only=True)
class SoundStreamConfig(SoundConfig):
    """Shape of a waveform codec; channels double at every stride.

    Each stride has a residual unit for every dilation, of `residual_kernel`, with `compress` times
    fewer channels inside.
    """

    channels: int = 32
    strides: tuple[int, ...] = (2, 4, 5, 8)
    dilations: tuple[int, ...] = (1, 3, 9)
    residual_kernel: int = 7
    compress: int = 1
    activation: Activation = "elu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in get_args(Activation):
            known = ", ".join(get_args(Activation))
            raise ValueError(f"activation must be one of {known}, got {self.activation!r}")
        if not self.strides or min(self.strides) < 2:
            raise ValueError(f"strides must be numbers of 2 or more, got {self.strides}")


@register_codec("soundstream")
class SoundStreamCodec(StreamingCodec):
    """Sound (B, C, T) <-> codes (B, K, T / hop)."""

    config_class = SoundStreamConfig
    config: SoundStreamConfig

    def __init__(self, config: SoundStreamConfig) -> None:
        super().__init__(config)
        attention = (config.attention_layers, config.attention_context)
        width, dim = config.channels, config.latent_channels

        def units(width: int) -> list[nn.Module]:
            kernel, compress, act = config.residual_kernel, config.compress, config.activation
            return [ResidualUnit(width, d, kernel, compress, act) for d in config.dilations]

        encoder: list[nn.Module] = [CausalConv(config.num_channels, width, 7)]
        for stride in config.strides:
            encoder += [*units(width), activation(config.activation, width)]
            encoder += [CausalConv(width, 2 * width, 2 * stride, stride=stride)]
            width *= 2
        encoder += [activation(config.activation, width), CausalConv(width, dim, 3)]
        decoder: list[nn.Module] = [CausalConv(dim, width, 7)]
        for stride in reversed(config.strides):
            decoder += [activation(config.activation, width)]
            decoder += [CausalUpsample(width, width // 2, stride)]
            width //= 2
            decoder += units(width)
        decoder += [activation(config.activation, width)]
        decoder += [CausalConv(width, config.num_channels, 7), nn.Tanh()]
        self.encoder = CausalStack(*encoder, *bottleneck(dim, *attention))
        self.decoder = CausalStack(*bottleneck(dim, *attention), *decoder)
        self.quantizer = build_quantizer(config)

    @property
    def downsample(self) -> tuple[int, ...]:
        """(hop,): samples per code frame."""
        return (math.prod(self.config.strides),)

    @property
    def receptive_field(self) -> tuple[int, ...]:
        """(samples,) that one code frame can depend on, all of them in the past."""
        return (reach(self.encoder) + self.downsample[0],)

    def latents(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """See `StreamingCodec.latents`."""
        return self.encoder.step(x, past)

    def signal(self, latents: Tensor, past: Past | None, *, last: bool) -> tuple[Tensor, Past]:
        """See `StreamingCodec.signal`; every sample is final at once."""
        if not latents.shape[-1]:
            assert past is not None
            return latents.new_zeros(len(latents), self.num_channels, 0), past
        return self.decoder.step(latents, past)
