"""Sound files, whole or in blocks: WAV, FLAC, Ogg and MP3 through libsndfile.

What libsndfile 1.2 passes over in silence is refused: a WAV or MP3 shorter than its header says, an
Ogg stream without its last page. Length and channels are checked before a sample is decoded. WAV of
16 bits, the common kind, is read directly: five times as fast for a word of speech.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimm.data.damage import Damaged

MAX_SECONDS = 4 * 3600  # of a sound that is read in blocks
MAX_SOUND_VALUES = 2**27  # samples times channels of one read whole: 512 MiB of float32
_CHUNK = struct.Struct("<4sI")  # name and size (RIFF, 1991, chapter 2)
_FORMAT = struct.Struct("<HHIIHH")  # kind, channels, rate, bytes a second, block, bits


class SoundReader:
    """An opened sound: what its header says; its samples are read once, when asked for.

    Args:
        data: the whole file.

    Raises:
        Damaged: it is cut or no sound, longer than four hours, or has more than two channels.
    """

    def __init__(self, data: bytes) -> None:
        self._file = _opened(data)
        self.length: int = self._file.frames  # samples of each channel
        self.channels: int = self._file.channels
        self.sample_rate: int = self._file.samplerate
        seconds = self.length / max(1, self.sample_rate)
        if seconds > MAX_SECONDS:
            raise Damaged(f"a sound of {seconds:.0f} s; at most {MAX_SECONDS} are read")
        if self.channels > 2:
            raise Damaged(f"{self.channels} channels; 1 or 2 are read")
        if self.length == 0:
            raise Damaged("the sound has no samples")

    @property
    def values(self) -> int:
        """Samples of all channels together."""
        return self.length * self.channels

    def blocks(self, size: int) -> Iterator[Tensor]:
        """The samples, float32 (C, n) with n at most `size`, in order.

        Raises:
            Damaged: fewer samples than the header says, or values that are not finite.
        """
        done = 0
        try:
            while done < self.length:
                block = self._file.read(size, dtype="float32", always_2d=True)
                if not len(block):
                    break
                if not np.isfinite(block).all():
                    raise Damaged("the sound holds NaN or infinite values")
                done += len(block)
                yield torch.from_numpy(np.ascontiguousarray(block.T))
        except soundfile.LibsndfileError as error:
            raise Damaged(f"damaged sound ({error.error_string})") from None
        if done != self.length:
            raise Damaged(f"cut: {done} of {self.length} samples")

    def whole(self) -> Tensor:
        """All samples, float32 (C, T).

        Raises:
            Damaged: as `blocks`, or more values than are read at once.
        """
        if self.values > MAX_SOUND_VALUES:
            seconds = self.length / self.sample_rate
            raise Damaged(
                f"{seconds:.0f} s of {self.channels} channels; at most {MAX_SOUND_VALUES} values "
                f"are read"
            )
        blocks = list(self.blocks(self.length))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


class _Pcm:
    """Samples of a WAV of 16 bits; the part of `soundfile.SoundFile` that is used here.

    Args:
        samples: int16 (T, C).
        rate: samples per second.
    """

    def __init__(self, samples: NDArray[np.int16], rate: int) -> None:
        self._samples = samples
        self._done = 0
        self.frames, self.channels = samples.shape
        self.samplerate = rate

    def read(self, frames: int, dtype: str, *, always_2d: bool) -> NDArray[np.float32]:
        """The next samples, float32 (at most `frames`, C) in [-1, 1)."""
        block = self._samples[self._done : self._done + frames]
        self._done += len(block)
        return block.astype(np.float32) * np.float32(2**-15)


def _opened(data: bytes) -> Any:
    """A whole sound, opened."""
    if data[:4] == b"RIFF":
        pcm = _pcm(_riff_chunks(data))
        if pcm is not None:
            return pcm
    elif data[:4] == b"OggS":
        _require_last_page(data)
    try:
        return soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        raise Damaged(f"damaged sound ({error.error_string})") from None


def _riff_chunks(data: bytes) -> dict[bytes, memoryview]:
    """Chunks by name, the first of each; none where their sizes were left open.

    Raises:
        Damaged: the last one is cut, which libsndfile reads as a shorter sound.
    """
    chunks: dict[bytes, memoryview] = {}
    at = 12
    while at + 8 <= len(data):
        name, size = _CHUNK.unpack_from(data, at)
        # Writers that stream leave the size open, as 0 or all ones.
        if name == b"data" and size in (0, 0xFFFFFFFF):
            return {}
        chunks.setdefault(name, memoryview(data)[at + 8 : at + 8 + size])
        at += 8 + size + size % 2
    if at > len(data) + 1:  # some writers leave out the last chunk's padding byte
        raise Damaged(f"cut: {len(data)} bytes of at least {at - 1}")
    return chunks


def _pcm(chunks: dict[bytes, memoryview]) -> _Pcm | None:
    """The samples, where they are plain integers of 16 bits; None leaves them to libsndfile."""
    if len(chunks.get(b"fmt ", b"")) < _FORMAT.size or b"data" not in chunks:
        return None
    kind, channels, rate, _, block, bits = _FORMAT.unpack_from(chunks[b"fmt "])
    if (kind, bits, block) != (1, 16, 2 * channels) or not channels or not rate:
        return None
    if len(chunks[b"data"]) % block:
        return None
    return _Pcm(np.frombuffer(chunks[b"data"], "<i2").reshape(-1, channels), rate)


def _require_last_page(data: bytes) -> None:
    """Find cuts of an Ogg stream that libsndfile reads as a shorter sound."""
    last = data.rfind(b"OggS")
    segments = data[last + 26] if last + 27 <= len(data) else 255
    end = last + 27 + segments
    body = sum(data[last + 27 : end])
    if end + body > len(data) or not data[last + 5] & 4:
        raise Damaged("cut: the last Ogg page is missing")
