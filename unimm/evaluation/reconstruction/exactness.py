"""Does a codec keep its word: batches, chunks, tiles, streams, repetition, half precision, seams.

Figures are shares of equal codes, and the largest difference of decoded signals in [-1, 1]; None
where a codec has no such way (a codec that does not stream, one without tiles). 1.0 and 0.0 are
what language models need: another code is another word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unimm_tokenizers.adapters import ByteCodec
from unimm_tokenizers.codec import Codec

_SAME = 1e-5  # decoded values this close count as equal: sums in another order
# What is checked is the beginning of a signal: a dozen passes over whole films would take minutes.
_SIDE, _FRAMES, _SECONDS = 128, 9, 2.0


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """Shares of equal codes, 0 to 1; `*_signal`: largest difference of decoded values.

    deterministic: encoded twice. batch: two signals at once against each alone. stream: chunk by
    chunk against the whole. tiled: tile by tile against the whole. idempotent: what was decoded,
    encoded again. bfloat16: under autocast to bfloat16 against float32. seams: energy of the
    error's steps over the borders of code cells, against those inside (1: no seams). wrong: what a
    way that should exist failed with.
    """

    deterministic: float | None = None
    deterministic_signal: float | None = None
    batch: float | None = None
    batch_signal: float | None = None
    stream: float | None = None
    stream_signal: float | None = None
    tiled: float | None = None
    tiled_signal: float | None = None
    idempotent: float | None = None
    bfloat16: float | None = None
    seams: float | None = None
    wrong: str = ""

    @property
    def keeps_its_word(self) -> bool:
        """Deterministic, and every way that it has gives the codes and signals of the whole."""
        shares = (self.deterministic, self.batch, self.stream, self.tiled)
        errors = (self.deterministic_signal, self.batch_signal, self.stream_signal)
        same = all(share in (None, 1.0) for share in shares)
        return same and all(error is None or error <= _SAME for error in errors)


def cut(signal: Tensor, codec: Codec) -> Tensor:
    """The beginning of (1, C, *signal): 128 x 128 pixels, 9 frames, 2 seconds at most."""
    if codec.sample_rate is not None:
        return signal[..., : round(_SECONDS * codec.sample_rate)]
    if getattr(codec.config, "image_size", None) is not None:
        return signal
    signal = signal[..., :_SIDE, :_SIDE]
    return signal[:, :, :_FRAMES] if signal.ndim == 5 else signal


@torch.no_grad()
def measure_exactness(codec: Codec, signals: Sequence[Tensor]) -> Exactness:
    """Check a codec on signals (1, C, *signal) in the form that it takes; each is `cut` first."""
    figures: dict[str, list[float]] = {}
    wrong: list[str] = []
    device = next((p.device for p in codec.parameters()), torch.device("cpu"))
    for signal in signals:
        x = cut(signal, codec).to(device)
        size = tuple(x.shape[2:])
        codes = codec.encode(x)
        made = codec.decode(codes, size)
        for name, way in _WAYS.items():
            try:
                found = way(codec, x, made)
            except (ValueError, RuntimeError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                wrong.append(f"{name}: {reason}")
                continue
            if found is None:
                continue
            figures.setdefault(name, []).append(_equal(found.codes, codes))
            if found.signal is not None:
                count = min(made.shape[-1], found.signal.shape[-1])
                error_ = (found.signal[..., :count] - made[..., :count]).abs().max()
                figures.setdefault(f"{name}_signal", []).append(float(error_))
        if not isinstance(codec, ByteCodec):
            seam = seam_energy((made - x).float(), codec.downsample)
            if not math.isnan(seam):
                figures.setdefault("seams", []).append(seam)
    worst = {
        name: max(values) if name.endswith("_signal") else sum(values) / len(values)
        for name, values in figures.items()
    }
    return Exactness(**worst, wrong="; ".join(dict.fromkeys(wrong)))


def _equal(codes: Tensor, others: Tensor) -> float:
    """Share of equal codes; of grids of different size none."""
    if codes.shape != others.shape:
        return 0.0
    return float((codes == others).double().mean())


class _Found(NamedTuple):
    codes: Tensor
    signal: Tensor | None


def _again(codec: Codec, x: Tensor, made: Tensor) -> _Found:
    codes = codec.encode(x)
    return _Found(codes, codec.decode(codes, tuple(x.shape[2:])))


def _batch(codec: Codec, x: Tensor, made: Tensor) -> _Found | None:
    if isinstance(codec, ByteCodec):
        return None  # it works file by file
    codes = codec.encode(torch.cat([x.flip(-1), x]))
    return _Found(codes[1:], codec.decode(codes, tuple(x.shape[2:]))[1:])


def _stream(codec: Codec, x: Tensor, made: Tensor) -> _Found | None:
    """In chunks of uneven length, padded so that the last frame comes out too."""
    if not hasattr(codec, "init_state") or codec.modality != "audio":
        return None
    x = F.pad(x, (0, -x.shape[-1] % codec.downsample[0]))
    cuts = [0, x.shape[-1] // 3 + 1, 2 * x.shape[-1] // 3 - 1, x.shape[-1]]
    state = codec.init_state(1)  # pyright: ignore[reportCallIssue]
    parts, signals = [], []
    for start, end in pairwise(cuts):
        codes, state = codec.encode_chunk(x[..., start:end], state)  # pyright: ignore
        last = end == x.shape[-1]
        signal, state = codec.decode_chunk(codes, state, last=last)  # pyright: ignore
        parts.append(codes)
        signals.append(signal)
    return _Found(torch.cat(parts, dim=-1), torch.cat(signals, dim=-1))


def _tiled(codec: Codec, x: Tensor, made: Tensor) -> _Found | None:
    if not hasattr(codec, "encode_tiled") or x.ndim != 4:
        return None  # tiles are cut of pictures
    tile = 4 * codec.downsample[-1]
    codes = codec.encode_tiled(x, tile)  # pyright: ignore[reportCallIssue]
    signal = codec.decode_tiled(codes, tile, tuple(x.shape[2:]))  # pyright: ignore
    return _Found(codes, signal)


def _idempotent(codec: Codec, x: Tensor, made: Tensor) -> _Found | None:
    if isinstance(codec, ByteCodec):
        return None  # another file is no other word
    return _Found(codec.encode(made.clamp(-1, 1)), None)


def _bfloat16(codec: Codec, x: Tensor, made: Tensor) -> _Found | None:
    if isinstance(codec, ByteCodec):
        return None
    with torch.autocast(x.device.type, torch.bfloat16):
        return _Found(codec.encode(x), None)


_WAYS: Mapping[str, Callable[[Codec, Tensor, Tensor], _Found | None]] = {
    "deterministic": _again,
    "batch": _batch,
    "stream": _stream,
    "tiled": _tiled,
    "idempotent": _idempotent,
    "bfloat16": _bfloat16,
}


def seam_energy(error: Tensor, steps: tuple[int, ...]) -> float:
    """Mean square of the error's steps over cell borders, over that of steps inside cells.

    Args:
        error: (B, C, *signal).
        steps: signal units per cell of each axis; of more axes than the signal has, the last ones.

    Returns:
        1 without seams; NaN where no axis has both kinds of step, or the error is 0.
    """
    borders: list[Tensor] = []
    inside: list[Tensor] = []
    axes = min(error.ndim - 2, len(steps))
    for axis in range(-axes, 0):
        step = steps[axis]
        change = error.diff(dim=axis).square()
        if step < 2 or change.shape[axis] < step:
            continue
        place = torch.arange(1, change.shape[axis] + 1, device=error.device) % step == 0
        borders.append(change.index_select(axis, place.nonzero()[:, 0]).flatten())
        inside.append(change.index_select(axis, (~place).nonzero()[:, 0]).flatten())
    if not borders:
        return math.nan
    quiet = float(torch.cat(inside).double().mean())
    return float(torch.cat(borders).double().mean()) / quiet if quiet > 0 else math.nan
