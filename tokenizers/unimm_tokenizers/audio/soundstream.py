"""Waveform codec after SoundStream (Zeghidour et al., arXiv 2107.03312, section III).

Causal strided convolutions, dilated residual units, residual vector quantization; no recurrent
layer and no per-clip normalisation, so that the receptive field is bounded and known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unimm_tokenizers.audio.layers import CausalConv, CausalUpsample, ResidualUnit
from unimm_tokenizers.audio.streaming import StreamingCodec, pad_frames
from unimm_tokenizers.codec import CodecOutput, register_codec
from unimm_tokenizers.quantize import ResidualVectorQuantizer


@dataclass(frozen=True, kw_only=True)
class SoundStreamConfig:
    """Shape of a waveform codec; channels double at every stride."""

    num_channels: int = 1
    sample_rate: int = 24000
    channels: int = 32
    strides: tuple[int, ...] = (2, 4, 5, 8)
    dilations: tuple[int, ...] = (1, 3, 9)
    latent_channels: int = 128
    num_codebooks: int = 8
    codebook_size: int = 1024


@register_codec("soundstream")
class SoundStreamCodec(StreamingCodec):
    """Sound (B, C, T) <-> codes (B, K, T / hop)."""

    config_class = SoundStreamConfig
    config: SoundStreamConfig
    modalities = ("audio",)

    def __init__(self, config: SoundStreamConfig) -> None:
        super().__init__(config)
        width = config.channels
        encoder: list[nn.Module] = [CausalConv(config.num_channels, width, 7)]
        for stride in config.strides:
            encoder += [ResidualUnit(width, dilation) for dilation in config.dilations]
            encoder += [nn.ELU(), CausalConv(width, 2 * width, 2 * stride, stride=stride)]
            width *= 2
        encoder += [nn.ELU(), CausalConv(width, config.latent_channels, 3)]
        decoder: list[nn.Module] = [CausalConv(config.latent_channels, width, 7)]
        for stride in reversed(config.strides):
            decoder += [nn.ELU(), CausalUpsample(width, width // 2, stride)]
            width //= 2
            decoder += [ResidualUnit(width, dilation) for dilation in config.dilations]
        decoder += [nn.ELU(), CausalConv(width, config.num_channels, 7), nn.Tanh()]
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder)
        self.quantizer = ResidualVectorQuantizer(
            config.latent_channels, config.codebook_size, config.num_codebooks
        )

    @property
    def downsample(self) -> tuple[int, ...]:
        """(hop,): samples per code frame."""
        return (math.prod(self.config.strides),)

    @property
    def receptive_field(self) -> tuple[int, ...]:
        """(samples,) that one code frame can depend on, all of them in the past."""
        reach, step = 7, 1
        for stride in self.config.strides:
            reach += sum(6 * dilation for dilation in self.config.dilations) * step
            reach += (2 * stride - 1) * step
            step *= stride
        return (reach + 2 * step,)

    @property
    def encoder_context(self) -> int:
        """Code frames before the first new one whose samples the encoder needs."""
        return -(-self.receptive_field[0] // self.downsample[0])

    @property
    def decoder_context(self) -> int:
        """Code frames before the first new one that the decoder needs."""
        reach, step = 6.0, 1.0
        for stride in reversed(self.config.strides):
            reach += step
            step /= stride
            reach += sum(6 * dilation for dilation in self.config.dilations) * step
        return math.ceil(reach + 6 * step)

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, K, ceil(T / hop)); the tail is padded with silence."""
        x = pad_frames(self.check_signal(x, 1), self.downsample[0])
        if not x.shape[-1]:
            return torch.empty(
                (x.shape[0], self.num_codebooks, 0), dtype=torch.int64, device=x.device
            )
        return self.quantizer(self.encoder(x)).codes

    def decode(self, codes: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """(B, K, T) -> (B, C, T * hop) in [-1, 1]."""
        self.check_codes(codes, 1)
        if not codes.shape[-1]:
            return torch.zeros((codes.shape[0], self.num_channels, 0), device=codes.device)
        signal = self.decoder(self.quantizer.lookup(codes))
        return signal if size is None else signal[..., : size[0]]

    def forward(self, x: Tensor) -> CodecOutput:
        """See `Codec.forward`; compares waveforms."""
        target = pad_frames(x, self.downsample[0])
        quantized, codes, loss = self.quantizer(self.encoder(target))
        return CodecOutput(self.decoder(quantized), target, codes, loss)
