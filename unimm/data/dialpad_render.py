"""Drawing and sounding the dial-pad world: ten stroke digits and their two-tone sounds.

Digits are polylines in a unit box, drawn through the distance of every pixel centre to the nearest
segment. That is plain arithmetic, so the pictures do not change with a font or a drawing library,
and edges are smooth without supersampling. Tones are the dual-tone multi-frequency pairs of
ITU-T Recommendation Q.23 (1988), table 1. Everything is numpy; the random state is an argument.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

ROW_HZ = (697.0, 770.0, 852.0, 941.0)
COLUMN_HZ = (1209.0, 1336.0, 1477.0)
# A telephone's layout: 1 2 3 / 4 5 6 / 7 8 9 / * 0 #. Digit -> (row, column).
KEYS = {0: (3, 1)} | {digit: ((digit - 1) // 3, (digit - 1) % 3) for digit in range(1, 10)}

Points = list[tuple[float, float]]


def _arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> Points:
    """Ellipse arc as points; angles in degrees, 0 to the right, growing clockwise (y is down)."""
    count = max(2, math.ceil(abs(end - start) / 20) + 1)
    angles = [math.radians(start + (end - start) * i / (count - 1)) for i in range(count)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


# Strokes in the unit box, x to the right and y down. The tails of 6 and 9 are open curves, so a
# rotation of 20 degrees never makes one look like the other.
_STROKES: dict[int, list[Points]] = {
    0: [_arc(0.5, 0.5, 0.5, 0.5, 0, 360)],
    1: [[(0.2, 0.25), (0.6, 0.0), (0.6, 1.0)]],
    2: [[*_arc(0.5, 0.29, 0.47, 0.29, 190, 390), (0.05, 1.0), (1.0, 1.0)]],
    3: [
        [*_arc(0.46, 0.25, 0.44, 0.25, 205, 440), *_arc(0.46, 0.74, 0.52, 0.26, -80, 155)],
    ],
    4: [[(0.72, 1.0), (0.72, 0.0), (0.0, 0.68), (1.0, 0.68)]],
    5: [[(0.92, 0.0), (0.16, 0.0), (0.1, 0.45), *_arc(0.46, 0.67, 0.52, 0.33, 228, 510)]],
    6: [
        [(0.88, 0.0), *_arc(0.84, 0.68, 0.84, 0.66, 255, 180)],
        _arc(0.5, 0.68, 0.5, 0.32, 0, 360),
    ],
    7: [[(0.0, 0.0), (1.0, 0.0), (0.35, 1.0)]],
    8: [_arc(0.5, 0.25, 0.42, 0.25, 0, 360), _arc(0.5, 0.75, 0.5, 0.25, 0, 360)],
    9: [
        [(0.12, 1.0), *_arc(0.16, 0.32, 0.84, 0.66, 75, 0)],
        _arc(0.5, 0.32, 0.5, 0.32, 0, 360),
    ],
}


def _segments(digit: int) -> NDArray[np.float64]:
    pairs = [(a, b) for stroke in _STROKES[digit] for a, b in itertools.pairwise(stroke)]
    return np.array(pairs, dtype=np.float64) - 0.5


_SEGMENTS = {digit: _segments(digit) for digit in _STROKES}


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Where and how a digit lies in the frame: lengths in pixels, angles in degrees, slant as tan.

    `center` is (x, y) of the digit's box; `width` and `height` are those of the upright box.
    """

    center: tuple[float, float]
    width: float
    height: float
    stroke: float
    degrees: float = 0.0
    slant: float = 0.0

    def matrix(self) -> NDArray[np.float64]:
        """Linear map from the unit box (centred) to pixels: scale, slant, then rotation."""
        angle = math.radians(self.degrees)
        rotation = np.array(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        )
        return rotation @ np.array([[self.width, -self.slant * self.height], [0.0, self.height]])

    def reach(self) -> tuple[float, float]:
        """Half the extent of the posed box in x and y, stroke included."""
        x, y = np.abs(self.matrix()).sum(axis=1) / 2 + self.stroke / 2
        return float(x), float(y)


def digit_mask(digit: int, pose: Pose, size: int = 32) -> NDArray[np.float64]:
    """Coverage (size, size) in [0, 1] of a digit's strokes, with round caps and smooth edges."""
    segments = _SEGMENTS[digit] @ pose.matrix().T + np.array(pose.center)
    start_x, start_y = segments[:, 0].T[..., None]
    along_x, along_y = (segments[:, 1] - segments[:, 0]).T[..., None]
    axis = np.arange(size) + 0.5
    # x and y apart, segments before pixels: long rows are three times as fast as pairs of numbers.
    x, y = (grid.ravel() for grid in np.meshgrid(axis, axis, indexing="xy"))
    x, y = x - start_x, y - start_y
    t = np.clip((x * along_x + y * along_y) / (along_x**2 + along_y**2), 0.0, 1.0)
    distance = np.sqrt(((x - t * along_x) ** 2 + (y - t * along_y) ** 2).min(axis=0))
    return np.clip(pose.stroke / 2 - distance + 0.5, 0.0, 1.0).reshape(size, size)


