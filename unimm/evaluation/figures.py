"""Pictures of what a model reads and writes: PNG, WebP, WAV and SVG, without a plotting library.

Everything here turns arrays and signals into `PIL.Image`s, bytes, or SVG text. Lines and bars take
their colours from the CSS variables of the page that holds them (`--s1` ... `--s10`, `--ink`,
`--grid`), so that one chart serves light and dark.
"""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import ceil, floor, isfinite, log10

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimm.evaluation.metrics import magnitudes, mel_filters
from unimm.signals import Audio, Video

# Twelve points of a perceptually even map from dark violet over teal to yellow.
_COLOUR_MAP = np.array(
    [
        (68, 1, 84),
        (72, 33, 115),
        (67, 62, 133),
        (56, 88, 140),
        (45, 112, 142),
        (37, 133, 142),
        (30, 155, 138),
        (42, 176, 127),
        (82, 197, 105),
        (134, 213, 73),
        (194, 223, 35),
        (253, 231, 37),
    ],
    dtype=np.float64,
)
SERIES_COLOURS = 10
_GOLDEN = 0.618033988749895  # its multiples spread evenly over the colour circle


def colour_map(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1], any shape -> uint8 (*shape, 3); outside is clipped."""
    place = np.clip(values, 0, 1) * (len(_COLOUR_MAP) - 1)
    below = np.minimum(place.astype(np.int64), len(_COLOUR_MAP) - 2)
    part = (place - below)[..., None]
    mixed = _COLOUR_MAP[below] * (1 - part) + _COLOUR_MAP[below + 1] * part
    return mixed.round().astype(np.uint8)


def code_colours(codes: np.ndarray) -> np.ndarray:
    """Codes, any shape -> uint8 (*shape, 3): one colour per id; padding (negative) is grey."""
    hue = np.mod(codes * _GOLDEN, 1.0)
    # Neighbouring multiples of the golden ratio can look alike: value and saturation differ too.
    value = 0.62 + 0.36 * (np.mod(codes * 7, 5) / 4)
    saturation = 0.45 + 0.4 * (np.mod(codes * 11, 3) / 2)
    sector = np.mod(hue[..., None] * 6 + np.array([5.0, 3.0, 1.0]), 6)
    wave_ = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    colours = value[..., None] * (1 - saturation[..., None] * wave_)
    colours = (colours * 255).round().astype(np.uint8)
    colours[codes < 0] = 128
    return colours


def token_grid(codes: Tensor | np.ndarray, cell: int = 12) -> Image.Image:
    """Codes (h, w), or (K, t) of a sound, as squares of `cell` pixels, one colour per id.

    Raises:
        ValueError: codes are not two-dimensional, or there are none.
    """
    grid = np.asarray(codes)
    if grid.ndim != 2 or not grid.size:
        raise ValueError(f"token grid: expected codes (rows, columns), got shape {grid.shape}")
    pixels = code_colours(grid.astype(np.int64)).repeat(cell, axis=0).repeat(cell, axis=1)
    if cell >= 6:  # a hair of the darker kind between squares, so that equal neighbours can be told
        pixels[::cell] = pixels[::cell] // 2
        pixels[:, ::cell] = pixels[:, ::cell] // 2
    return Image.fromarray(pixels)


def contact_sheet(
    images: Sequence[Image.Image], columns: int = 8, gap: int = 2, scale: int = 1
) -> Image.Image:
    """Pictures side by side, row by row, each enlarged `scale` times without smoothing.

    Raises:
        ValueError: there are no pictures.
    """
    if not images:
        raise ValueError("contact sheet: there are no pictures to show")
    width = max(image.width for image in images) * scale
    height = max(image.height for image in images) * scale
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Image.new("RGB", size, (128, 128, 128))
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        enlarged = image.convert("RGB").resize(
            (image.width * scale, image.height * scale), Image.Resampling.NEAREST
        )
        sheet.paste(enlarged, (column * (width + gap), row * (height + gap)))
    return sheet


def film_strip(video: Video, frames: int = 9, gap: int = 1) -> Image.Image:
    """Up to `frames` evenly spaced frames side by side."""
    count = min(frames, len(video.frames))
    chosen = np.linspace(0, len(video.frames) - 1, count).round().astype(int)
    pictures = [Image.fromarray(video.frames[int(i)].cpu().numpy()) for i in chosen]
    return contact_sheet(pictures, columns=count, gap=gap)


def error_map(made: Image.Image, real: Image.Image, full_scale: int = 64) -> Image.Image:
    """Largest difference over the colours at each pixel; `full_scale` of 255 is the brightest.

    Raises:
        ValueError: the pictures have different sizes.
    """
    if made.size != real.size:
        raise ValueError(f"error map: pictures of {made.size} and {real.size}; crop them alike")
    arrays = [np.asarray(image.convert("RGB"), dtype=np.int16) for image in (made, real)]
    return Image.fromarray(colour_map(np.abs(arrays[0] - arrays[1]).max(axis=-1) / full_scale))


def region_overlay(image: Image.Image, regions: Tensor | np.ndarray) -> Image.Image:
    """A picture under the colours of its regions, (h, w) of region ids; one colour per id.

    Raises:
        ValueError: regions are not two-dimensional, or there are none.
    """
    grid = np.asarray(regions)
    if grid.ndim != 2 or not grid.size:
        raise ValueError(f"region overlay: expected ids (rows, columns), got shape {grid.shape}")
    colours = Image.fromarray(code_colours(grid.astype(np.int64)))
    layer = colours.resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("RGB"), layer, 0.5)


def spectrogram(audio: Audio, *, bands: int = 64, columns: int = 240) -> Image.Image:
    """Log-mel spectrogram, low frequencies below, 70 dB from the loudest cell down.

    Args:
        audio: any sound; an empty one gives one dark column.
        bands: mel bands, the height in pixels.
        columns: the width in pixels at most; neighbouring frames are averaged.
    """
    samples = audio.samples.detach().float().mean(dim=0, keepdim=True)[None]
    # 32 ms: tones a semitone apart at 700 Hz are told from each other, syllables too.
    window = 1 << max(6, round(audio.sample_rate * 0.032).bit_length() - 1)
    samples = torch.nn.functional.pad(samples, (0, max(0, window - samples.shape[-1])))
    power = magnitudes(samples, window)[0, 0].square()
    # Fewer bands than bins: at low rates narrow filters would fall between two bins.
    filters = mel_filters(audio.sample_rate, window, min(bands, window // 8))
    mel = (filters @ power).clamp_min(1e-12)
    if mel.shape[1] > columns:
        mel = torch.nn.functional.adaptive_avg_pool1d(mel[None], columns)[0]
    level = 10 * mel.log10()
    shade = ((level - level.max()) / 70 + 1).clamp(0, 1)
    pixels = colour_map(shade.numpy()[::-1])
    repeat = max(1, bands // len(pixels))
    return Image.fromarray(np.ascontiguousarray(pixels.repeat(repeat, axis=0)))


def png_bytes(image: Image.Image) -> bytes:
    """Lossless PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def webp_bytes(image: Image.Image, quality: int = 90) -> bytes:
    """Lossy WebP."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


def film_bytes(video: Video, *, lossless: bool = True) -> bytes:
    """Animated WebP without end; lossy is of quality 80, a tenth of the size."""
    first, *others = [Image.fromarray(frame.cpu().numpy()) for frame in video.frames]
    buffer = io.BytesIO()
    first.save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=others,
        duration=max(1, round(1000 / video.fps)),
        loop=0,
        lossless=lossless,
        quality=80,
    )
    return buffer.getvalue()


def wav_bytes(audio: Audio) -> bytes:
    """WAV, 16-bit PCM; samples outside [-1, 1] are clipped."""
    pcm = (audio.samples.detach().cpu().float().clamp(-1, 1) * 32767).round().short().T
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(audio.samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(audio.sample_rate)
        file.writeframes(pcm.contiguous().numpy().astype("<i2").tobytes())
    return buffer.getvalue()


def data_uri(data: bytes, media_type: str) -> str:
    """Bytes as a `data:` address, for pages that load nothing."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 36


