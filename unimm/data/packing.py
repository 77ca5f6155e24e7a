"""Documents -> rows of one length, with next to no padding; no document is ever split.

A row begins with the documents that have waited longest. Its rest is filled by solving the subset
sum problem over the next documents in line (Bellman, 1957, section 1.10): a Python integer whose
bit n says that n ids can be filled exactly, shifted once per document. Rows keep near the order
they were given, and long documents do not wait. Documents longer than a row are rejected and
counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

WINDOW = 128
FORMAT = 1  # raised when the same input would be packed otherwise


class Packing(NamedTuple):
    """Rows of document numbers.

    documents: int64, the rows one after the other. starts: int64 (R + 1,), where each row begins
    in it. rejected: int64, documents longer than a row. padding: share of ids in no document.
    """

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    rejected: NDArray[np.int64]
    padding: float

    def __len__(self) -> int:
        """Number of rows, R."""
        return len(self.starts) - 1

    def row(self, index: int) -> NDArray[np.int64]:
        """The documents of one row."""
        return self.documents[self.starts[index] : self.starts[index + 1]]


def pack(
    lengths: ArrayLike, row_length: int, order: ArrayLike | None = None, window: int = WINDOW
) -> Packing:
    """Pack documents into rows.

    Args:
        lengths: (N,), ids of each document.
        row_length: ids of a row.
        order: (N,), the order in which documents come; 0 to N - 1 when None.
        window: documents in line among which a row's rest is sought.

    Raises:
        ValueError: no document fits into a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    sequence = np.arange(len(sizes)) if order is None else np.asarray(order, dtype=np.int64)
    fits = sizes[sequence] <= row_length
    rejected, accepted = sequence[~fits], sequence[fits]
    if not len(accepted):
        raise ValueError(
            f"none of {len(sizes)} documents fits into a row of {row_length} ids; the shortest has "
            f"{sizes.min() if len(sizes) else 0}: raise row_length"
        )
    line = _Line(sizes[accepted].tolist(), window)
    packed: list[int] = []
    starts = [0]
    while line:
        packed += line.row(row_length)
        starts.append(len(packed))
    documents = accepted[np.array(packed, dtype=np.int64)]
    rows = len(starts) - 1
    return Packing(
        documents=documents,
        starts=np.array(starts, dtype=np.int64),
        rejected=rejected,
        padding=1 - float(sizes[documents].sum()) / (rows * row_length),
    )


class _Line:
    """Documents that wait, the longest waiting first; `window` of them can be seen."""

    def __init__(self, lengths: Sequence[int], window: int) -> None:
        self._lengths = lengths
        self._window = max(1, window)
        self._seen: deque[int] = deque()
        self._total = 0  # ids of the documents in sight
        self._coming = 0
        self._look()

    def __bool__(self) -> bool:
        return bool(self._seen)

    def _look(self) -> None:
        while self._coming < len(self._lengths) and len(self._seen) < self._window:
            self._seen.append(self._coming)
            self._total += self._lengths[self._coming]
            self._coming += 1

    def row(self, space: int) -> list[int]:
        """Take the documents of one row."""
        row: list[int] = []
        # The first in line always goes. While what is in sight would not fill the rest twice over,
        # there is little to choose from, and the next in line go too.
        while self._seen and self._lengths[self._seen[0]] <= space:
            if row and self._total >= 2 * space:
                break
            first = self._seen.popleft()
            row.append(first)
            space -= self._lengths[first]
            self._total -= self._lengths[first]
            self._look()
        chosen = fill([self._lengths[document] for document in self._seen], space)
        waiting = list(self._seen)
        row += [waiting[number] for number in chosen]
        self._total -= sum(self._lengths[waiting[number]] for number in chosen)
        taken = set(chosen)
        self._seen = deque(d for number, d in enumerate(waiting) if number not in taken)
        self._look()
        return row


def fill(lengths: Sequence[int], space: int) -> list[int]:
    """Which lengths to take so that their sum comes nearest to `space` without exceeding it.

    Of several ways, the one whose last member comes first.
    """
    reachable = [1]  # bit n: the lengths so far can fill n exactly
    mask = (1 << (space + 1)) - 1
    for length in lengths:
        if reachable[-1] >> space & 1:
            break
        reachable.append((reachable[-1] | reachable[-1] << length) & mask)
    left = reachable[-1].bit_length() - 1
    chosen = []
    for number in range(len(reachable) - 2, -1, -1):
        if not reachable[number] >> left & 1:
            chosen.append(number)
            left -= lengths[number]
    return chosen[::-1]
