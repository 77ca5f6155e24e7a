"""The protocol: how signals are prepared, given to codecs, taken back and compared.

Every codec is measured against one reference, which the protocol alone makes of an item: a picture
of at most `max_side`, a sound at `sample_rate`, a film at `fps`. What a codec needs otherwise (its
own sample rate, grey, stereo, one fixed size) is made of the reference for it, and undone before
measuring, so that what a codec leaves out counts as lost, and all codecs stand in one table.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from PIL import Image
from torch import Tensor

from unimm.evaluation.metrics import CODEC_RANGE
from unimm.signals import Audio, Item, Semantic, Video
from unimm.tokenizer import MAX_PIXELS, modality_of
from unimm_tokenizers.codec import Codec

# What cannot be chosen, said all the same: results carry it.
_RULES = {
    "resize": "bicubic, antialiased, shorter side; smaller signals stay",
    "crop": "centre",
    "signal_range": [-1, 1],
    "data_range": CODEC_RANGE,
    "clip": "decoded signals are clipped to [-1, 1], not rounded to 8 bits",
    "mean": "once, over samples; failed samples count in no mean",
    "rate": "bits at fixed length; of classical codecs every byte of the file",
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How signals are prepared and what is kept; stored with the results.

    Args:
        split: a name for the reference data, such as "photos 800-899".
        max_side: pictures and films whose shorter side is longer are reduced to it (bicubic,
            antialiased) and cropped to the central square; None leaves them as they are.
        sample_rate: Hz at which sounds are compared.
        channels: 1 compares the mean of a sound's channels, 2 both.
        max_seconds: only the beginning of longer sounds is coded; None takes all.
        max_delay: seconds by which a decoded sound is shifted, at most, to where it fits best;
            0 compares as it comes.
        fps: frames per second at which films are taken; None takes their own.
        max_frames: only the first frames of longer films are coded; None takes all.
        speech: pattern of the keys of samples that are speech: PESQ, STOI, ViSQOL and word error
            rates are taken of these alone.
        extras: further measures, each left out with its reason where its package is missing:
            "pesq_wb", "pesq_nb", "stoi", "visqol".
        exactness: samples per codec and modality on which exactness is checked; 0 checks nothing.
        probes: measure how predictable the codes are.
        limit: samples per modality, the first ones; None takes all.
        max_failed: share of failed samples above which `Results.check` refuses.
        examples: samples per codec and modality that are kept for the report.
        seed: of the bootstrap and of the probes.
    """

    split: str = ""
    max_side: int | None = 256
    sample_rate: int = 16000
    channels: int = 1
    max_seconds: float | None = 10.0
    max_delay: float = 0.0
    fps: float | None = 10.0
    max_frames: int | None = 17
    speech: str = "*speech*"
    extras: tuple[str, ...] = ("pesq_wb", "pesq_nb", "stoi")
    exactness: int = 2
    probes: bool = True
    limit: int | None = None
    max_failed: float = 0.01
    examples: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("max_side", "sample_rate", "max_seconds", "fps", "max_frames", "limit")
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"protocol: {name} must be positive or None, got {value}")
        if self.channels not in (1, 2):
            raise ValueError(f"protocol: channels must be 1 or 2, got {self.channels}")
        known = ("pesq_wb", "pesq_nb", "stoi", "visqol")
        unknown = [name for name in self.extras if name not in known]
        if unknown:
            hint = "; say pesq_wb or pesq_nb: they differ" if unknown[0] == "pesq" else ""
            raise ValueError(f"protocol: extra {unknown[0]!r} is none of {', '.join(known)}{hint}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, with the rules that cannot be chosen."""
        return {**dataclasses.asdict(self), "extras": list(self.extras), "rules": _RULES}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Protocol:
        """What `to_dict` gave.

        Raises:
            ValueError: it was measured under other rules, which no longer exist.
        """
        stored = dict(data)
        rules = stored.pop("rules", None)
        if rules != _RULES:
            raise ValueError("protocol: measured under other rules; measure again")
        return cls(**{**stored, "extras": tuple(stored["extras"])})

    def difference(self, other: Protocol) -> str | None:
        """The first setting that makes figures of the two incomparable; None if there is none."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name not in ("examples", "max_failed") and mine != theirs:
                return f"protocol.{field.name} is {mine!r} in one and {theirs!r} in the other"
        return None

    def is_speech(self, key: str) -> bool:
        """Whether a sample is speech, by its key."""
        return fnmatch(key, self.speech)

    def rate_of(self, modality: str) -> float:
        """Reference units per second: of sounds samples, of films frames."""
        return float(self.sample_rate) if modality == "audio" else self.fps or 1.0


def reference(item: Item, protocol: Protocol) -> Tensor:
    """An item -> what all codecs are measured against: float (1, C, *signal) in [-1, 1].

    Raises:
        ValueError: the item is nothing that a codec takes.
    """
    if isinstance(item, Audio):
        return _sound(item, protocol)[None]
    if isinstance(item, Video):
        frames = item.frames
        if protocol.fps is not None and abs(item.fps / protocol.fps - 1) > 1e-3:
            count = max(1, round(len(frames) * protocol.fps / item.fps))
            chosen = (torch.arange(count) * item.fps / protocol.fps).long()
            frames = frames[chosen.clamp(max=len(frames) - 1)]
        if protocol.max_frames is not None:
            frames = frames[: protocol.max_frames]
        film = frames.permute(3, 0, 1, 2).float() / 127.5 - 1
        return _square(film, protocol.max_side)[None]
    picture = item.image if isinstance(item, Semantic) else item
    if not isinstance(picture, Image.Image):
        raise ValueError(f"a benchmark takes pictures, sounds and films, not {modality_of(item)}")
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"picture of {picture.width} x {picture.height} pixels is too large")
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    return _square(pixels.float() / 127.5 - 1, protocol.max_side)[None]


def _sound(audio: Audio, protocol: Protocol) -> Tensor:
    samples = audio.samples.float()
    if protocol.max_seconds is not None:
        samples = samples[:, : round(protocol.max_seconds * audio.sample_rate)]
    if not samples.shape[1]:
        raise ValueError("the sound has no samples")
    samples = _channels(samples[None], protocol.channels)[0]
    return _resampled(samples, audio.sample_rate, protocol.sample_rate).clamp(-1, 1)


def _channels(sound: Tensor, count: int) -> Tensor:
    """(B, C, T) -> (B, count, T): the mean of other channels, repeated."""
    return sound if sound.shape[1] == count else sound.mean(1, keepdim=True).expand(-1, count, -1)


def _resampled(sound: Tensor, rate: int, wanted: int) -> Tensor:
    return sound if rate == wanted else torchaudio.functional.resample(sound, rate, wanted)


def _square(signal: Tensor, side: int | None) -> Tensor:
    """Reduce (C, [T,] H, W) to a shorter side of `side` and crop the middle; smaller ones stay."""
    height, width = signal.shape[-2:]
    if side is None or min(height, width) <= side:
        return signal
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    reduced = _resized(signal[None], size)[0]
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return reduced[..., top : top + side, left : left + side]


def _resized(signal: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, [T,] H, W) -> the same of another height and width, in [-1, 1]."""
    planes = signal.reshape(1, -1, *signal.shape[-2:])
    made = F.interpolate(planes, size, mode="bicubic", antialias=True).clamp(-1, 1)
    return made.reshape(*signal.shape[:-2], *size)


def given(real: Tensor, codec: Codec, protocol: Protocol) -> Tensor:
    """The reference (1, C, *signal) in the form that a codec takes."""
    if codec.sample_rate is not None:
        sound = _resampled(real, protocol.sample_rate, codec.sample_rate)
        return _channels(sound, codec.num_channels).clamp(-1, 1)
    side = getattr(codec.config, "image_size", None)
    if side is not None and real.shape[-2:] != (side, side):
        real = _resized(real, (side, side))
    if codec.num_channels == 1:  # ITU-R BT.601, as Pillow's grey
        red, green, blue = real.unbind(dim=1)
        return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]
    return real


