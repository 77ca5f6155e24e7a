"""Film files, whole or in blocks: GIF through Pillow, MP4 and WebM through PyAV.

Frames are counted from the file's structure before the first one is decoded, so a film of a hundred
thousand frames is refused at once. What some readers pass over in silence is refused too: a GIF
without its end mark, a container shorter than it says, fewer frames than it promises.
"""

from __future__ import annotations

import io
import struct
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageSequence
from torch import Tensor

from unimm.data.damage import Damaged

MAX_FRAMES = 16384  # 27 minutes at 10 frames per second
MAX_FRAME_PIXELS = 2**23  # height times width: 8K film has four times as many, 4K fits
MAX_FILM_PIXELS = 2**28  # of all frames of a film read whole: 768 MiB of uint8 RGB
_GIF_DEFAULT_CENTISECONDS = 10  # what browsers show for a frame without a duration
_Frame = NDArray[np.uint8]


class FilmReader(ABC):
    """An opened film: what its structure says; its frames are read once, when asked for.

    frames: an upper bound of their number, exact for GIF. height, width: in pixels. fps: frames
    per second.
    """

    frames: int
    height: int
    width: int
    fps: float

    @property
    def values(self) -> int:
        """Colour values of all frames together."""
        return 3 * self.frames * self.height * self.width

    @abstractmethod
    def _decoded(self) -> Iterator[_Frame]:
        """Frame after frame, uint8 (H, W, 3)."""

    def blocks(self, size: int) -> Iterator[Tensor]:
        """The frames, uint8 (n, H, W, 3) with n at most `size`, in order.

        Raises:
            Damaged: a frame is damaged or missing, or of another size than the others.
        """
        done, held = 0, 0
        block = self._empty(size)
        for frame in self._decoded():
            if frame.shape != block.shape[1:]:
                raise Damaged("the film has frames of several sizes")
            if done + held == self.frames:
                raise Damaged(f"more frames than the {self.frames} that its structure shows")
            block[held] = frame
            held += 1
            if held == len(block):
                yield torch.from_numpy(block)
                done, held, block = done + held, 0, self._empty(size)
        if held:
            yield torch.from_numpy(block[:held])
        if done + held == 0:
            raise Damaged("the film has no frames")

    def _empty(self, size: int) -> _Frame:
        return np.empty((min(size, self.frames), self.height, self.width, 3), dtype=np.uint8)

    def whole(self) -> Tensor:
        """All frames, uint8 (T, H, W, 3).

        Raises:
            Damaged: as `blocks`, or more pixels than are read at once.
        """
        if self.frames * self.height * self.width > MAX_FILM_PIXELS:
            raise Damaged(
                f"a film of {self.frames} frames of {self.height} x {self.width}; at most "
                f"{MAX_FILM_PIXELS} pixels are read"
            )
        (frames,) = self.blocks(self.frames)
        return frames

    def _require_size(self) -> None:
        if self.frames > MAX_FRAMES or self.height * self.width > MAX_FRAME_PIXELS:
            raise Damaged(
                f"a film of {self.frames} or more frames of {self.height} x {self.width}; at most "
                f"{MAX_FRAMES} frames of {MAX_FRAME_PIXELS} pixels are read"
            )
        if not self.height * self.width:
            raise Damaged("the film's frames have no pixels")


class GifReader(FilmReader):
    """A GIF, read by Pillow.

    Args:
        data: the whole file.

    Raises:
        Damaged: it is cut or no GIF, or has too many frames or pixels.
    """

    def __init__(self, data: bytes) -> None:
        if data[:4] != b"GIF8" or len(data) < 13:
            raise Damaged("not a picture (GIF)")
        self.width, self.height = struct.unpack_from("<HH", data, 6)
        delays = _gif_delays(data)
        self.frames = len(delays)
        self._require_size()
        if not delays:
            raise Damaged("the film has no frames")
        self.fps = 100 * len(delays) / sum(delays)
        self._data = data

    def _decoded(self) -> Iterator[_Frame]:
        try:
            with warnings.catch_warnings():
                # Pillow only warns from 85 Mi pixels on; the bound above is lower, and an error.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                film = Image.open(io.BytesIO(self._data), formats=("GIF",))
            found = 0
            for frame in ImageSequence.Iterator(film):
                found += 1
                yield np.asarray(frame.convert("RGB"))
        except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error) as error:
            raise Damaged(f"damaged film ({error})") from None
        if found != self.frames:
            raise Damaged(f"cut: {found} of {self.frames} frames")


