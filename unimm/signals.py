# pyright: strict

"""What a document holds beside `str` and `PIL.Image`: sound, film, semantic pictures, turns.

A document is a list, for example `["seven", image, Audio(samples, 8000)]`. These classes carry
signals; turning them into integers is the work of `unimm.tokenizer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True, eq=False)
class Audio:
    """A sound.

    Args:
        samples: float tensor (C, T) in [-1, 1]; C is 1 (mono) or 2 (stereo).
        sample_rate: samples per second (Hz).

    Raises:
        ValueError: samples are not a finite float tensor (C, T) with 1 or 2 channels, or the rate
            is not positive.
    """

    samples: torch.Tensor
    sample_rate: int

    def __post_init__(self) -> None:
        samples = self.samples
        floating = str(getattr(samples, "dtype", "")).startswith(("torch.float", "torch.bfloat"))
        if not floating or samples.ndim != 2 or not 1 <= samples.shape[0] <= 2:
            raise ValueError(
                f"Audio.samples: expected a float tensor (channels 1 or 2, time), got "
                f"{_described(samples)}"
            )
        if self.sample_rate <= 0:
            raise ValueError(f"Audio.sample_rate: expected a positive rate, got {self.sample_rate}")
        # The ends tell of NaN and infinity: 2.8 us against 15 of isfinite, for 5,131 samples.
        if samples.numel() and not all(isfinite(end) for end in samples.aminmax()):
            raise ValueError("Audio.samples: holds NaN or infinite values; repair the sound first")

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.samples.shape[1] / self.sample_rate

    def __repr__(self) -> str:
        channels, time = self.samples.shape
        return f"Audio({channels} x {time} samples, {self.sample_rate} Hz, {self.seconds:.3f} s)"

    def _repr_html_(self) -> str:
        # Imported here, as below: pictures are drawn in notebooks alone, and torch loads late.
        from unimm.display import media

        caption = f"{self.seconds:.2f} s, {self.sample_rate} Hz"
        return media.sound(self.samples.detach().float().cpu().numpy(), self.sample_rate, caption)


@dataclass(frozen=True, eq=False)
class Video:
    """A film.

    Args:
        frames: uint8 tensor (T, H, W, 3), T at least 1.
        fps: frames per second.

    Raises:
        ValueError: frames are not a uint8 tensor (T, H, W, 3), one side is 0, or fps is not a
            positive number.
    """

    frames: torch.Tensor
    fps: float

    def __post_init__(self) -> None:
        frames = self.frames
        is_bytes = str(getattr(frames, "dtype", "")) == "torch.uint8"
        if not is_bytes or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(
                f"Video.frames: expected a uint8 tensor (frames, height, width, 3), got "
                f"{_described(frames)}"
            )
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"Video.fps: expected a positive frame rate, got {self.fps}")

    def __repr__(self) -> str:
        time, height, width, _ = self.frames.shape
        return f"Video({time} frames of {height} x {width}, {self.fps:g} fps)"

    def _repr_html_(self) -> str:
        from unimm.display import media

        time, height, width, _ = self.frames.shape
        caption = f"{time} frames of {width} x {height}, {self.fps:g} fps"
        return media.film(self.frames.cpu().numpy(), self.fps, caption)


@dataclass(frozen=True, eq=False)
class Semantic:
    """A picture to be written as semantic tokens, one per region, instead of a raster of codes."""

    image: Image.Image

    def __repr__(self) -> str:
        width, height = self.image.size
        return f"Semantic({height} x {width} picture)"

    def _repr_html_(self) -> str:
        from unimm.display import media

        width, height = self.image.size
        return media.picture(self.image, f"{width} x {height}, by regions")


@dataclass(frozen=True)
class Turn:
    """The beginning of a turn in a conversation: what follows was said by `role`."""

    role: Literal["user", "assistant"]

    def __post_init__(self) -> None:
        if self.role not in ("user", "assistant"):
            raise ValueError(f"Turn.role: expected 'user' or 'assistant', got {self.role!r}")


def _described(value: object) -> str:
    shape = getattr(value, "shape", None)
    if shape is None:
        return f"a {type(value).__name__}"
    kind = f"{type(value).__module__}.{type(value).__name__}".partition(".")[0]
    return f"a {kind} array of {getattr(value, 'dtype', '?')}, shape {tuple(shape)}"


Item: TypeAlias = "str | Image.Image | Audio | Video | Semantic | Turn"
Document: TypeAlias = "list[Item]"
