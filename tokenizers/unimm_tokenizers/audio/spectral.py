"""Spectral codec: log-magnitude frames in and out, phase found from the magnitudes.

The waveform's short-time spectrum carries what is heard; its phase is rebuilt by real-time
iterative spectrogram inversion with look-ahead (RTISI-LA: Zhu, Beauregard and Wyse, IEEE TASLP
15(5), 2007), frame after frame, so decoding is deterministic and causal up to the look-ahead.
Nothing but magnitudes has to be learned, so it trains in minutes on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.audio.layers import CausalConv, CausalUpsample, ResidualUnit
from unimm_tokenizers.audio.phase import invert_magnitudes
from unimm_tokenizers.audio.streaming import pad_frames
from unimm_tokenizers.codec import Codec, CodecOutput, register_codec
from unimm_tokenizers.quantize import ResidualVectorQuantizer

FLOOR = 1e-3  # magnitudes below this (-60 dB of a full-scale window sum) count as silence


@dataclass(frozen=True, kw_only=True)
class SpectralConfig:
    """Shape of a spectral codec: one code frame for `downsample` hops of `hop` samples."""

    num_channels: int = 1
    sample_rate: int = 8000
    window: int = 320
    hop: int = 80
    downsample: int = 4
    channels: int = 192
    num_blocks: int = 3
    latent_channels: int = 64
    num_codebooks: int = 4
    codebook_size: int = 256

    def __post_init__(self) -> None:
        if self.num_channels != 1:
            raise ValueError("the spectral codec is mono: num_channels must be 1")
        if self.window % self.hop or self.window < 2 * self.hop:
            raise ValueError(f"window ({self.window}) must be a multiple of hop, at least twice it")


@register_codec("spectral")
class SpectralCodec(Codec):
    """Mono sound (B, 1, T) <-> codes (B, K, T / (hop * downsample))."""

    config_class = SpectralConfig
    config: SpectralConfig
    modalities = ("audio",)

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__(config)
        bins, width, ratio = config.window // 2 + 1, config.channels, config.downsample
        dilations = [3**i for i in range(config.num_blocks)]

        def blocks() -> list[nn.Module]:
            return [ResidualUnit(width, dilation, kernel=3) for dilation in dilations]

        self.encoder = nn.Sequential(
            CausalConv(bins, width, 3),
            *blocks(),
            nn.ELU(),
            CausalConv(width, width, 2 * ratio, stride=ratio),
            ResidualUnit(width, 1, kernel=3),
            nn.ELU(),
            nn.Conv1d(width, config.latent_channels, 1),
        )
        self.quantizer = ResidualVectorQuantizer(
            config.latent_channels, config.codebook_size, config.num_codebooks
        )
        self.decoder = nn.Sequential(
            CausalConv(config.latent_channels, width, 3),
            ResidualUnit(width, 1, kernel=3),
            nn.ELU(),
            CausalUpsample(width, width, ratio),
            *blocks(),
            nn.ELU(),
            CausalConv(width, bins, 3),
        )
        self.register_buffer("window", torch.hann_window(config.window), persistent=False)
        self.window: Tensor

    @property
    def downsample(self) -> tuple[int, ...]:
        """(samples per code frame,)."""
        return (self.config.hop * self.config.downsample,)

    @property
    def receptive_field(self) -> tuple[int, ...]:
        """(samples,) that one code frame can depend on, all of them in the past."""
        config = self.config
        hops = 2 + sum(2 * 3**i for i in range(config.num_blocks)) + 2 * config.downsample - 1
        hops += 2 * config.downsample
        return (hops * config.hop + config.window,)

    def log_magnitudes(self, x: Tensor) -> Tensor:
        """(B, 1, T) with T a multiple of the hop -> log spectrum (B, bins, T / hop).

        Frame i ends with sample (i + 1) * hop: it sees no later sample.
        """
        config = self.config
        padded = F.pad(x[:, 0].float(), (config.window - config.hop, 0))
        frames = padded.unfold(-1, config.window, config.hop) * self.window
        return torch.fft.rfft(frames).abs().clamp(min=FLOOR).log().transpose(1, 2)

    def encode(self, x: Tensor) -> Tensor:
        """(B, 1, T) -> (B, K, ceil(T / downsample)); the tail is padded with silence."""
        x = pad_frames(self.check_signal(x, 1), self.downsample[0])
        if not x.shape[-1]:
            return torch.empty(
                (x.shape[0], self.num_codebooks, 0), dtype=torch.int64, device=x.device
            )
        return self.quantizer(self.encoder(self._scaled(self.log_magnitudes(x)))).codes

    def decode(self, codes: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """(B, K, T) -> (B, 1, T * downsample) in [-1, 1]."""
        self.check_codes(codes, 1)
        if not codes.shape[-1]:
            return torch.zeros((codes.shape[0], 1, 0), device=codes.device)
        log = self._unscaled(self.decoder(self.quantizer.lookup(codes)))
        magnitudes = log.float().exp().clamp(max=float(self.window.sum()))
        magnitudes = torch.where(magnitudes > 1.5 * FLOOR, magnitudes, 0.0)
        signal = invert_magnitudes(magnitudes, self.window, self.config.hop)[:, None].clamp(-1, 1)
        return signal if size is None else signal[..., : size[0]]

    @staticmethod
    def _scaled(log: Tensor) -> Tensor:
        """Log magnitudes to about zero mean and unit deviation (speech: mean -3, deviation 2)."""
        return (log + 3) / 2

    @staticmethod
    def _unscaled(scaled: Tensor) -> Tensor:
        return 2 * scaled - 3

    def forward(self, x: Tensor) -> CodecOutput:
        """See `Codec.forward`; compares scaled log spectra (B, bins, frames)."""
        target = self._scaled(self.log_magnitudes(pad_frames(x, self.downsample[0])))
        quantized, codes, loss = self.quantizer(self.encoder(target))
        return CodecOutput(self.decoder(quantized), target, codes, loss)
