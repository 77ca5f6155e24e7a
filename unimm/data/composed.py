"""Scenes composed of dial-pad digits whose true masks are known, to judge regions by rule."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unimm.data.dialpad_render import Pose, digit_mask, random_colors


class ComposedScene(NamedTuple):
    """A picture uint8 (size, size, 3), and what it shows.

    masks: bool (n, size, size), one for each digit and the ground last; no pixel is in two.
    """

    picture: NDArray[np.uint8]
    masks: NDArray[np.bool_]


def composed_scene(
    rng: np.random.Generator,
    size: int = 32,
    digits: int = 1,
    ground: NDArray[np.uint8] | None = None,
) -> ComposedScene:
    """Digits of the dial-pad world side by side on a ground, with its poses, colours and noise.

    A pixel belongs to a digit that covers half of it or more.

    Args:
        rng: decides everything.
        size: pixels a side.
        digits: how many; each has its own digit, pose and, of those that can be read, ink.
        ground: a picture (size, size, 3) to draw on instead of a plain colour.

    Raises:
        ValueError: no digit, or a ground of another size.
    """
    if digits < 1:
        raise ValueError(f"a scene needs at least one digit, got {digits}")
    background, ink = random_colors(rng)
    canvas = np.broadcast_to(background, (size, size, 3)).astype(np.float64)
    if ground is not None:
        if ground.shape != canvas.shape:
            raise ValueError(f"the ground must be {canvas.shape}, got {ground.shape}")
        canvas = ground.astype(np.float64)
        ink = _contrasting(canvas)
    masks = []
    width = size / digits
    for place in range(digits):
        height = rng.uniform(0.55, 0.8) * size
        pose = Pose(
            center=(0.0, 0.0),
            width=min(height, width) * rng.uniform(0.5, 0.75),
            height=height,
            stroke=rng.uniform(0.08, 0.15) * height,
            degrees=rng.uniform(-20, 20) / digits,
            slant=rng.uniform(-0.15, 0.15),
        )
        across, down = pose.reach()
        slack = max(0.0, width / 2 - 0.5 - across), max(0.0, size / 2 - 0.5 - down)
        center = (
            width * (place + 0.5) + slack[0] * rng.uniform(-1, 1),
            size / 2 + slack[1] * rng.uniform(-1, 1),
        )
        mask = digit_mask(int(rng.integers(10)), replace(pose, center=center), size)
        canvas = canvas + (ink - canvas) * mask[..., None]
        masks.append(mask >= 0.5)
        ink = _turned(ink, rng)
    canvas += rng.uniform(1.0, 8.0) * rng.standard_normal(canvas.shape)
    found = np.stack(masks)
    found[1:] &= ~np.cumsum(found, 0, dtype=np.int64)[:-1].astype(bool)
    picture = np.clip(np.round(canvas), 0, 255).astype(np.uint8)
    return ComposedScene(picture, np.concatenate([found, ~found.any(0, keepdims=True)]))


def _contrasting(canvas: NDArray[np.float64]) -> NDArray[np.float64]:
    """White on a dark ground, black on a light one."""
    return np.full(3, 255.0 if canvas.mean() < 128 else 0.0)


def _turned(ink: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """An ink of the same three levels in another order: as light, of another hue."""
    return ink[rng.permutation(3)]


def best_overlap(regions: NDArray[np.int64], mask: NDArray[np.bool_]) -> float:
    """Intersection over union of a mask with the region that fits it best; both (h, w)."""
    names, sizes = np.unique(regions, return_counts=True)
    inside = np.array([(mask & (regions == name)).sum() for name in names])
    return float((inside / (sizes + mask.sum() - inside)).max())
