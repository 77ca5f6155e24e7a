"""Bytes of one file -> text, JSON, array, picture, sound or film; one decoder per extension.

Nothing here can run code, and every size is checked before memory is spent on it. A file that is
empty, cut, damaged or too large is a `MediaError` that names where it stands. What some readers
pass over in silence is refused: a WAV or MP3 shorter than its header says, an Ogg stream without
its last page, a film with fewer frames than its container promises.
"""

from __future__ import annotations

import io
import json
import math
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from unimm.signals import Audio, Video
from unimm.tokenizer import MAX_PIXELS

MAX_FRAMES = 16384
MAX_FILM_PIXELS = 2**28  # of all frames together: 768 MiB of uint8 RGB
MAX_SOUND_VALUES = 2**27  # samples times channels: 512 MiB of float32, 46 minutes of 48 kHz
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
_GIF_DEFAULT_SECONDS = 0.1  # what browsers show for a frame without a duration


class MediaError(ValueError):
    """A file that can't be used.

    Args:
        where: shard and key, or path.
        reason: what is wrong.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:
        # Exceptions are rebuilt from their message otherwise, which fails between processes.
        return type(self), (self.where, self.reason)


def decode(extension: str, data: bytes, where: str) -> Any:
    """Decode a file by its extension ("png"; of "left.png" the last part counts).

    Args:
        extension: without a leading dot.
        data: the whole file.
        where: shard and key, for messages.

    Returns:
        str (txt), plain data (json), a numpy array (npy), a PIL picture, Audio or Video.

    Raises:
        MediaError: the extension is unknown, or the file is empty, damaged or too large.
        ModuleNotFoundError: an mp4 or webm without PyAV.
    """
    suffix = extension.rpartition(".")[2].lower()
    if suffix not in _DECODERS:
        known = ", ".join(_DECODERS)
        raise MediaError(where, f"no decoder for .{extension}; known are {known}")
    if not data and suffix != "txt":
        raise MediaError(where, f".{extension} is empty")
    try:
        return _DECODERS[suffix](data)
    except _Damaged as error:
        raise MediaError(where, f".{extension}: {error}") from None


class _Damaged(Exception):
    """Why a file can't be used, before it is known where it stands."""


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _Damaged(f"not UTF-8 ({error.reason} at byte {error.start})") from None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"not valid JSON ({error})") from None


