"""Spectral codec: log-magnitude frames in and out, phase found from the magnitudes.

The waveform's short-time spectrum carries what is heard; its phase is rebuilt by real-time
iterative spectrogram inversion with look-ahead (RTISI-LA: Zhu, Beauregard and Wyse, IEEE TASLP
15(5), 2007), frame after frame, so decoding is deterministic and causal up to the look-ahead.
Nothing but magnitudes has to be learned, so it trains in minutes on a CPU. Channels of stereo sound
are coded together as spectra side by side; their phases are found one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.audio import phase
from unimm_tokenizers.audio.attention import bottleneck
from unimm_tokenizers.audio.config import SoundConfig, build_quantizer
from unimm_tokenizers.audio.layers import (
    CausalConv,
    CausalStack,
    CausalUpsample,
    Past,
    Pointwise,
    ResidualUnit,
    reach,
    tail,
)
from unimm_tokenizers.audio.precision import precisely
from unimm_tokenizers.audio.streaming import StreamingCodec, pad_frames
from unimm_tokenizers.codec import CodecOutput, register_codec
from unimm_tokenizers.quantize import ResidualVectorQuantizer

# Magnitudes that phases are found for have steps of 1 / 256 nat (0.03 dB). In float64 a step is hit
# or missed alike however a sound is cut into chunks; of float32's rounding errors the search for
# phases makes another sound within a second.
GRID = 256
FLOOR = 1e-3  # magnitudes below this (-60 dB of a full-scale window sum) count as silence


def scaled(log: Tensor) -> Tensor:
    """Log magnitudes to about zero mean and unit deviation (speech: mean -3, deviation 2)."""
    return (log + 3) / 2


def unscaled(x: Tensor) -> Tensor:
    """What `scaled` was given."""
    return 2 * x - 3


@dataclass(frozen=True, kw_only=True)
class SpectralConfig(SoundConfig):
    """Shape of a spectral codec: one code frame for `downsample` hops of `hop` samples."""

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
        super().__post_init__()
        if self.window % self.hop or self.window < 2 * self.hop:
            raise ValueError(f"window ({self.window}) must be a multiple of hop, at least twice it")


class EncoderPast(NamedTuple):
    """samples: (B, C, window - hop) before the next frame; layers: their pasts."""

    samples: Tensor
    layers: Past | None


class DecoderPast(NamedTuple):
    """layers: their pasts; phases: of the inversion, channels of a batch one after the other."""

    layers: Past | None
    phases: phase.PhaseState


@register_codec("spectral")
class SpectralCodec(StreamingCodec):
    """Sound (B, C, T) <-> codes (B, K, T / (hop * downsample))."""

    config_class = SpectralConfig
    config: SpectralConfig

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__(config)
        bins = config.num_channels * (config.window // 2 + 1)
        width, ratio, dim = config.channels, config.downsample, config.latent_channels
        attention = (config.attention_layers, config.attention_context)
        dilations = [3**i for i in range(config.num_blocks)]

        def blocks() -> list[nn.Module]:
            return [ResidualUnit(width, dilation, kernel=3) for dilation in dilations]

        self.encoder = CausalStack(
            CausalConv(bins, width, 3),
            *blocks(),
            nn.ELU(),
            CausalConv(width, width, 2 * ratio, stride=ratio),
            ResidualUnit(width, 1, kernel=3),
            nn.ELU(),
            Pointwise(width, dim),
            *bottleneck(dim, *attention),
        )
        self.quantizer = build_quantizer(config)
        self.decoder = CausalStack(
            *bottleneck(dim, *attention),
            CausalConv(dim, width, 3),
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
        hops = reach(self.encoder) + config.downsample - 1
        return (hops * config.hop + config.window,)

    @property
    def decoder_delay(self) -> int:
        """See `StreamingCodec.decoder_delay`: the window's overlap, and the look-ahead."""
        return phase.delay(self.config.window, self.config.hop)

    def log_magnitudes(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """(B, C, T) with T a multiple of the hop -> log spectra (B, C * bins, T / hop).

        Frame i ends with sample (i + 1) * hop: it sees no later sample.

        Args:
            x: the sound.
            before: (B, C, window - hop) samples before it; None: silence.
        """
        config = self.config
        frames = self._after(before, x).float().unfold(-1, config.window, config.hop) * self.window
        log = torch.fft.rfft(frames).abs().clamp(min=FLOOR).log()
        return log.transpose(2, 3).flatten(1, 2)

    def latents(self, x: Tensor, past: EncoderPast | None) -> tuple[Tensor, EncoderPast]:
        """See `StreamingCodec.latents`."""
        before, layers = (None, None) if past is None else past
        log = self.log_magnitudes(x, before).to(x.dtype)
        latents, layers = self.encoder.step(scaled(log), layers)
        seen = tail(self._after(before, x), self.config.window - self.config.hop)
        return latents, EncoderPast(seen, layers)

    def _after(self, before: Tensor | None, x: Tensor) -> Tensor:
        """The sound behind the `window - hop` samples before it; None: silence."""
        if before is None:
            return F.pad(x, (self.config.window - self.config.hop, 0))
        return torch.cat([before, x], dim=-1)

    def signal(
        self, latents: Tensor, past: DecoderPast | None, *, last: bool
    ) -> tuple[Tensor, DecoderPast]:
        """See `StreamingCodec.signal`; samples are final `decoder_delay` samples later."""
        window, hop, channels = self.config.window, self.config.hop, self.num_channels
        layers = None if past is None else past.layers
        magnitudes = self.window.new_zeros(len(latents) * channels, window // 2 + 1, 0)
        if latents.shape[-1]:
            made, layers = precisely(self.decoder, "step", latents, layers)
            magnitudes = self._magnitudes(unscaled(made).unflatten(1, (channels, -1)))
        begun = phase.start(len(magnitudes), window, hop, magnitudes)
        phases = begun if past is None else past.phases
        signal, phases = phase.invert_chunk(magnitudes, self.window, hop, phases, last=last)
        signal = signal.unflatten(0, (len(latents), channels)).clamp(-1, 1)
        return signal, DecoderPast(layers, phases)

    def _magnitudes(self, log: Tensor) -> Tensor:
        """Log magnitudes float64 (B, C, bins, n) -> float32 (B * C, bins, n) of 1 / GRID nat."""
        lowest, highest = math.log(1.5 * FLOOR), math.log(float(self.window.sum()))
        steps = torch.arange(math.ceil(GRID * (highest - lowest)) + 1, device=log.device)
        table = (lowest + steps.double() / GRID).exp().float()
        table[0] = 0.0  # what is below the floor is silence
        places = (GRID * (log - lowest)).round().clamp(0, len(table) - 1).long()
        return table[places].flatten(0, 1)

    def lookup(self, codes: Tensor) -> Tensor:
        """See `StreamingCodec.lookup`; float64."""
        quantizer = self.quantizer
        if isinstance(quantizer, ResidualVectorQuantizer) and self.config.codebook_dim is None:
            return quantizer.lookup(codes).double()  # sums alone: whole codebooks need no float64
        return precisely(quantizer, "lookup", codes)

    def forward(self, x: Tensor) -> CodecOutput:
        """See `Codec.forward`; compares scaled log spectra (B, C * bins, frames)."""
        target = scaled(self.log_magnitudes(pad_frames(x, self.downsample[0])))
        latents = self.encoder(target)
        quantized, codes, loss = self.quantizer(latents)
        return CodecOutput(self.decoder(quantized), target, codes, loss, latents)
