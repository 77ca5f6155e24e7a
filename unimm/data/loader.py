"""Token shards -> batches, in an order that one integer decides.

Documents are packed into rows once, by the seed. Epoch e visits all R rows in a permutation that
seed and e decide. So global row g is row permutation(g // R)[g % R], whatever the number of ranks
and workers, every row comes once per epoch, and resuming at row g costs no reading.

Batch t of `world` ranks with B rows each is made of global rows start + t * world * B and on; rank
r takes the r-th slice of B rows, worker w of W makes batches w, w + W, ...
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from unimm.checkpoint import did_you_mean
from unimm.data.batch import (
    Batch,
    Layouts,
    LossWeights,
    PlacedDocument,
    Structure,
    collate,
    structure_of,
)
from unimm.data.copies import local_shards
from unimm.data.index import Arrays, index_shards, kept
from unimm.data.manifest import digest
from unimm.data.packing import FORMAT as PACKING_FORMAT
from unimm.data.packing import Packing, pack
from unimm.data.shards import Member, ShardReader, read_member
from unimm.data.tokenize import META_FILE, NPY_HEADER, ids_dtype, read_ids
from unimm.data.windows import Window, cut, windows
from unimm.sequence import Grammar
from unimm.vocabulary import Vocabulary

CACHE_BYTES = 2**28  # documents kept in memory, after which every reading goes to the shard
TEMPLATE_SAMPLE = 2000  # documents among which the template of a weight is looked for
_DOCUMENT_BYTES = 300  # of a kept document beside its ids: array, tuple, dictionary entry


class EpochOrder:
    """Numbers 0 to size - 1 in a new random order every epoch, without end.

    Args:
        size: how many there are.
        seed: decides the orders.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __call__(self, position: int) -> tuple[int, int]:
        """Epoch and number at a position, counted from the beginning of the first epoch."""
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
            self._epoch = epoch
        return epoch, int(self._order[place])


class MixedOrder:
    """Rows of several sources, interleaved by weight; each source's rows once per its own epoch.

    Of every 1,024 positions each source has a fixed number, spread evenly, so where any position
    lies is arithmetic: nothing has to be replayed to go on from it.

    Args:
        sizes: rows of each source.
        weights: share of each, above 0; their sum does not matter.
        seed: decides the orders.
    """

    PERIOD = 1024

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if len(sizes) == 1:
            counts = np.array([1])
        else:
            share = np.asarray(weights, dtype=np.float64) / sum(weights) * self.PERIOD
            counts = np.maximum(1, np.floor(share)).astype(np.int64)
            for source in np.argsort(np.floor(share) - share, kind="stable"):
                counts[source] += counts.sum() < self.PERIOD
        self._counts = counts.tolist()
        # The j-th of n rows of a source stands at (j + 1/2) / n of the period.
        places = [(np.arange(count) + 0.5) / count for count in self._counts]
        source = np.repeat(np.arange(len(counts)), counts)
        spread = np.lexsort((source, np.concatenate(places)))
        self._source = source[spread].tolist()
        self._rank = np.concatenate([np.arange(count) for count in self._counts])[spread].tolist()
        # One source keeps the order that it has alone.
        self._orders = [
            EpochOrder(size, seed if len(sizes) == 1 else seed + 7919 * number)
            for number, size in enumerate(sizes)
        ]

    def __call__(self, position: int) -> tuple[int, int]:
        """Source and row at a position, counted from the beginning of the run."""
        period, slot = divmod(position, len(self._source))
        source = self._source[slot]
        return source, self._orders[source](period * self._counts[source] + self._rank[slot])[1]


class RowStatistics(NamedTuple):
    """What is packed.

    documents: number of documents in rows. rejected: number of those longer than a row. rows: R.
    tokens: ids of packed documents. padding: share of the rows' ids that are padding.
    """

    documents: int
    rejected: int
    rows: int
    tokens: int
    padding: float

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.tokens:,} ids in {self.rows:,} rows, "
            f"{self.padding:.2%} padding, {self.rejected:,} documents too long"
        )


@dataclass(frozen=True, kw_only=True)
class DocumentConfig:
    """What is made of single documents.

    template_weight: label of a template, as in a shard's meta -> factor of the loss weights of the
        documents that it made; 1 for those that are not named.
    too_long: what becomes of documents longer than a row: "reject" counts them and leaves them
        out; "window" cuts sounds and films into windows of whole frames.
    """

    template_weight: Mapping[str, float] = field(default_factory=dict)
    too_long: Literal["reject", "window"] = "reject"

    def __post_init__(self) -> None:
        for label, weight in self.template_weight.items():
            if not weight >= 0:
                raise ValueError(f"template_weight.{label}: must be 0 or more, got {weight}")


