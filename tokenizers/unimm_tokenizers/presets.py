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

_PRESETS: dict[str, tuple[type[Codec], Any]] = {
    "vision-tiny-f8": (
        VisionCodec,
        VisionConfig(channels=32, multipliers=(1, 2, 3), codebook_size=512),
    ),
    "vision-tiny-f8-video": (
        VisionCodec,
        VisionConfig(channels=32, multipliers=(1, 2, 3), codebook_size=512, time_downsample=4),
    ),
    "vision-base-f8": (
        VisionCodec,
        VisionConfig(channels=96, multipliers=(1, 2, 4), num_blocks=2, codebook_size=16384),
    ),
    "soundstream-8khz": (
        SoundStreamCodec,
        SoundStreamConfig(
            sample_rate=8000, channels=16, strides=(4, 4, 4, 5), num_codebooks=4, codebook_size=256
        ),
    ),
    "soundstream-24khz": (SoundStreamCodec, SoundStreamConfig()),
    "spectral-8khz": (SpectralCodec, SpectralConfig()),
    "semantic-tiny": (SeTokCodec, SeTokConfig()),
}


def presets() -> tuple[str, ...]:
    """Names that `build_codec` knows."""
    return tuple(_PRESETS)


def build_codec(name: str, seed: int = 0) -> Codec:
    """An untrained codec in evaluation mode; its weights depend on `seed` alone.

    Raises:
        ValueError: the preset is unknown; lists those that exist.
    """
    if name not in _PRESETS:
        raise ValueError(f"codec preset {name!r} is unknown; presets are {', '.join(_PRESETS)}")
    codec_class, config = _PRESETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return codec_class(config).eval()
