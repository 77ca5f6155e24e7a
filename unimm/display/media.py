"""Pictures, sounds and films as HTML: data inside the page, nothing fetched.

Small pictures are enlarged by whole pixels. A sound longer than 30 s and a film of more than 64
frames are shown in part, and say so.
"""

from __future__ import annotations

import base64
import io
import wave
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from unimm.display.html import Raw, figure

MAX_SECONDS, MAX_FRAMES = 30.0, 64
LARGE = 128  # pixels; smaller pictures are enlarged to about this
SMALL = 512  # larger ones are shrunk to this
_WINDOW, _HOP = 256, 64
_FLOOR = 80.0  # dB below the loudest that a spectrogram shows


def picture(image: Image.Image, caption: str | None = None) -> str:
    """A PIL image; the caption is its size where none is given."""
    width, height = image.size
    caption = f"{width} x {height}" if caption is None else caption
    content = _image_tag(_encoded(_sized(image), "WEBP", lossless=True), "image/webp", caption)
    return figure(content, caption)


def film(frames: np.ndarray, fps: float, caption: str) -> str:
    """Frames uint8 (T, H, W, 3), moving."""
    pictures = [_sized(Image.fromarray(frame)) for frame in frames[:MAX_FRAMES]]
    if len(frames) > MAX_FRAMES:
        caption += f", the first {MAX_FRAMES} shown"
    data = _encoded(
        pictures[0],
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=max(1, round(1000 / fps)),
        loop=0,
        quality=90,
    )
    return figure(_image_tag(data, "image/webp", caption), caption)


def sound(samples: np.ndarray, sample_rate: int, caption: str) -> str:
    """Samples float (C, T) in [-1, 1]: a player under a spectrogram."""
    if samples.shape[1] == 0:
        return figure("(silence of no length)", caption)
    if samples.shape[1] > MAX_SECONDS * sample_rate:
        samples = samples[:, : int(MAX_SECONDS * sample_rate)]
        caption += f", the first {MAX_SECONDS:g} s shown"
    spectrum = _encoded(Image.fromarray(spectrogram(samples.mean(0))), "WEBP", lossless=True)
    player = (
        '<audio controls style="width:260px;display:block" '
        f'src="data:audio/wav;base64,{_base64(wav(samples, sample_rate))}"></audio>'
    )
    tag = _image_tag(spectrum, "image/webp", "spectrogram", "width:260px;height:80px")
    return figure(Raw(tag + player), caption)


def wav(samples: np.ndarray, sample_rate: int) -> bytes:
    """Samples (C, T) in [-1, 1] as a WAV file of 16 bits."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((samples.clip(-1, 1).T * 32767).round().astype("<i2").tobytes())
    return out.getvalue()


def spectrogram(samples: np.ndarray) -> np.ndarray:
    """Samples (T,) -> uint8 (129, frames), dB, low frequencies at the bottom."""
    padded = np.pad(samples, (_WINDOW // 2, _WINDOW))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(_WINDOW))) ** 2
    decibels = 10 * np.log10(power / max(power.max(), 1e-12) + 10 ** (-_FLOOR / 10))
    return ((decibels + _FLOOR) * (255 / _FLOOR)).clip(0, 255).astype(np.uint8).T[::-1].copy()


def code_grid(codes: np.ndarray, size: int) -> str:
    """Codes (h, w) of a codebook of `size`: each its own colour; negative ones are white."""
    # The golden angle sets neighbouring codes far apart on the wheel of hues.
    hue = (codes * 137.508 % 360 / 360 * 255).astype(np.uint8)
    light = (160 + codes * 90 // max(1, size)).clip(0, 255).astype(np.uint8)
    wheel = np.stack([hue, np.full_like(hue, 150), light], -1)
    pixels = np.asarray(Image.fromarray(wheel, "HSV").convert("RGB")).copy()
    pixels[codes < 0] = 255
    return picture(Image.fromarray(pixels), "")


def _sized(image: Image.Image) -> Image.Image:
    image = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
    longest = max(image.size)
    if longest > SMALL:
        image = image.copy()
        image.thumbnail((SMALL, SMALL))
    factor = max(1, round(LARGE / longest))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _image_tag(data: bytes, kind: str, alternative: str, style: str = "") -> str:
    source = f"data:{kind};base64,{_base64(data)}"
    return f'<img src="{source}" alt="{escape(alternative)}" style="{style}">'