class TokenRows:
    """Rows of packed documents, read by offset when asked for.

    Args:
        shards: token shards, as `unimm.data.copies.local_shards` understands them.
        vocabulary: the one that they must have been made with.
        row_length: T, ids of a row.
        seed: decides which documents share a row.
        loss_weight: modality -> weight of predicting it; 1 for those that are not named.
        documents: what is made of single documents.
        verify: compare every byte of the shards with their manifests first.
        folder: where index and packing are kept for the next time; None: nowhere.

    Raises:
        ValueError: shards are missing, uncommitted, changed, or made with another vocabulary; or no
            document fits into a row; or no document has a template that is given a weight.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        vocabulary: Vocabulary,
        row_length: int,
        *,
        seed: int = 0,
        loss_weight: Mapping[str, float] | None = None,
        documents: DocumentConfig | None = None,
        verify: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.row_length = row_length
        self.weights = LossWeights(vocabulary, loss_weight)
        self._config = documents or DocumentConfig()
        self._grammar = Grammar(vocabulary)
        self._layouts = Layouts(self._grammar)
        self._pad = vocabulary.marker("<pad>")
        self._paths = local_shards(shards)
        self._index = index_shards(self._paths, vocabulary, verify=verify, folder=folder)
        self._interned: dict[Structure, Structure] = {}
        self._cache: dict[int, PlacedDocument] = {}
        self._cached = 0
        self._dtype = ids_dtype(vocabulary)
        whole = (self._index.places[:, 1] - NPY_HEADER) // np.dtype(self._dtype).itemsize
        # One entry per document or window: number of the document, item, first frame and last.
        name = digest([self._index.digest, row_length, self._config.too_long])
        plan = kept(folder, f"documents-{name[:24]}", lambda: self._plan(whole))
        self.entries, self.lengths = plan["entries"], plan["lengths"]
        name = digest([name, seed, PACKING_FORMAT])
        packed = kept(folder, f"packing-{name[:24]}", lambda: self._pack(seed))
        self.packing = Packing(
            packed["documents"],
            packed["starts"],
            packed["rejected"],
            1
            - float(self.lengths[packed["documents"]].sum())
            / ((len(packed["starts"]) - 1) * row_length),
        )
        self._require_templates()

    def _plan(self, whole: NDArray[np.int64]) -> Arrays:
        entries = np.stack([np.arange(len(whole)), *[np.full(len(whole), -1)] * 3], axis=1)
        if self._config.too_long == "reject":
            return {"entries": entries, "lengths": whole}
        levels = {m: len(self.vocabulary.levels(m)) for m in self._grammar.rules}
        rows, lengths = [entries[whole <= self.row_length]], [whole[whole <= self.row_length]]
        for number in np.flatnonzero(whole > self.row_length).tolist():
            structure, _ = self._meta(self._member(number, 2))
            found = windows(structure, int(whole[number]), self.row_length, levels)
            if not found:
                rows.append(entries[number : number + 1])
                lengths.append(whole[number : number + 1])
                continue
            rows.append(np.array([(number, *window) for window in found]))
            frames = sum(window.stop - window.start for window in found)
            kind, *grid = structure[found[0].item]
            per_frame = levels[str(kind)] * math.prod(int(size) for size in grid[1:])
            rest = int(whole[number]) - frames * per_frame
            lengths.append(np.array([rest + (w.stop - w.start) * per_frame for w in found]))
        return {"entries": np.concatenate(rows), "lengths": np.concatenate(lengths)}

    def _pack(self, seed: int) -> Arrays:
        order = np.random.default_rng([seed]).permutation(len(self.lengths))
        packing = pack(self.lengths, self.row_length, order)
        return {
            "documents": packing.documents,
            "starts": packing.starts,
            "rejected": packing.rejected,
        }

    def _require_templates(self) -> None:
        wanted = set(self._config.template_weight)
        count = len(self.entries)
        if not wanted:
            return
        seen: set[str] = set()
        for entry in range(0, count, -(-count // TEMPLATE_SAMPLE)):
            seen.add(self._meta(self._member(int(self.entries[entry, 0]), 2))[1])
            if wanted <= seen:
                return
        missing = sorted(wanted - seen)[0]
        raise ValueError(
            f"template_weight: no document of template {missing!r} was found"
            f"{did_you_mean(missing, sorted(seen))}; there are {', '.join(sorted(seen))}"
        )

    def __len__(self) -> int:
        """Number of rows, R."""
        return len(self.packing)

    @property
    def statistics(self) -> RowStatistics:
        """What is packed, and what is not."""
        return RowStatistics(
            documents=len(self.packing.documents),
            rejected=len(self.packing.rejected),
            rows=len(self),
            tokens=int(self.lengths[self.packing.documents].sum()),
            padding=self.packing.padding,
        )

    def document(self, number: int) -> PlacedDocument:
        """Ids and layout of one document, or window of one.

        Raises:
            ValueError: the document is damaged, or holds ids outside the vocabulary.
        """
        known = self._cache.get(number)
        if known is not None:
            return known
        document, *frames = self.entries[number].tolist()
        try:
            found = self._read(document, Window(*frames))
        except ValueError as error:
            raise ValueError(f"{self._where(document)}: {error}; make the shard again") from None
        size = found.ids.nbytes + _DOCUMENT_BYTES
        if self._cached + size <= CACHE_BYTES:
            self._cache[number] = found
            self._cached += size
        return found

    def _read(self, number: int, window: Window) -> PlacedDocument:
        ids = read_ids(self._member(number, 0), self._dtype)
        if int(ids.max()) >= len(self.vocabulary):
            raise ValueError(
                f"id {ids.max()} lies outside the vocabulary (0 to {len(self.vocabulary) - 1})"
            )
        structure, template = self._meta(self._member(number, 2))
        weight = self._config.template_weight.get(template, 1.0)
        if window.item >= 0:
            part, segments = cut(torch.from_numpy(ids.astype(np.int64)), window, self._grammar)
            ids, structure = part.numpy().astype(self._dtype), structure_of(segments)
        return PlacedDocument(ids, self._layouts(structure, ids), weight)

    def _member(self, number: int, column: int) -> bytes:
        offset, size = self._index.places[number, column : column + 2].tolist()
        shard = self._index.shard[number]
        return read_member(self._paths[shard], self._index.stamps[shard], Member(offset, size))

    def _meta(self, meta: bytes) -> tuple[Structure, str]:
        """Items and template of a document."""
        try:
            stored = json.loads(meta)
            structure = tuple(tuple(item) for item in stored["items"])
            template = str(stored.get("template", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{META_FILE} is damaged ({error})") from None
        # Few structures are shared by many documents: keep one object of each.
        return self._interned.setdefault(structure, structure), template

    def _where(self, number: int) -> str:
        """Shard and key of a document, for messages."""
        path = self._paths[self._index.shard[number]]
        first = int(np.searchsorted(self._index.shard, self._index.shard[number]))
        return ShardReader(path).samples[number - first].where

    def row(self, number: int) -> list[PlacedDocument]:
        """The documents of one row."""
        return [self.document(int(document)) for document in self.packing.row(number)]

    def collate(self, rows: Sequence[Sequence[PlacedDocument]]) -> Batch:
        """Rows of documents -> a batch of len(rows) rows."""
        return collate(rows, self.row_length, self.weights, self._pad)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Rows by number -> a batch of len(rows) rows."""
        return self.collate([self.row(row) for row in rows])


