"""Opus, MP3, FLAC, H.264, VP9 and AV1 through PyAV (extra `video`), as codecs of sound and film.

Sound stands in the leanest container that keeps its exact length (gaps that an encoder adds are cut
by the reader); film as a raw stream, so that a few frames are not charged for an mp4's tables.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unimm_tokenizers.adapters.byte_codec import ByteCodec, ClassicalConfig, even, to_bytes


class _Form(NamedTuple):
    encoder: str
    container: str
    options: dict[str, str]


_SOUND = {
    "opus": _Form("libopus", "ogg", {"application": "audio"}),
    "mp3": _Form("libmp3lame", "mp3", {}),
    "flac": _Form("flac", "flac", {}),
}
# Ogg streams otherwise bear a random number: the same sound would give other bytes each time.
_EXACT = {"fflags": "bitexact"}
_FILM = {
    "h264": _Form("libx264", "h264", {"preset": "medium"}),
    "vp9": _Form("libvpx-vp9", "ivf", {"deadline": "good", "cpu-used": "4"}),
    "av1": _Form("libsvtav1", "ivf", {"preset": "8", "svtav1-params": "lp=1"}),
}


def _av(name: str) -> Any:
    try:
        import av
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"codec {name!r} needs PyAV: pip install 'unimm[video]'"
        ) from None
    return av


class SoundFileCodec(ByteCodec):
    """Sound (C, T) at a rate that the format knows. Settings: kbit/s; FLAC has none."""

    name = "classical-sound"
    modalities = ("audio",)
    formats: ClassVar[dict[str, Sequence[int]]] = {
        "opus": (5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256),
        "mp3": (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160),
        "flac": (0,),
    }

    def __init__(self, config: ClassicalConfig) -> None:
        super().__init__(config)
        known = (8000, 12000, 16000, 24000, 48000)
        if config.sample_rate is None or (
            config.format == "opus" and config.sample_rate not in known
        ):
            raise ValueError(f"{config.format}: sample_rate must be one of {known}")
        self.form = _SOUND[config.format]
        self.av = _av(config.format)

    @property
    def _layout(self) -> str:
        return "mono" if self.num_channels == 1 else "stereo"

    def write(self, signal: Tensor, setting: int) -> bytes:
        """(C, T) -> a file."""
        pcm = (signal.clamp(-1, 1) * 32767).round().short().T.contiguous().view(1, -1).numpy()
        frame = self.av.AudioFrame.from_ndarray(pcm, format="s16", layout=self._layout)
        frame.sample_rate, frame.pts = self.sample_rate, 0
        file = io.BytesIO()
        with self.av.open(file, "w", format=self.form.container, options=_EXACT) as container:
            stream = container.add_stream(
                self.form.encoder, rate=self.sample_rate, layout=self._layout
            )
            stream.options = self.form.options
            if setting:
                stream.bit_rate = setting * 1000
            taken = stream.codec_context.format
            resampler = self.av.AudioResampler(taken, self._layout, self.sample_rate)
            for part in [*resampler.resample(frame), *resampler.resample(None)]:
                container.mux(stream.encode(part))
            container.mux(stream.encode(None))
        return file.getvalue()

    def read(self, data: bytes, size: tuple[int, ...] | None) -> Tensor:
        """A file -> (C, T)."""
        resampler = self.av.AudioResampler("fltp", self._layout, self.sample_rate)
        with self.av.open(io.BytesIO(data), format=self.form.container) as container:
            frames = [p for f in container.decode(audio=0) for p in resampler.resample(f)]
        frames += resampler.resample(None)
        samples = torch.from_numpy(np.concatenate([f.to_ndarray() for f in frames], axis=1))
        return samples if size is None else samples[:, : size[0]]

    def budget(self, signal: Tensor, rate: float) -> float:
        """Bytes at `rate` kbit/s."""
        assert self.sample_rate is not None
        return rate * 1000 / 8 * signal.shape[-1] / self.sample_rate


@contextmanager
def _own_scheduling() -> Iterator[None]:
    """Give the calling thread its scheduling back.

    SVT-AV1 leaves it at SCHED_FIFO 99 where that is allowed (root; measured with PyAV 18): all that
    the process does from then on keeps other programs from the core.
    """
    if not hasattr(os, "sched_setscheduler"):  # Linux alone has it
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


class FilmFileCodec(ByteCodec):
    """Film (3, T, H, W) in 4:2:0. Settings: minus the CRF, so that files grow with them."""

    name = "classical-film"
    modalities = ("video",)
    formats: ClassVar[dict[str, Sequence[int]]] = {
        "h264": range(-51, 0),
        "vp9": range(-63, 0),
        "av1": range(-63, 0),
    }

    def __init__(self, config: ClassicalConfig) -> None:
        super().__init__(config)
        self.form = _FILM[config.format]
        self.av = _av(config.format)
        # SVT-AV1 prints twenty lines for every film unless this asks for errors alone.
        os.environ.setdefault("SVT_LOG", "1")

    def write(self, signal: Tensor, setting: int) -> bytes:
        """(3, T, H, W) -> a raw stream."""
        frames = to_bytes(even(signal)).permute(1, 2, 3, 0).contiguous().numpy()
        file = io.BytesIO()
        with (
            _own_scheduling(),
            self.av.open(file, "w", format=self.form.container, options=_EXACT) as container,
        ):
            stream = container.add_stream(self.form.encoder, rate=round(self.config.fps))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1  # slices of threads cost bits
            stream.options = {**self.form.options, "crf": str(-setting)}
            for pixels in frames:
                container.mux(stream.encode(self.av.VideoFrame.from_ndarray(pixels, "rgb24")))
            container.mux(stream.encode(None))
        return file.getvalue()

    def read(self, data: bytes, size: tuple[int, ...] | None) -> Tensor:
        """A raw stream -> (3, T, H, W)."""
        with self.av.open(io.BytesIO(data), format=self.form.container) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        film = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
        return film if size is None else film[:, : size[0], : size[1], : size[2]]

    def budget(self, signal: Tensor, rate: float) -> float:
        """Bytes at `rate` bits per pixel."""
        return rate * signal[0].numel() / 8
