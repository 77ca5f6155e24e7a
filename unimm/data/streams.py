"""Long sounds and films -> codes, block by block through a codec's own state: bounded memory.

A codec streams when it has `init_state` and `encode_chunk`, whose chunks together give the codes of
the whole. Sounds come to the codec's rate through a resampler that keeps the filter's context
between blocks, films by the choice of frames that the whole would have made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torchaudio
from torch import Tensor

from unimm.data.films import FilmReader
from unimm.data.media import OpenMedia
from unimm.data.sounds import SoundReader
from unimm.signals import Audio, Video
from unimm.tokenizer import audio_signal, video_signal
from unimm_tokenizers.codec import Codec

LONG_VALUES = 2**24  # samples, or colours of all frames; above, media are read in blocks (64 MiB)
BLOCK_VALUES = 2**22
_FILTER_WIDTH, _ROLLOFF = 6, 0.99  # torchaudio's defaults: zero crossings of its windowed sinc


@runtime_checkable
class Streaming(Protocol):
    """What a codec needs for long signals: codes of chunks, with a state that the caller owns."""

    def init_state(self, batch: int) -> Any:
        """A fresh state for `batch` parallel streams."""
        ...

    def encode_chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(B, C, T, ...) of any length -> codes of the frames that it completes, next state."""
        ...


@torch.no_grad()
def encode_long(media: OpenMedia, codec: Codec) -> Tensor:
    """A long sound or film -> codes int64 (K, *grid), those of the whole.

    Args:
        media: the opened file; it is read once.
        codec: one that is `Streaming`.

    Raises:
        ValueError: the file is damaged, or the codec refuses it.
    """
    reader, hop = media.reader, codec.downsample[0]
    if isinstance(reader, SoundReader):
        blocks = media.blocks(max(1, BLOCK_VALUES // reader.channels))
        signals = _filled_with_silence(_sound_signals(blocks, reader.sample_rate, codec), hop)
    else:
        blocks = media.blocks(max(1, BLOCK_VALUES // (3 * reader.height * reader.width)))
        signals = _filled_with_last_frame(_film_signals(blocks, reader, codec), hop)
    device = next(codec.parameters()).device
    streaming = cast(Streaming, codec)
    state = streaming.init_state(1)
    parts: list[Tensor] = []
    for signal in signals:
        codes, state = streaming.encode_chunk(signal[None].to(device), state)
        parts.append(codes[0].cpu())
    return torch.cat(parts, dim=1)


def _sound_signals(blocks: Iterable[Tensor], rate: int, codec: Codec) -> Iterator[Tensor]:
    """Blocks of samples (C, n) -> what the tokenizer would make of the whole, in blocks."""
    target = codec.sample_rate
    assert target is not None
    for block in blocks if rate == target else resampled(blocks, rate, target):
        yield audio_signal(Audio(block, target), codec)


def resampled(blocks: Iterable[Tensor], rate: int, target: int) -> Iterator[Tensor]:
    """Blocks (C, n) of one sound at `rate` -> blocks at `target`; as torchaudio makes the whole.

    Args:
        blocks: float32 (C, n), in order.
        rate: samples per second of the blocks.
        target: samples per second that are wanted.
    """
    common = math.gcd(rate, target)
    step, out = rate // common, target // common  # `step` samples become `out`
    reach = math.ceil(_FILTER_WIDTH * step / (min(step, out) * _ROLLOFF)) + step
    context = -(-reach // step) * step
    held: Tensor | None = None
    past = 0  # samples at the head of `held` that are context only
    for block in blocks:
        held = block if held is None else torch.cat([held, block], dim=1)
        ready = (held.shape[1] - context) // step * step
        if ready <= past:
            continue
        made = torchaudio.functional.resample(held[:, : ready + context], rate, target)
        yield made[:, past // step * out : ready // step * out]
        keep = min(context, ready)
        held, past = held[:, ready - keep :], keep
    if held is not None and held.shape[1] > past:
        yield torchaudio.functional.resample(held, rate, target)[:, past // step * out :]


def _filled_with_silence(signals: Iterable[Tensor], hop: int) -> Iterator[Tensor]:
    """Signals (C, n), and then silence up to a whole number of code frames."""
    done, channels = 0, 1
    for signal in signals:
        done, channels = done + signal.shape[1], len(signal)
        yield signal
    if done % hop:
        yield torch.zeros(channels, hop - done % hop)


def _film_signals(blocks: Iterable[Tensor], reader: FilmReader, codec: Codec) -> Iterator[Tensor]:
    """Blocks of frames (n, H, W, 3) -> (C, m, H, W) at the codec's frame rate."""
    rate = codec.config.fps
    for block in chosen_frames(blocks, reader.fps, rate):
        yield video_signal(Video(block, rate), codec)


def chosen_frames(blocks: Iterable[Tensor], fps: float, rate: float) -> Iterator[Tensor]:
    """The frames that bring a film from `fps` to `rate`, as `video_signal` chooses of the whole.

    Args:
        blocks: (n, H, W, 3), in order.
        fps: frames per second of the film.
        rate: frames per second that are wanted; within 0.1% of `fps`, all frames are.
    """
    if abs(fps - rate) <= 1e-3 * rate:
        yield from blocks
        return
    # A film's length in frames is rounded, so a frame can be asked for only when later ones come.
    reach = math.ceil(fps / rate / 2) + 1
    seen, given = 0, 0
    held: Tensor | None = None  # the last frames, in front of the block
    for block in blocks:
        held = block if held is None else torch.cat([held[-reach:], block])
        seen += len(block)
        places = _places(given, seen, fps, rate)
        places = places[places < seen]
        if len(places):
            yield held[places - (seen - len(held))]
        given += len(places)
    rest = len(_places(given, seen, fps, rate))
    if held is not None and rest:  # the end rounds up: the last frame is held
        yield held[-1:].expand(rest, -1, -1, -1)


def _places(given: int, seen: int, fps: float, rate: float) -> Tensor:
    """Source places of the frames of a film of `seen` frames, from the `given`-th one on."""
    count = max(1, round(seen * rate / fps))
    # The same operations, in the same order and precision, as `unimm.tokenizer.video_signal`.
    return (torch.arange(given, max(given, count)) * fps / rate).long()


def _filled_with_last_frame(signals: Iterable[Tensor], hop: int) -> Iterator[Tensor]:
    """Signals (C, n, H, W), and then the last frame up to 1 + k * hop frames."""
    done = 0
    last: Tensor | None = None
    for signal in signals:
        done, last = done + signal.shape[1], signal[:, -1:]
        yield signal
    if last is not None and (done - 1) % hop:
        yield last.expand(-1, hop - (done - 1) % hop, -1, -1)
