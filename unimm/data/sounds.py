"""Sound files, whole or in blocks: WAV, FLAC, Ogg and MP3 through libsndfile.

What libsndfile 1.2 passes over in silence is refused: a WAV or MP3 shorter than its header says, an
Ogg stream without its last page. Length and channels are checked before a sample is decoded.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import numpy as np
import soundfile
import torch
from torch import Tensor

from unimm.data.damage import Damaged

MAX_SECONDS = 4 * 3600  # of a sound that is read in blocks
MAX_SOUND_VALUES = 2**27  # samples times channels of one read whole: 512 MiB of float32


class SoundReader:
    """An opened sound: what its header says; its samples are read once, when asked for.

    Args:
        data: the whole file.

    Raises:
        Damaged: it is cut or no sound, longer than four hours, or has more than two channels.
    """

    def __init__(self, data: bytes) -> None:
        _require_whole(data)
        try:
            self._file = soundfile.SoundFile(io.BytesIO(data))
        except soundfile.LibsndfileError as error:
            raise Damaged(f"damaged sound ({error.error_string})") from None
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


def _require_whole(data: bytes) -> None:
    """Find cuts that libsndfile reads as a shorter sound."""
    if data[:4] == b"RIFF":
        at = 12
        while at + 8 <= len(data):
            (size,) = struct.unpack_from("<I", data, at + 4)
            # Writers that stream leave the size open, as 0 or all ones.
            if data[at : at + 4] == b"data" and size in (0, 0xFFFFFFFF):
                return
            at += 8 + size + size % 2
        if at > len(data) + 1:  # some writers leave out the last chunk's padding byte
            raise Damaged(f"cut: {len(data)} bytes of at least {at - 1}")
    elif data[:4] == b"OggS":
        last = data.rfind(b"OggS")
        segments = data[last + 26] if last + 27 <= len(data) else 255
        end = last + 27 + segments
        body = sum(data[last + 27 : end])
        if end + body > len(data) or not data[last + 5] & 4:
            raise Damaged("cut: the last Ogg page is missing")
