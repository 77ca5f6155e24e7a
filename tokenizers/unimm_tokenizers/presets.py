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