def _gif_delays(data: bytes) -> list[int]:
    """Hundredths of a second of every frame, from the blocks of a GIF (GIF89a, section 12 on)."""
    delays: list[int] = []
    delay = 0
    at = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    try:
        while (kind := data[at]) != 0x3B:
            if kind == 0x2C:
                delays.append(delay or _GIF_DEFAULT_CENTISECONDS)
                if len(delays) > MAX_FRAMES:
                    return delays
                delay, flags = 0, data[at + 9]
                at += 11 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
            elif kind == 0x21:
                if data[at + 1] == 0xF9:
                    (delay,) = struct.unpack_from("<H", data, at + 4)
                at += 2
            elif kind == 0:  # some writers fill up with zeros between blocks
                at += 1
                continue
            else:
                raise Damaged(f"damaged film (no block begins with {kind:#04x})")
            while size := data[at]:
                at += 1 + size
            at += 1
    except (IndexError, struct.error):
        raise Damaged("cut: the film's end mark is missing") from None
    return delays


class ContainerReader(FilmReader):
    """An MP4 or a WebM, read by PyAV.

    Args:
        data: the whole file.

    Raises:
        Damaged: it is cut or no film, or has too many frames or pixels.
        ModuleNotFoundError: PyAV is missing.
    """

    def __init__(self, data: bytes) -> None:
        try:
            import av
            import av.error
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "films as .mp4 or .webm need PyAV: pip install 'unimm[video]'"
            ) from None
        _require_whole(data)
        self._av, self._data = av, data
        try:
            with av.open(io.BytesIO(data), mode="r") as container:
                stream = next(iter(container.streams.video), None)
                if stream is None:
                    raise Damaged("the container holds no film")
                self.height, self.width = stream.height, stream.width
                if not stream.average_rate:
                    raise Damaged("the film has no frame rate")
                self.fps = float(stream.average_rate)
                self._promised = self.frames = stream.frames
                if not self.frames:  # WebM does not say: a packet holds one frame at most
                    for packet in container.demux(stream):
                        self.frames += packet.size > 0
                        if self.frames > MAX_FRAMES:
                            break
        except (av.error.FFmpegError, ValueError) as error:
            raise Damaged(f"damaged film ({error})") from None
        self._require_size()

    def _decoded(self) -> Iterator[_Frame]:
        found = 0
        try:
            with self._av.open(io.BytesIO(self._data), mode="r") as container:
                for frame in container.decode(container.streams.video[0]):
                    found += 1
                    if (frame.height, frame.width) != (self.height, self.width):
                        raise Damaged("the film has frames of several sizes")
                    yield np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
        except (self._av.error.FFmpegError, ValueError) as error:
            raise Damaged(f"damaged film ({error})") from None
        if found < self._promised:
            raise Damaged(f"cut: {found} of {self._promised} frames")


def _require_whole(data: bytes) -> None:
    """Find cuts that FFmpeg reads as a shorter film."""
    if data[4:8] == b"ftyp":  # ISO 14496-12: boxes, each a length and a type
        at = 0
        while at + 16 <= len(data):
            (size,) = struct.unpack_from(">I", data, at)
            if size == 0:  # up to the end of the file
                return
            at += struct.unpack_from(">Q", data, at + 8)[0] if size == 1 else max(size, 8)
        if at > len(data):
            raise Damaged(f"cut: {len(data)} of {at} bytes")
    elif data[:4] == b"\x1aE\xdf\xa3":  # RFC 8794: an EBML header, then one segment
        start, size = _ebml_size(data, 4)
        start, size = _ebml_size(data, start + (size or 0) + 4)
        if size is not None and start + size > len(data):
            raise Damaged(f"cut: {len(data)} of {start + size} bytes")


def _ebml_size(data: bytes, at: int) -> tuple[int, int | None]:
    """Where an element's content begins, and its length; None where the writer left it open."""
    if at >= len(data) or not data[at]:
        raise Damaged("damaged film (no EBML length)")
    width = 9 - data[at].bit_length()
    ones = (1 << 7 * width) - 1
    size = int.from_bytes(data[at : at + width], "big") & ones
    return at + width, None if size == ones else size