def _npy(data: bytes) -> NDArray[Any]:
    """NumPy's format 1.0 to 3.0, without objects; size checked before memory is taken."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(stream)
    except ValueError as error:
        raise _Damaged(f"not a NumPy file ({str(error).splitlines()[0]})") from None
    start, size = stream.tell(), math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise _Damaged("holds Python objects, which are never loaded")
    if len(data) - start != size:
        raise _Damaged(f"{len(data) - start} bytes of data, its header says {size}")
    array = np.frombuffer(data, dtype, offset=start)
    return array.reshape(shape, order="F" if fortran else "C")


def _open_picture(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow only warns from 85 Mi pixels on; the bound below is lower, and an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise _Damaged(f"not a picture ({', '.join(formats)})") from None
    except Image.DecompressionBombError:
        raise _Damaged(f"more than the {MAX_PIXELS} pixels that are allowed") from None
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise _Damaged(f"damaged picture ({error})") from None
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise _Damaged(f"{width} x {height} pixels; at most {MAX_PIXELS} are allowed")
    return picture


def _picture(data: bytes) -> Image.Image:
    picture = _open_picture(data, _PICTURE_FORMATS)
    try:
        picture.load()
        upright = ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise _Damaged(f"damaged picture ({error})") from None
    if upright.mode.startswith("I;16"):  # Pillow would cut 16-bit greys at 255
        return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return upright


def _sound(data: bytes) -> Audio:
    _require_whole_sound(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            promised, channels, rate = file.frames, file.channels, file.samplerate
            if promised * channels > MAX_SOUND_VALUES:
                raise _Damaged(
                    f"{promised / rate:.0f} s of {channels} channels; at most {MAX_SOUND_VALUES} "
                    f"values are read"
                )
            samples = file.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise _Damaged(f"damaged sound ({error.error_string})") from None
    if len(samples) == 0:
        raise _Damaged("the sound has no samples")
    if len(samples) != promised:
        raise _Damaged(f"cut: {len(samples)} of {promised} samples")
    if not np.isfinite(samples).all():
        raise _Damaged("the sound holds NaN or infinite values")
    if channels > 2:
        raise _Damaged(f"{channels} channels; 1 or 2 are read")
    return Audio(torch.from_numpy(np.ascontiguousarray(samples.T)), rate)


def _require_whole_sound(data: bytes) -> None:
    """Find cuts that libsndfile 1.2 reads as a shorter sound."""
    if data[:4] == b"RIFF":
        at = 12
        while at + 8 <= len(data):
            (size,) = struct.unpack_from("<I", data, at + 4)
            # Writers that stream leave the size open, as 0 or all ones.
            if data[at : at + 4] == b"data" and size in (0, 0xFFFFFFFF):
                return
            at += 8 + size + size % 2
        if at > len(data) + 1:  # some writers leave out the last chunk's padding byte
            raise _Damaged(f"cut: {len(data)} bytes of at least {at - 1}")
    elif data[:4] == b"OggS":
        last = data.rfind(b"OggS")
        segments = data[last + 26] if last + 27 <= len(data) else 255
        end = last + 27 + segments
        body = sum(data[last + 27 : end])
        if end + body > len(data) or not data[last + 5] & 4:
            raise _Damaged("cut: the last Ogg page is missing")


def _gif(data: bytes) -> Video:
    film = _open_picture(data, ("GIF",))
    if not data.rstrip(b"\0").endswith(b";"):
        raise _Damaged("cut: the film's end mark is missing")
    frames: list[NDArray[np.uint8]] = []
    seconds = 0.0
    try:
        for frame in ImageSequence.Iterator(film):
            _require_film_size(len(frames) + 1, film.height, film.width)
            frames.append(np.array(frame.convert("RGB")))
            # Pillow leaves out the duration where it is 0.
            seconds += frame.info.get("duration", 0) / 1000 or _GIF_DEFAULT_SECONDS
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error) as error:
        raise _Damaged(f"damaged film ({error})") from None
    return Video(torch.from_numpy(np.stack(frames)), len(frames) / seconds)


def _require_film_size(frames: int, height: int, width: int) -> None:
    if frames > MAX_FRAMES or frames * height * width > MAX_FILM_PIXELS:
        raise _Damaged(
            f"a film of {frames} or more frames of {height} x {width}; at most {MAX_FRAMES} "
            f"frames and {MAX_FILM_PIXELS} pixels are read"
        )


def _film(data: bytes) -> Video:
    try:
        import av
        import av.error
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "films as .mp4 or .webm need PyAV: pip install 'unimm[video]'"
        ) from None
    _require_whole_film(data)
    frames: list[NDArray[np.uint8]] = []
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            stream = next(iter(container.streams.video), None)
            if stream is None:
                raise _Damaged("the container holds no film")
            promised, rate = stream.frames, stream.average_rate
            _require_film_size(max(promised, 1), stream.height, stream.width)
            for frame in container.decode(stream):
                _require_film_size(len(frames) + 1, frame.height, frame.width)
                frames.append(np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8))
    except (av.error.FFmpegError, ValueError) as error:
        raise _Damaged(f"damaged film ({error})") from None
    if not frames:
        raise _Damaged("the film has no frames")
    if len(frames) < promised:
        raise _Damaged(f"cut: {len(frames)} of {promised} frames")
    if not rate or any(frame.shape != frames[0].shape for frame in frames):
        raise _Damaged("the film has no frame rate, or frames of several sizes")
    return Video(torch.from_numpy(np.stack(frames)), float(rate))


def _require_whole_film(data: bytes) -> None:
    """Find cuts that FFmpeg reads as a shorter film."""
    if data[4:8] == b"ftyp":  # ISO 14496-12: boxes, each a length and a type
        at = 0
        while at + 16 <= len(data):
            (size,) = struct.unpack_from(">I", data, at)
            if size == 0:  # up to the end of the file
                return
            at += struct.unpack_from(">Q", data, at + 8)[0] if size == 1 else max(size, 8)
        if at > len(data):
            raise _Damaged(f"cut: {len(data)} of {at} bytes")
    elif data[:4] == b"\x1aE\xdf\xa3":  # RFC 8794: an EBML header, then one segment
        start, size = _ebml_size(data, 4)
        start, size = _ebml_size(data, start + (size or 0) + 4)
        if size is not None and start + size > len(data):
            raise _Damaged(f"cut: {len(data)} of {start + size} bytes")


def _ebml_size(data: bytes, at: int) -> tuple[int, int | None]:
    """Where an element's content begins, and its length; None where the writer left it open."""
    if at >= len(data) or not data[at]:
        raise _Damaged("damaged film (no EBML length)")
    width = 9 - data[at].bit_length()
    ones = (1 << 7 * width) - 1
    size = int.from_bytes(data[at : at + width], "big") & ones
    return at + width, None if size == ones else size


_DECODERS: Mapping[str, Callable[[bytes], Any]] = {
    "txt": _text,
    "json": _json,
    "npy": _npy,
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), _picture),
    **dict.fromkeys(("wav", "flac", "ogg", "mp3"), _sound),
    "gif": _gif,
    **dict.fromkeys(("mp4", "webm"), _film),
}


def _extensions(*decoders: Callable[[bytes], Any]) -> Iterator[str]:
    return (name for name, decoder in _DECODERS.items() if decoder in decoders)


PICTURES = tuple(_extensions(_picture))
SOUNDS = tuple(_extensions(_sound))
FILMS = tuple(_extensions(_gif, _film))
EXTENSIONS = tuple(_DECODERS)