def line_chart(
    series: Mapping[str, Points],
    *,
    x_label: str = "step",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = False,
) -> str:
    """Curves as SVG text, coloured in their order (ten at most); the page draws the legend.

    Args:
        series: name -> points (x, y); points that are not finite are left out.
        x_label: what stands below.
        y_label: what stands at the axis, with its unit.
        log_x: logarithmic axis; points at 0 or below are left out.
        log_y: likewise.
        markers: draw the points too.

    Raises:
        ValueError: there are no or more than ten series, or no point can be drawn.
    """
    if not 1 <= len(series) <= SERIES_COLOURS:
        raise ValueError(f"chart: {len(series)} series; draw 1 to {SERIES_COLOURS} at a time")
    shown = {
        name: [(x, y) for x, y in points if _drawable(x, log_x) and _drawable(y, log_y)]
        for name, points in series.items()
    }
    every = [point for points in shown.values() for point in points]
    if not every:
        raise ValueError(f"chart: no point of {', '.join(series)} can be drawn")
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    x_ticks = _log_ticks(left, right) if log_x else _ticks(left, right)
    lowest, highest = min(y for _, y in every), max(y for _, y in every)
    y_ticks = _log_ticks(lowest, highest) if log_y else _ticks(lowest, highest)
    to_x = _scale(x_ticks, _LEFT, _WIDTH - _RIGHT, log=log_x)
    to_y = _scale(y_ticks, _HEIGHT - _BOTTOM, _TOP, log=log_y)

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(f"{y_label} over {x_label}: {chr(44).join(series)}")}">'
    ]
    for tick in y_ticks:
        y = to_y(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" class="end">{_number(tick)}</text>')
    for tick in x_ticks:
        x = to_x(tick)
        place = "end" if tick == x_ticks[-1] else "mid"
        parts.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" class="{place}">{_number(tick)}</text>'
        )
    parts.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" class="mid">{escape(x_label)}</text>')
    if y_label:
        turn = f'transform="translate(11 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)"'
        parts.append(f'<text class="mid" {turn}>{escape(y_label)}</text>')
    for number, (name, points) in enumerate(shown.items(), start=1):
        drawn = [(to_x(x), to_y(y)) for x, y in _thinned(points)]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in drawn)
        title = f"<title>{escape(name)}</title>"
        if len(drawn) > 1:
            parts.append(f'<path class="line s{number}" d="M{line}">{title}</path>')
        if markers or len(drawn) == 1:
            for (x, y), (x_value, y_value) in zip(drawn, _thinned(points), strict=True):
                value = escape(f"{name}: {_number(x_value)}, {_number(y_value)}")
                parts.append(
                    f'<circle class="dot s{number}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
                    f"<title>{value}</title></circle>"
                )
    return "".join(parts) + "</svg>"


def _drawable(value: float, log: bool) -> bool:
    return isfinite(value) and (value > 0 or not log)


def _thinned(points: Points, most: int = 400) -> Points:
    """At most `most` points, evenly spaced, the last one among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, evenly spaced, that cover [low, high]."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        reach = abs(low) / 2 or 1.0
        low, high = low - reach, high + reach
    rough = (high - low) / about
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2 and 5 times powers of ten, or powers alone, that cover [low, high]."""
    first, last = floor(log10(low) + 1e-9), ceil(log10(high) - 1e-9)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    below = max((i for i, tick in enumerate(ticks) if tick <= low * 1.001), default=0)
    above = min((i for i, tick in enumerate(ticks) if tick >= high * 0.999), default=len(ticks) - 1)
    return ticks[below : max(above, below + 1) + 1]


def _scale(
    ticks: Sequence[float], start: float, stop: float, *, log: bool
) -> Callable[[float], float]:
    def place(value: float) -> float:
        return log10(value) if log else value

    low, high = place(ticks[0]), place(ticks[-1])
    return lambda value: start + (place(value) - low) / (high - low) * (stop - start)


def _number(value: float) -> str:
    """A tick's text: 12k for 12,000, four digits at most."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}".replace("e-0", "e-")
