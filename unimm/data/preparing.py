"""Raw samples -> what codecs take: decoded, templates filled in, signals in the codec's form.

All of it is work for the CPU and needs no weights, so it runs in threads beside the codecs, or on
other machines than they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from unimm.data.media import LongFile, MediaError
from unimm.data.shards import Sample
from unimm.data.streams import LONG_VALUES, Streaming
from unimm.data.templates import Drawing, Fields, RawItem, make_document
from unimm.sequence import Segment
from unimm.signals import Turn
from unimm.text import TextModel
from unimm.tokenizer import UnifiedTokenizer, item_signal, modality_of
from unimm_tokenizers.codec import Codec


@dataclass(frozen=True)
class SignalForm:
    """What the tokenizer's signal functions ask a codec for, without its weights."""

    num_channels: int
    sample_rate: int | None
    downsample: tuple[int, ...]
    fps: float

    @property
    def config(self) -> SignalForm:
        """Where those functions look for `fps`."""
        return self

    @classmethod
    def of(cls, codec: Codec) -> SignalForm:
        """The form of a codec's signals."""
        fps = getattr(codec.config, "fps", 0.0)
        return cls(codec.num_channels, codec.sample_rate, codec.downsample, fps)


class Signal(NamedTuple):
    """An item for a codec: its modality, and float (C, *signal) in [-1, 1]."""

    kind: str
    values: Tensor


Part: TypeAlias = "Segment | Signal | LongFile"


class Prepared(NamedTuple):
    """A sample before its codes: its key, distinct items, and documents as places among them.

    error: why the sample can't be used; "" where it can.
    """

    key: str
    parts: list[Part]
    documents: list[tuple[str, list[int]]]
    error: str = ""

    @property
    def bytes(self) -> int:
        """What the parts hold in memory."""
        return sum(_bytes(part) for part in self.parts)


def _bytes(part: Part) -> int:
    if isinstance(part, LongFile):
        return len(part.data)
    return (part.values if isinstance(part, Signal) else part.codes).nbytes


class Preparer:
    """Makes `Prepared` of samples; can be sent to other processes.

    Args:
        tokenizer: gives the text model, and the form of its codecs' signals.
        draw: which templates a sample is written with.
    """

    def __init__(self, tokenizer: UnifiedTokenizer, draw: Drawing) -> None:
        self._text: TextModel = tokenizer.text
        self._forms: Mapping[str, SignalForm] = {
            kind: SignalForm.of(codec) for kind, codec in tokenizer.codecs.items()
        }
        self._grids = tokenizer.vocabulary.grids
        self._draw = draw
        self._long = {
            kind: LONG_VALUES
            for kind, codec in tokenizer.codecs.items()
            if kind in ("audio", "video") and isinstance(codec, Streaming)
        }

    def __call__(self, sample: Sample) -> Prepared:
        """Read, decode and write one sample; a sample that can't be used says why."""
        try:
            return self._prepared(sample)
        except MediaError as error:
            return Prepared(sample.key, [], [], error.reason)
        except ValueError as error:
            return Prepared(sample.key, [], [], str(error).removeprefix(f"{sample.where}: "))

    def _prepared(self, sample: Sample) -> Prepared:
        fields = Fields(sample, self._long)
        places: dict[int, int] = {}
        items: list[RawItem] = []  # kept, so that no two have one id
        parts: list[Part] = []
        documents: list[tuple[str, list[int]]] = []
        for draw in self._draw(sample):
            document = make_document(
                fields, draw.template, drop_condition=draw.drop_condition, seed=draw.seed
            )
            for item in document:
                if id(item) not in places:
                    places[id(item)] = len(parts)
                    items.append(item)
                    parts.append(self._part(item))
            documents.append((draw.template.label, [places[id(item)] for item in document]))
        return Prepared(sample.key, parts, documents)

    def _part(self, item: RawItem) -> Part:
        if isinstance(item, LongFile):
            return item
        kind = modality_of(item)
        if isinstance(item, str):
            return Segment("text", self._text.encode(item))
        if isinstance(item, Turn):
            return Segment(kind, torch.zeros(0, dtype=torch.int64))
        form = cast(Codec, self._forms[kind])
        return Signal(kind, item_signal(item, form, self._grids.get(kind)))