def random_colors(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Background and ink, each (3,) in [0, 255]: dark on light or light on dark.

    Their luma (ITU-R BT.601) differs by 100 or more of 255, so a digit can always be read.
    """
    luma = np.array([0.299, 0.587, 0.114])
    dark, light = rng.uniform(0, 70, 3), rng.uniform(110, 255, 3)
    light += max(0.0, 100.0 - float(luma @ (light - dark)))
    light = np.minimum(light, 255.0)
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def picture(digit: int, rng: np.random.Generator, size: int = 32) -> NDArray[np.uint8]:
    """An RGB picture (size, size, 3) of a digit under random pose, colours and noise."""
    height = rng.uniform(0.55, 0.8) * size
    pose = Pose(
        center=(0.0, 0.0),
        width=height * rng.uniform(0.5, 0.75),
        height=height,
        stroke=rng.uniform(0.08, 0.15) * height,
        degrees=rng.uniform(-20, 20),
        slant=rng.uniform(-0.15, 0.15),
    )
    slack = [max(0.0, size / 2 - 0.5 - reach) for reach in pose.reach()]
    center = (
        size / 2 + slack[0] * rng.uniform(-1, 1),
        size / 2 + slack[1] * rng.uniform(-1, 1),
    )
    mask = digit_mask(digit, replace(pose, center=center), size)[..., None]
    background, ink = random_colors(rng)
    noise = rng.uniform(1.0, 8.0) * rng.standard_normal((size, size, 3))
    return _to_uint8(background + (ink - background) * mask + noise)


def film(
    digit: int, step: tuple[int, int], rng: np.random.Generator, frames: int = 9, size: int = 32
) -> NDArray[np.uint8]:
    """A film (frames, size, size, 3) of a digit of about half the frame that moves by `step`.

    `step` is (x, y) in whole pixels per frame, so the digit keeps its shape and the path is exact.
    The coverage has 16 levels: at most 16 colours a film, which a GIF holds without loss.
    """
    height = rng.uniform(0.46, 0.56) * size
    pose = Pose(
        center=(0.0, 0.0),
        width=height * rng.uniform(0.55, 0.75),
        height=height,
        stroke=rng.uniform(0.12, 0.17) * height,
        degrees=rng.uniform(-12, 12),
        slant=rng.uniform(-0.1, 0.1),
    )
    travel = (step[0] * (frames - 1), step[1] * (frames - 1))
    slack = [
        max(0.0, size / 2 - reach - abs(way) / 2)
        for reach, way in zip(pose.reach(), travel, strict=True)
    ]
    start = (
        size / 2 - travel[0] / 2 + slack[0] * rng.uniform(-1, 1),
        size / 2 - travel[1] / 2 + slack[1] * rng.uniform(-1, 1),
    )
    first = np.round(digit_mask(digit, replace(pose, center=start), size) * 15) / 15
    masks = np.stack([_shifted(first, step[0] * t, step[1] * t) for t in range(frames)])
    background, ink = random_colors(rng)
    return _to_uint8(background + (ink - background) * masks[..., None])


def tone(digit: int, rng: np.random.Generator, sample_rate: int = 8000) -> NDArray[np.float32]:
    """The sound (T,) of a key: two sines of equal level, noise, 10 ms fades; 0.2 to 0.4 s long.

    The length is a multiple of 40 ms. The peak is 0.5 less 0 to 12 dB; the noise lies 20 to 40 dB
    below the tones. Samples sit on the 16-bit grid, so a 16-bit WAV file holds them without loss.
    """
    block = sample_rate // 25
    length = int(rng.integers(5, 11)) * block
    row, column = KEYS[digit]
    time = np.arange(length) / sample_rate
    phases = rng.uniform(0, 2 * math.pi, 2)
    sound = 0.5 * sum(
        np.sin(2 * math.pi * hz * time + phase)
        for hz, phase in zip((ROW_HZ[row], COLUMN_HZ[column]), phases, strict=True)
    )
    # Two sines of amplitude 1/2 have a root mean square of 1/2.
    sound = sound + 0.5 * 10 ** (-rng.uniform(20, 40) / 20) * rng.standard_normal(length)
    fade = np.minimum(1.0, np.arange(1, length + 1) / (0.01 * sample_rate))
    sound = 0.5 * 10 ** (-rng.uniform(0, 12) / 20) * sound * fade * fade[::-1]
    return (np.round(np.clip(sound, -1, 1) * 32767) / 32768).astype(np.float32)


def _shifted(mask: NDArray[np.float64], dx: int, dy: int) -> NDArray[np.float64]:
    """`mask` moved by whole pixels; what comes in is empty, what leaves is lost."""
    size = mask.shape[0]
    out = np.zeros_like(mask)
    out[max(0, dy) : size + min(0, dy), max(0, dx) : size + min(0, dx)] = mask[
        max(0, -dy) : size - max(0, dy), max(0, -dx) : size - max(0, dx)
    ]
    return out


def _to_uint8(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
