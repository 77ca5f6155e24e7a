"""What the rotary kernel is given: positions of each axis, or, where turns are scaled, angles.

The kernel turns a channel pair by its position times a speed that falls geometrically from pair to
pair. Scaled speeds do not: each pair then is an axis of its own, whose position is the angle.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from unimm.model.config import ModelConfig


def rotary_bases(config: ModelConfig) -> tuple[float, ...]:
    """The bases that go with `rotary_positions`."""
    if config.rope_scaling is None:
        return config.rope_bases
    return (1.0,) * (config.head_dim // 2)


def rotary_positions(config: ModelConfig, positions: Tensor) -> Tensor:
    """Positions (A, B, T) -> what the kernel turns by: the same, or angles (D / 2, B, T)."""
    if config.rope_scaling is None:
        return positions
    speeds = torch.tensor(scaled_speeds(config), device=positions.device)
    return positions.float() * speeds[:, None, None]


@cache
def scaled_speeds(config: ModelConfig) -> list[float]:
    """Angle of each channel pair at position 1; see `RopeScaling`."""
    scaling = config.rope_scaling
    assert scaling is not None
    pairs = config.head_dim // 2
    speeds = []
    for pair in range(pairs):
        speed = config.rope_bases[0] ** (-pair / pairs)
        turns = scaling.length * speed / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - scaling.slow) / (scaling.fast - scaling.slow)))
        speeds.append(speed * (kept + (1 - kept) / scaling.factor))
    return speeds
