"""What a decoder's loss is, modality by modality, in units that do not depend on the tokenizer.

Nats per id grow when a tokenizer writes fewer ids for the same thing; bits per second of sound, per
pixel and per byte of text do not. Bits are those of all ids of a modality, markers and sizes too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from unimm.data.batch import Batch
from unimm.tokenizer import UnifiedTokenizer
from unimm.vocabulary import MODALITIES

UNITS = {"text": "byte", "image": "pixel", "video": "pixel", "audio": "second"}


def units_of_ids(tokenizer: UnifiedTokenizer) -> Tensor:
    """How much of its unit one id stands for, float32 (modalities, V).

    A piece of text stands for its bytes, a code for its share of pixels or seconds: a code of one
    of K levels for a K-th. A film's first grid frame counts as many frames as the others.
    """
    vocabulary = tokenizer.vocabulary
    table = torch.zeros(len(MODALITIES), vocabulary.padded_size)
    text = vocabulary["text"]
    pieces = [tokenizer.text.decode(torch.tensor([piece])) for piece in range(text.size)]
    # One byte of several that make a character decodes to U+FFFD.
    sizes = [1 if piece == "\ufffd" else len(piece.encode()) for piece in pieces]
    table[0, text.start : text.end] = torch.tensor(sizes, dtype=torch.float32)
    for modality, codec in tokenizer.codecs.items():
        if modality not in UNITS:
            continue
        if modality == "audio":
            assert codec.frame_rate is not None
            amount = 1 / codec.frame_rate
        elif modality == "image":
            amount = math.prod(codec.downsample[-2:])
        else:
            amount = math.prod(codec.downsample)
        for block in vocabulary.levels(modality):
            table[MODALITIES.index(modality), block.start : block.end] = (
                amount / codec.num_codebooks
            )
    return table


class Tally(NamedTuple):
    """Sums over ids, each float64 (modalities,): nats, ids, hits, units."""

    nats: Tensor
    ids: Tensor
    hits: Tensor
    units: Tensor

    @classmethod
    def of(cls, batch: Batch, nll: Tensor, units: Tensor, hits: Tensor | None = None) -> Tally:
        """Sums over the ids of a batch (B, T) that are predicted, `<bos>` and padding left out.

        Args:
            batch: what was predicted.
            nll: nats of its ids but the first, (B * (T - 1),).
            units: of `units_of_ids`.
            hits: whether they were the likeliest, the same shape.
        """
        modality = batch.modality[:, 1:].flatten()
        target = batch.ids[:, 1:].flatten()
        same = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
        counted = (same & (batch.segment_ids[:, 1:] > 0)).flatten()
        columns = (
            nll,
            torch.ones_like(nll),
            torch.zeros_like(nll) if hits is None else hits,
            units.to(nll.device)[modality, target],
        )
        zero = torch.zeros(len(MODALITIES), dtype=torch.float64, device=nll.device)
        # On a CPU double sums cost nothing; a mean over 10^9 ids in float32 would not be exact.
        return cls(
            *(zero.index_add(0, modality, (column * counted).double()) for column in columns)
        )

    def __add__(self, other: object) -> Tally:  # type: ignore[override]
        """Sums over both."""
        assert isinstance(other, Tally)
        return Tally(*(one + two for one, two in zip(self, other, strict=True)))

    def stacked(self) -> Tensor:
        """(4, modalities), for adding up over processes."""
        return torch.stack(tuple(self))

    def figures(self, *, judged: bool) -> dict[str, float]:
        """`text`: nats per id; `text_bits_per_byte`; and `text_accuracy` where it was judged."""
        found: dict[str, float] = {}
        columns = zip(MODALITIES, *(column.tolist() for column in self), strict=True)
        for name, nats, ids, hits, units in columns:
            if not ids:
                continue
            found[name] = nats / ids
            if judged:
                found[f"{name}_accuracy"] = hits / ids
            if units:
                found[f"{name}_bits_per_{UNITS[name]}"] = nats / math.log(2) / units
        return found