def taken(made: Tensor, signal: Tensor, real: Tensor, codec: Codec, protocol: Protocol) -> Tensor:
    """What a codec decoded, in the form of the reference.

    Args:
        made: decoded, (1, C, *signal).
        signal: what the codec was given.
        real: the reference, whose shape the answer has.
        codec: whose form is undone.
        protocol: clip, sample rate, delay.

    Raises:
        ValueError: the codec gave back another size than it was given.
    """
    if made.shape != signal.shape:
        raise ValueError(
            f"decoded {tuple(made.shape)} of {tuple(signal.shape)}: a codec must honour `size`; "
            f"nothing is cropped to fit"
        )
    made = made.float().clamp(-1, 1)
    if codec.sample_rate is not None:
        sound = _resampled(made, codec.sample_rate, protocol.sample_rate)
        count = real.shape[-1]  # resampling there and back rounds the length up, never down
        sound = _channels(sound[..., :count], real.shape[1]).clamp(-1, 1)
        return _aligned(sound, real, round(protocol.max_delay * protocol.sample_rate))
    if made.shape[-2:] != real.shape[-2:]:
        made = _resized(made, (real.shape[-2], real.shape[-1]))
    return made.expand_as(real)


def _aligned(made: Tensor, real: Tensor, most: int) -> Tensor:
    """Shift (1, C, T) by the delay of at most `most` samples that correlates best."""
    if most <= 0:
        return made
    size = made.shape[-1] + most
    spectrum = (
        torch.fft.rfft(made.double(), 2 * size) * torch.fft.rfft(real.double(), 2 * size).conj()
    )
    scores = torch.fft.irfft(spectrum, 2 * size).sum(dim=(0, 1))
    delays = torch.arange(-most, most + 1)
    delay = int(delays[scores[delays].argmax()])
    shifted = F.pad(made, (max(0, -delay), max(0, delay)))
    return shifted[..., max(0, delay) : max(0, delay) + made.shape[-1]]
