"""Token shards -> batches, in an order that one integer decides.

Documents are packed into rows once, by the seed. Epoch e visits all R rows in a permutation that
seed and e decide. So global row g is row permutation(g // R)[g % R], whatever the number of ranks
and workers, every row comes once per epoch, and resuming at row g costs no reading.

Batch t of `world` ranks with B rows each is made of global rows start + t * world * B and on; rank
r takes the r-th slice of B rows, worker w of W makes batches w, w + W, ...
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from unimm.data.batch import Batch, Layouts, LossWeights, PlacedDocument, Structure, collate
from unimm.data.manifest import read_token_manifest
from unimm.data.packing import pack
from unimm.data.shards import Member, ShardReader, Stamp, expand, read_member
from unimm.data.tokenize import IDS_FILE, META_FILE, NPY_HEADER, ids_dtype, read_ids
from unimm.sequence import Grammar
from unimm.vocabulary import Vocabulary

CACHE_BYTES = 2**28  # documents kept in memory, after which every reading goes to the shard
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


class TokenRows:
    """Rows of packed documents, read by offset when asked for.

    Args:
        shards: token shards, as `unimm.data.shards.expand` understands them.
        vocabulary: the one that they must have been made with.
        row_length: T, ids of a row.
        seed: decides which documents share a row.
        loss_weight: modality -> weight of predicting it; 1 for those that are not named.
        verify: compare every byte of the shards with their manifests first.

    Raises:
        ValueError: shards are missing, uncommitted, changed, or made with another vocabulary; or no
            document fits into a row.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        vocabulary: Vocabulary,
        row_length: int,
        *,
        seed: int = 0,
        loss_weight: Mapping[str, float] | None = None,
        verify: bool = False,
    ) -> None:
        self.vocabulary = vocabulary
        self.row_length = row_length
        self.weights = LossWeights(vocabulary, loss_weight)
        self._layouts = Layouts(Grammar(vocabulary))
        self._pad = vocabulary.marker("<pad>")
        self._paths = expand(shards)
        self._stamps: list[Stamp] = []
        places = [self._index(path, verify=verify) for path in self._paths]
        self._shard = np.repeat(np.arange(len(places)), [len(p) for p in places])
        self._places = np.concatenate(places)  # (N, 4): offset and size of ids, then of meta
        self._interned: dict[Structure, Structure] = {}
        self._cache: dict[int, PlacedDocument] = {}
        self._cached = 0
        self._dtype = ids_dtype(vocabulary)
        self.lengths = (self._places[:, 1] - NPY_HEADER) // np.dtype(self._dtype).itemsize
        order = np.random.default_rng([seed]).permutation(len(self._places))
        self.packing = pack(self.lengths, row_length, order)

    def _index(self, path: Path, *, verify: bool) -> NDArray[np.int64]:
        manifest = read_token_manifest(path, self.vocabulary)
        if verify:
            manifest.check(path, verify=True)
        reader = ShardReader(path)
        manifest.check_samples(path, len(reader))
        self._stamps.append(reader.stamp)
        places = []
        for sample in reader:
            if IDS_FILE not in sample or META_FILE not in sample:
                raise ValueError(f"{sample.where}: has only {sample.listed}; make the shard again")
            places.append((*sample.members[IDS_FILE], *sample.members[META_FILE]))
        return np.array(places, dtype=np.int64).reshape(-1, 4)

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
        """Ids and layout of one document.

        Raises:
            ValueError: the document is damaged, or holds ids outside the vocabulary.
        """
        known = self._cache.get(number)
        if known is not None:
            return known
        try:
            found = self._read(number)
        except ValueError as error:
            raise ValueError(f"{self._where(number)}: {error}; make the shard again") from None
        size = found.ids.nbytes + _DOCUMENT_BYTES
        if self._cached + size <= CACHE_BYTES:
            self._cache[number] = found
            self._cached += size
        return found

    def _read(self, number: int) -> PlacedDocument:
        ids = read_ids(self._member(number, 0), self._dtype)
        if int(ids.max()) >= len(self.vocabulary):
            raise ValueError(
                f"id {ids.max()} lies outside the vocabulary (0 to {len(self.vocabulary) - 1})"
            )
        structure = self._structure(self._member(number, 2))
        return PlacedDocument(ids, self._layouts(structure, ids))

    def _member(self, number: int, column: int) -> bytes:
        offset, size = self._places[number, column : column + 2].tolist()
        shard = self._shard[number]
        return read_member(self._paths[shard], self._stamps[shard], Member(offset, size))

    def _structure(self, meta: bytes) -> Structure:
        try:
            structure = tuple(tuple(item) for item in json.loads(meta)["items"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{META_FILE} is damaged ({error})") from None
        # Few structures are shared by many documents: keep one object of each.
        return self._interned.setdefault(structure, structure)

    def _where(self, number: int) -> str:
        """Shard and key of a document, for messages."""
        path = self._paths[self._shard[number]]
        first = int(np.searchsorted(self._shard, self._shard[number]))
        return ShardReader(path).samples[number - first].where

    def batch(self, rows: Sequence[int]) -> Batch:
        """Rows by number -> a batch of len(rows) rows."""
        return collate(
            [[self.document(int(d)) for d in self.packing.row(row)] for row in rows],
            self.row_length,
            self.weights,
            self._pad,
        )


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
        rows: the packed rows.
        part: what this rank makes of them.
        seed: decides the order of each epoch.
    """

    def __init__(self, rows: TokenRows, part: Slice, seed: int = 0) -> None:
        self.rows = rows
        self.part = part
        self.seed = seed

    def __iter__(self) -> Iterator[Batch]:
        order = EpochOrder(len(self.rows), self.seed)
        size, rank, world, start = self.part
        for batch in worker_turns():
            first = start + (batch * world + rank) * size
            yield self.rows.batch([order(first + i)[1] for i in range(size)])


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
