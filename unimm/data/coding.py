"""Signals of many samples -> codes, in batches that a device is worth.

Signals wait until a batch of one shape is full. What shape a signal is brought to is decided so
that its codes stay the same: pictures and films are filled up to whole codes, as their codec would;
sounds of about one length are filled up with silence, which a causal codec's earlier codes do not
see. Which signals share a batch depends on their order and sizes alone, never on time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from unimm.data.media import LongFile, open_media
from unimm.data.preparing import Part, Signal
from unimm.data.streams import encode_long
from unimm.sequence import Segment
from unimm.tokenizer import UnifiedTokenizer
from unimm_tokenizers.audio.streaming import StreamingCodec
from unimm_tokenizers.codec import PADDING_CODE, Codec
from unimm_tokenizers.vision import VisionCodec

BATCH_VALUES = 2**24  # numbers in a batch: 64 MiB, 85 pictures of 256 x 256 in colour
WAITING_BATCHES = 4  # what may wait for its batch to fill, in batches


class Slot:
    """Where the codes of an item will be; `error` says why they will not."""

    def __init__(self, segment: Segment | None = None) -> None:
        self.segment = segment
        self.error = ""

    @property
    def done(self) -> bool:
        """Whether the item was coded or refused."""
        return self.segment is not None or bool(self.error)


class Coder:
    """Codes items as they come, in batches of signals of one shape.

    Args:
        tokenizer: its codecs, on their devices, do the work.
        batch_size: signals in a batch, at most.
    """

    def __init__(self, tokenizer: UnifiedTokenizer, batch_size: int) -> None:
        self._codecs = tokenizer.codecs
        self._fits = {kind: fitting(codec) for kind, codec in self._codecs.items()}
        self._batch_size = batch_size
        self._groups: OrderedDict[tuple[str, tuple[int, ...]], list[tuple[Signal, Slot]]]
        self._groups = OrderedDict()
        self._values = 0

    def add(self, part: Part) -> Slot:
        """An item's slot, which is filled at once or when its batch is full."""
        if isinstance(part, Segment):
            return Slot(part)
        slot = Slot()
        if isinstance(part, LongFile):
            self._code_long(part, slot)
            return slot
        shape = self._fits[part.kind].shape(part.values)
        group = self._groups.setdefault((part.kind, shape), [])
        group.append((part, slot))
        self._values += prod(shape)
        if len(group) >= max(1, min(self._batch_size, BATCH_VALUES // max(1, prod(shape)))):
            self._code(part.kind, shape)
        elif self._values > WAITING_BATCHES * BATCH_VALUES:
            self.relieve()
        return slot

    def relieve(self) -> None:
        """Code the group that was begun first, full or not."""
        if self._groups:
            self._code(*next(iter(self._groups)))

    def flush(self) -> None:
        """Code everything that waits."""
        while self._groups:
            self.relieve()

    def _code(self, kind: str, shape: tuple[int, ...]) -> None:
        group = self._groups.pop((kind, shape))
        self._values -= len(group) * prod(shape)
        try:
            self._code_batch(kind, shape, group)
        except ValueError:  # one of them is refused: find out which
            for member in group:
                try:
                    self._code_batch(kind, shape, [member])
                except ValueError as error:
                    member[1].error = str(error)

    @torch.no_grad()
    def _code_batch(
        self, kind: str, shape: tuple[int, ...], group: Sequence[tuple[Signal, Slot]]
    ) -> None:
        codec, fit = self._codecs[kind], self._fits[kind]
        batch = torch.stack([fit.fill(signal.values, shape) for signal, _ in group])
        codes = codec.encode(batch.to(next(codec.parameters()).device)).cpu()
        for (signal, slot), code in zip(group, codes, strict=True):
            if kind == "semantic":
                code = code[:, code[0] != PADDING_CODE]
            # A copy: a view would keep the whole batch's codes for as long as one of them.
            slot.segment = Segment(kind, fit.crop(code, signal.values).clone())

    def _code_long(self, part: LongFile, slot: Slot) -> None:
        try:
            media = open_media(part.extension, part.data, part.where)
            codes = encode_long(media, self._codecs[media.modality])
        except ValueError as error:
            slot.error = str(error).removeprefix(f"{part.where}: ")
        else:
            slot.segment = Segment(media.modality, codes)


class Fitting:
    """Signals are coded with those of exactly their shape: true of any codec."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def shape(self, signal: Tensor) -> tuple[int, ...]:
        """The shape that a signal (C, *signal) is brought to."""
        return tuple(signal.shape)

    def fill(self, signal: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Bring a signal to that shape."""
        return signal

    def crop(self, codes: Tensor, signal: Tensor) -> Tensor:
        """Codes (K, *grid) of the filled signal -> those of the signal."""
        return codes


class WholeCodes(Fitting):
    """Pictures and films are filled up to whole codes by repeating their edge."""

    def shape(self, signal: Tensor) -> tuple[int, ...]:
        """Sizes rounded up; a film has one frame more than a multiple."""
        *time, height, width = self.codec.downsample
        sizes = [-(-n // by) * by for n, by in zip(signal.shape[-2:], (height, width), strict=True)]
        frames = [1 + -(-(signal.shape[1] - 1) // by) * by for by in time if signal.ndim == 4]
        return (len(signal), *frames, *sizes)

    def fill(self, signal: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Repeat the last row, column and frame."""
        if tuple(signal.shape) == shape:
            return signal
        missing = [
            n
            for size, had in zip(shape[:0:-1], signal.shape[:0:-1], strict=True)
            for n in (0, size - had)
        ]
        return F.pad(signal[None], missing, mode="replicate")[0]


class AboutOneLength(Fitting):
    """Sounds of a causal codec are filled up with silence to one of eight lengths an octave."""

    def shape(self, signal: Tensor) -> tuple[int, ...]:
        """A length in whole code frames, at most an eighth above the sound's own."""
        hop = self.codec.downsample[0]
        frames = -(-signal.shape[-1] // hop)
        step = 1 << max(0, frames.bit_length() - 4)
        return (len(signal), -(-frames // step) * step * hop)

    def fill(self, signal: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Add silence."""
        return F.pad(signal, (0, shape[-1] - signal.shape[-1]))

    def crop(self, codes: Tensor, signal: Tensor) -> Tensor:
        """Leave out the frames of the added silence."""
        return codes[..., : -(-signal.shape[-1] // self.codec.downsample[0])]


def fitting(codec: Codec) -> Fitting:
    """How a codec's signals may be brought to one shape without another code."""
    if isinstance(codec, VisionCodec):
        return WholeCodes(codec)
    if isinstance(codec, StreamingCodec):  # causal: codes see no later sample
        return AboutOneLength(codec)
    return Fitting(codec)
