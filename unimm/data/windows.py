"""Documents longer than a row: cut into windows of whole sound or film frames.

A document whose longest item is a sound or a film becomes several, each with the other items whole
and a run of that item's frames; runs are as even as they go. A document that would not fit even
with one frame stays too long, and so does one of text and pictures: those are never cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch

from unimm.data.batch import Structure
from unimm.sequence import Grammar, Segment

CUT = ("audio", "video")


class Window(NamedTuple):
    """Frames [start, stop) of item number `item`."""

    item: int
    start: int
    stop: int


def windows(
    structure: Structure, length: int, row_length: int, levels: Mapping[str, int]
) -> list[Window]:
    """How a document of `length` ids is cut to fit a row; empty where it cannot be.

    Args:
        structure: kinds and sizes of its items, as a token shard's meta has them.
        length: its ids.
        row_length: ids of a row.
        levels: codec levels of each modality, K.
    """
    sizes = {}
    for number, (kind, *grid) in enumerate(structure):
        if kind in CUT:
            counts = [int(size) for size in grid]
            per_frame = levels[str(kind)]
            for size in counts[1:]:
                per_frame *= size
            sizes[number] = (counts[0], per_frame)
    if not sizes:
        return []
    item = max(sizes, key=lambda number: sizes[number][0] * sizes[number][1])
    frames, per_frame = sizes[item]
    room = (row_length - (length - frames * per_frame)) // per_frame
    if room < 1:
        return []
    count = -(-frames // room)
    bounds = [frames * part // count for part in range(count + 1)]
    return [Window(item, start, stop) for start, stop in itertools.pairwise(bounds)]


def cut(ids: torch.Tensor, window: Window, grammar: Grammar) -> tuple[torch.Tensor, list[Segment]]:
    """Ids (T,) of a whole document -> ids and items of one window of it.

    Raises:
        ValueError: the ids are malformed, or hold no such frames.
    """
    segments = grammar.parse(ids)
    kind, codes = segments[window.item]
    if kind not in CUT or codes.shape[1] < window.stop:
        raise ValueError(f"item {window.item} holds no frames {window.start} to {window.stop}")
    segments[window.item] = Segment(kind, codes[:, window.start : window.stop])
    return grammar.encode(segments), segments
