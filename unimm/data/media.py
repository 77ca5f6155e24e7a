"""Bytes of one file -> text, JSON, array, picture, sound or film; one decoder per extension.

Nothing here can run code, and every size is checked before memory is spent on it. A file that is
empty, cut, damaged or too large is a `MediaError` that names where it stands. Sounds and films can
also be opened alone (`open_media`) and read in blocks, so that long ones need little memory.
"""

from __future__ import annotations

import io
import json
import math
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from unimm.data.damage import Damaged, MediaError
from unimm.data.films import ContainerReader, FilmReader, GifReader
from unimm.data.sounds import SoundReader
from unimm.signals import Audio, Video
from unimm.tokenizer import MAX_PIXELS

__all__ = [
    "EXTENSIONS",
    "FILMS",
    "PICTURES",
    "SOUNDS",
    "LongFile",
    "MediaError",
    "OpenMedia",
    "decode",
    "open_media",
]

_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")


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
    suffix = _suffix(extension, data, where)
    try:
        return _whole(_READERS[suffix](data)) if suffix in _READERS else _DECODERS[suffix](data)
    except Damaged as error:
        raise MediaError(where, f".{extension}: {error}") from None


def _suffix(extension: str, data: bytes, where: str) -> str:
    suffix = extension.rpartition(".")[2].lower()
    if suffix not in EXTENSIONS:
        known = ", ".join(EXTENSIONS)
        raise MediaError(where, f"no decoder for .{extension}; known are {known}")
    if not data and suffix != "txt":
        raise MediaError(where, f".{extension} is empty")
    return suffix


class LongFile(NamedTuple):
    """A sound or film that is too long to be decoded at once: its file, to be opened later."""

    extension: str
    data: bytes
    where: str


class OpenMedia:
    """A sound or film that was opened; it is read once, in blocks or whole.

    Args:
        extension: of the file.
        where: shard and key, for messages.
        reader: the opened file.
    """

    def __init__(self, extension: str, where: str, reader: SoundReader | FilmReader) -> None:
        self.where = where
        self.reader = reader
        self.modality = "audio" if isinstance(reader, SoundReader) else "video"
        self._extension = extension

    def blocks(self, size: int) -> Iterator[torch.Tensor]:
        """Samples float32 (C, n) or frames uint8 (n, H, W, 3), with n at most `size`.

        Raises:
            MediaError: the file turns out to be damaged.
        """
        try:
            yield from self.reader.blocks(size)
        except Damaged as error:
            raise MediaError(self.where, f".{self._extension}: {error}") from None

    def whole(self) -> Audio | Video:
        """The item of a document.

        Raises:
            MediaError: the file turns out to be damaged, or is too large to be read at once.
        """
        try:
            return _whole(self.reader)
        except Damaged as error:
            raise MediaError(self.where, f".{self._extension}: {error}") from None


def open_media(extension: str, data: bytes, where: str) -> OpenMedia:
    """Open a sound or film by its extension; reads no more than its structure.

    Raises:
        MediaError: the file is no sound or film, or is empty, damaged or too large.
        ModuleNotFoundError: an mp4 or webm without PyAV.
    """
    suffix = _suffix(extension, data, where)
    if suffix not in _READERS:
        raise MediaError(where, f".{extension} is no sound or film")
    try:
        return OpenMedia(extension, where, _READERS[suffix](data))
    except Damaged as error:
        raise MediaError(where, f".{extension}: {error}") from None


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Damaged(f"not UTF-8 ({error.reason} at byte {error.start})") from None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"not valid JSON ({error})") from None


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
        raise Damaged(f"not a NumPy file ({str(error).splitlines()[0]})") from None
    start, size = stream.tell(), math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise Damaged("holds Python objects, which are never loaded")
    if len(data) - start != size:
        raise Damaged(f"{len(data) - start} bytes of data, its header says {size}")
    array = np.frombuffer(data, dtype, offset=start)
    return array.reshape(shape, order="F" if fortran else "C")


def _open_picture(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow only warns from 85 Mi pixels on; the bound below is lower, and an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise Damaged(f"not a picture ({', '.join(formats)})") from None
    except Image.DecompressionBombError:
        raise Damaged(f"more than the {MAX_PIXELS} pixels that are allowed") from None
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise Damaged(f"damaged picture ({error})") from None
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise Damaged(f"{width} x {height} pixels; at most {MAX_PIXELS} are allowed")
    return picture


def _picture(data: bytes) -> Image.Image:
    picture = _open_picture(data, _PICTURE_FORMATS)
    try:
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise Damaged(f"damaged picture ({error})") from None
    if picture.mode.startswith("I;16"):  # Pillow would cut 16-bit greys at 255
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture


def _whole(reader: SoundReader | FilmReader) -> Audio | Video:
    if isinstance(reader, SoundReader):
        return Audio(reader.whole(), reader.sample_rate)
    return Video(reader.whole(), reader.fps)


_READERS: Mapping[str, Callable[[bytes], SoundReader | FilmReader]] = {
    **dict.fromkeys(("wav", "flac", "ogg", "mp3"), SoundReader),
    "gif": GifReader,
    **dict.fromkeys(("mp4", "webm"), ContainerReader),
}
_DECODERS: Mapping[str, Callable[[bytes], Any]] = {
    "txt": _text,
    "json": _json,
    "npy": _npy,
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), _picture),
}

PICTURES = tuple(name for name, decoder in _DECODERS.items() if decoder is _picture)
SOUNDS = tuple(name for name, reader in _READERS.items() if reader is SoundReader)
FILMS = tuple(name for name in _READERS if name not in SOUNDS)
EXTENSIONS = (*_DECODERS, *_READERS)