class Slice(NamedTuple):
    """Which part of every global batch a process makes.

    batch_size: rows (or signals) per rank. rank: of `world` ranks. start: what is done already, in
    global rows.
    """

    batch_size: int
    rank: int = 0
    world: int = 1
    start: int = 0


class TokenStream(IterableDataset[Batch]):
    """Batches for training, without end.

    Args:
        sources: packed rows, all of one length and vocabulary.
        part: what this rank makes of them.
        seed: decides the order of each epoch.
        weights: share of the global rows that each source gives; None: one source, or even shares.
    """

    def __init__(
        self,
        sources: TokenRows | Sequence[TokenRows],
        part: Slice,
        seed: int = 0,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.sources = [sources] if isinstance(sources, TokenRows) else list(sources)
        self.part = part
        self.seed = seed
        self.weights = [1.0] * len(self.sources) if weights is None else list(weights)

    def __iter__(self) -> Iterator[Batch]:
        order = MixedOrder([len(rows) for rows in self.sources], self.weights, self.seed)
        size, rank, world, start = self.part
        for batch in worker_turns():
            first = start + (batch * world + rank) * size
            chosen = [order(first + i) for i in range(size)]
            yield self.sources[0].collate([self.sources[s].row(row) for s, row in chosen])


class TokenPass(IterableDataset[Batch]):
    """Batches for validation: every row once, in order; the last batch may be smaller.

    Args:
        rows: the packed rows.
        part: what this rank makes of them; its `start` is not used.
    """

    def __init__(self, rows: TokenRows, part: Slice) -> None:
        self.rows = rows
        self.part = part

    def __iter__(self) -> Iterator[Batch]:
        size = self.part.batch_size
        mine = range(self.part.rank, len(self.rows), self.part.world)
        for batch in worker_turns(-(-len(mine) // size)):
            yield self.rows.batch(mine[batch * size : (batch + 1) * size])


def worker_turns(count: int | None = None) -> Iterator[int]:
    """Numbers of the batches that this loader process makes; all of them outside a worker."""
    info = get_worker_info()
    batch, step = (0, 1) if info is None else (info.id, info.num_workers)
    while count is None or batch < count:
        yield batch
        batch += step
