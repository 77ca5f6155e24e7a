# pyright: strict
# torch's own types are partly unknown, and what users give is checked whatever its annotation says.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnnecessaryIsInstance=false

"""Untrained codecs by name."""

from __future__ import annotations

from typing import Any

import torch

from unimm_tokenizers.audio import (
    SoundStreamCodec,
    SoundStreamConfig,
    SpectralCodec,
    SpectralConfig,
)
from unimm_tokenizers.codec import Codec
from unimm_tokenizers.semantic import SeTokCodec, SeTokConfig
from unimm_tokenizers.vision import VisionCodec, VisionConfig


def _vision(num_blocks: int = 2, **options: Any) -> tuple[type[Codec], Any]:
    """A codec of pictures with LlamaGen's codebook: 16,384 unit codes in 8 channels."""
    return VisionCodec, VisionConfig(num_blocks=num_blocks, codebook_size=16384, **options)


def _waves(**options: Any) -> tuple[type[Codec], Any]:
    """A codec of waveforms."""
    return SoundStreamCodec, SoundStreamConfig(**options)


def _spectra(**options: Any) -> tuple[type[Codec], Any]:
    """A codec of spectra at 16 kHz, 50 frames a second; `recipes/audio` trains it."""
    shape = {"window": 640, "hop": 160, "downsample": 2, "channels": 224}
    return SpectralCodec, SpectralConfig(sample_rate=16000, **shape, **options)


_PRESETS: dict[str, tuple[type[Codec], Any]] = {
    "vision-tiny-f8": (
        VisionCodec,
        VisionConfig(channels=32, multipliers=(1, 2, 3), codebook_size=512),
    ),
    "vision-tiny-f8-video": (
        VisionCodec,
        VisionConfig(channels=32, multipliers=(1, 2, 3), codebook_size=512, time_downsample=4),
    ),
    # By parameters and pixels per code; the f16 of 40 and 100 million have the widths of LlamaGen's
    # and Open-MAGVIT2's (128 x 1, 1, 2, 2, 4), without their attention.
    "vision-1m-f8": _vision(channels=48, multipliers=(1, 2), patch=4, block="lean"),
    "vision-5m-f8": _vision(channels=96, multipliers=(1, 2), patch=4, block="lean"),
    "vision-5m-f8-video": _vision(
        channels=96, multipliers=(1, 2), patch=4, block="lean", time_downsample=4
    ),
    "vision-20m-f8": _vision(channels=128, multipliers=(1, 2, 3), block="lean"),
    "vision-20m-f16": _vision(channels=96, multipliers=(1, 1, 2, 4)),
    "vision-40m-f16": _vision(channels=128, multipliers=(1, 1, 2, 2, 4), patch=1),
    "vision-100m-f16": _vision(channels=128, multipliers=(1, 1, 2, 2, 4), patch=1, num_blocks=6),
    "vision-100m-f32": _vision(channels=128, multipliers=(1, 1, 2, 2, 4), num_blocks=6),
    # Sound, by family and rate: 25, 50, 75, 75, 12.5 and 86 frames a second.
    "soundstream-8khz": _waves(
        sample_rate=8000, channels=16, strides=(4, 4, 4, 5), num_codebooks=4, codebook_size=256
    ),
    "soundstream-16khz": _waves(sample_rate=16000, quantizer_dropout=0.5),
    "soundstream-24khz": _waves(),
    # EnCodec's widths, strides and units (arXiv 2210.13438), without its recurrent layers.
    "encodec-24khz": _waves(dilations=(1,), residual_kernel=3, compress=2),
    # Mimi's rate and transformer (arXiv 2410.00037), at half its width and depth.
    "soundstream-24khz-12hz": _waves(
        strides=(4, 5, 6, 8, 2),
        latent_channels=256,
        attention_layers=4,
        attention_context=125,
        quantizer_dropout=0.5,
    ),
    # DAC's strides, Snake and quantizer (arXiv 2306.06546), causal and in stereo.
    "soundstream-44khz": _waves(
        sample_rate=44100,
        num_channels=2,
        strides=(2, 4, 8, 8),
        activation="snake",
        num_codebooks=9,
        quantizer="factorized",
        quantizer_dropout=0.5,
    ),
    "soundstream-24khz-single": _waves(num_codebooks=1, codebook_size=4096, codebook_dim=8),
    "spectral-8khz": (SpectralCodec, SpectralConfig()),
    "spectral-16khz": _spectra(num_codebooks=12, codebook_size=1024, quantizer_dropout=0.5),
    "spectral-16khz-fsq": _spectra(num_codebooks=1, fsq_levels=(8, 8, 8, 5, 5, 5)),
    "semantic-tiny": (SeTokCodec, SeTokConfig()),
}


def presets() -> tuple[str, ...]:
    """Names that `build_codec` knows."""
    return tuple(_PRESETS)


def build_codec(name: str, seed: int = 0) -> Codec:
    """An untrained codec in evaluation mode.

    Args:
        name: one of `presets()`.
        seed: decides the weights, alone.

    Raises:
        ValueError: the preset is unknown; lists those that exist.
    """
    if name not in _PRESETS:
        raise ValueError(f"codec preset {name!r} is unknown; presets are {', '.join(_PRESETS)}")
    codec_class, config = _PRESETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return codec_class(config).eval()
