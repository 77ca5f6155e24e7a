"""Ids of packed documents -> what a language model is trained on.

Positions, modalities and segments come from the grammar. Documents of one structure (the kinds,
sizes and text lengths of their items) share one layout, so the grammar reads one document of each
structure and the rest are copies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimm.checkpoint import did_you_mean
from unimm.sequence import Grammar, Segment
from unimm.vocabulary import MODALITIES, Vocabulary

Structure = tuple[tuple[str | int, ...], ...]
MAX_LAYOUTS = 8192


class Batch(NamedTuple):
    """B rows of T ids.

    ids: int64 (B, T); `<pad>` after the last document.
    positions: int64 (3, B, T), the (t, h, w) axes; each document begins at 0.
    segment_ids: int64 (B, T); documents of a row are 1, 2, ...; padding is 0.
    loss_weight: float32 (B, T), the weight of predicting the id AT that place from those before
        it; 0 for `<bos>` and padding, which are never predicted.
    modality: int64 (B, T), index into `unimm.vocabulary.MODALITIES`; `<bos>`, `<eos>`, turns and
        padding count as text.
    """

    ids: Tensor
    positions: Tensor
    segment_ids: Tensor
    loss_weight: Tensor
    modality: Tensor


class CompactLayout(NamedTuple):
    """A document's layout in little memory: positions int32 (3, T), modality uint8 (T,)."""

    positions: NDArray[np.int32]
    modality: NDArray[np.uint8]


def structure_of(segments: Sequence[Segment]) -> Structure:
    """What decides a document's layout: of each item its kind and grid or number of pieces."""
    return tuple(
        (kind, len(codes)) if kind == "text" else (kind, *codes.shape[1:])
        for kind, codes in segments
    )


class Layouts:
    """Layouts by structure; the least recently used are forgotten beyond 8,192.

    Args:
        grammar: reads the first document of each structure.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._known: OrderedDict[Structure, CompactLayout] = OrderedDict()

    def __call__(self, structure: Structure, ids: NDArray[np.integer]) -> CompactLayout:
        """The layout of a document.

        Raises:
            ValueError: the ids are malformed or are not of that structure.
        """
        found = self._known.get(structure)
        if found is None:
            found = self._known[structure] = self._read(structure, ids)
            if len(self._known) > MAX_LAYOUTS:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(structure)
        if len(found.modality) != len(ids):
            raise ValueError(f"{len(ids)} ids, but the document's items make {len(found.modality)}")
        return found

    def _read(self, structure: Structure, ids: NDArray[np.integer]) -> CompactLayout:
        whole = torch.from_numpy(ids.astype(np.int64))
        if structure_of(self._grammar.parse(whole)) != structure:
            raise ValueError(f"the document's items are not the stated ones, {structure}")
        layout = self._grammar.layout(whole)
        return CompactLayout(
            layout.positions.to(torch.int32).numpy(), layout.modality.to(torch.uint8).numpy()
        )


class LossWeights:
    """Weight of predicting an id, by the modality of what is predicted.

    Args:
        vocabulary: what there is to predict.
        weights: modality -> weight; 1 for those that are not named.

    Raises:
        ValueError: a modality is unknown or a weight negative, or all weights are 0.
    """

    def __init__(self, vocabulary: Vocabulary, weights: Mapping[str, float] | None = None) -> None:
        self.table = np.ones(len(MODALITIES), dtype=np.float32)
        for modality, weight in (weights or {}).items():
            if modality not in vocabulary.modalities:
                known = list(vocabulary.modalities)
                raise ValueError(
                    f"loss_weight: unknown modality {modality!r}{did_you_mean(modality, known)}; "
                    f"the vocabulary has {', '.join(known)}"
                )
            if not weight >= 0:
                raise ValueError(f"loss_weight.{modality}: must be 0 or more, got {weight}")
            self.table[MODALITIES.index(modality)] = weight
        present = [MODALITIES.index(m) for m in MODALITIES if m in vocabulary.modalities]
        if not self.table[present].any():
            raise ValueError("loss_weight: all weights are 0; nothing would be learned")


class PlacedDocument(NamedTuple):
    """One document on its way into a row; `weight` is a factor of all its loss weights."""

    ids: NDArray[np.integer]
    layout: CompactLayout
    weight: float = 1.0


def collate(
    rows: Sequence[Sequence[PlacedDocument]], row_length: int, weights: LossWeights, pad: int
) -> Batch:
    """Rows of documents -> a batch.

    Args:
        rows: B lists of documents, each of at most `row_length` ids in all.
        row_length: T.
        weights: per modality.
        pad: the id that fills rows.
    """
    shape = (len(rows), row_length)
    ids = np.full(shape, pad, dtype=np.int64)
    positions = np.zeros((3, *shape), dtype=np.int64)
    segments = np.zeros(shape, dtype=np.int64)
    modality = np.zeros(shape, dtype=np.int64)
    factors = np.ones(shape, dtype=np.float32)
    for number, documents in enumerate(rows):
        if not documents:
            continue
        # One copy per row and not per document: documents are short, and calls are what costs.
        lengths = [len(document.ids) for document in documents]
        stop = sum(lengths)
        ids[number, :stop] = np.concatenate([document.ids for document in documents])
        placed = [document.layout for document in documents]
        positions[:, number, :stop] = np.concatenate([p.positions for p in placed], axis=1)
        modality[number, :stop] = np.concatenate([p.modality for p in placed])
        segments[number, :stop] = np.repeat(np.arange(1, len(documents) + 1), lengths)
        if any(document.weight != 1 for document in documents):
            factors[number, :stop] = np.repeat([d.weight for d in documents], lengths)
    # A document's first id is <bos>, which nothing predicts; what follows no document is padding.
    first = np.diff(segments, axis=1, prepend=0) != 0
    loss_weight = weights.table[modality] * factors * ((segments > 0) & ~first)
    return Batch(
        *(torch.from_numpy(array) for array in (ids, positions, segments)),
        loss_weight=torch.from_numpy(loss_weight),
        modality=torch.from_numpy(modality),
    )
