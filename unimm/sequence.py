"""Documents <-> ids: the grammar, as one table.

    sequence := <bos> item* <eos>
    item     := text | image | video | audio | semantic | turn
    text     := text pieces
    image    := <image> size(h) size(w) code{h*w*K} </image>               raster order
    video    := <video> size(t) size(h) size(w) code{t*h*w*K} </video>     frame by frame, raster
    audio    := <audio> (code{K})* </audio>                                frame layout
              | <audio> size(t) code{t}(level 0) ... code{t}(level K-1) </audio>   level layout
    semantic := <semantic> (code{K})* </semantic>
    turn     := <user> | <assistant>
    size(n)  := two digit tokens, base 256; left out where the vocabulary fixes the grid

Each modality is one `Rule`: its markers, the sizes it writes, the order of its codes. Writing,
reading, masks for generation, (t, h, w) positions and modality ids all ask that rule. Offsets
between local codes and global ids are added and removed in this file and nowhere else.

Positions: text, markers and sizes advance a clock p and stand at (p, p, p). A code of a raster
item stands at (p + t, p + y, p + x), a code of a frame or level item at (p + frame, p + level, p),
where p is the clock when the item's codes begin; the clock then moves past the item's longest
side (after Qwen2-VL's M-RoPE, arXiv 2409.12191, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unimm.vocabulary import MODALITIES, Vocabulary

Order = Literal["raster", "frame", "level"]

SIZE_BASE = 256
SIZE_DIGITS = 2
MAX_SIZE = SIZE_BASE**SIZE_DIGITS - 1
TURNS = ("user", "assistant")

# modality -> (sizes that it writes, order of its codes); audio's row depends on the layout.
_TABLE: dict[str, tuple[tuple[str, ...], Order]] = {
    "image": (("h", "w"), "raster"),
    "video": (("t", "h", "w"), "raster"),
    "audio": ((), "frame"),
    "audio/level": (("t",), "level"),
    "semantic": ((), "frame"),
}


class GrammarError(ValueError):
    """Ids that the grammar does not derive; names position, state and what was expected."""


class Segment(NamedTuple):
    """One item of a sequence, in local codes.

    kind: "text", a codec modality, or a turn ("user", "assistant").
    codes: int64; text pieces (n,), codes (K, *grid), or empty (0,) for a turn.
    """

    kind: str
    codes: Tensor


class Span(NamedTuple):
    """Where an item stands in ids: [start, stop), markers included, and its (t, h, w) sizes."""

    kind: str
    start: int
    stop: int
    sizes: tuple[int, int, int]


class Layout(NamedTuple):
    """What the grammar knows of each id: positions (3, T) int64, modality (T,) int64."""

    positions: Tensor
    modality: Tensor


class Place(NamedTuple):
    """Codec level of a code, and its offset from the item's clock on the t, h and w axes."""

    level: Tensor
    t: Tensor
    h: Tensor
    w: Tensor


@dataclass(frozen=True)
class Rule:
    """One row of the grammar: how a modality's codes stand in a sequence."""

    modality: str
    open: int
    close: int
    axes: tuple[str, ...]
    order: Order
    starts: tuple[int, ...]  # first id of each codec level
    ends: tuple[int, ...]
    fixed: tuple[int, int, int] | None = None  # (t, h, w) that never vary and are not written

    @property
    def num_levels(self) -> int:
        """K, the number of codec levels."""
        return len(self.starts)

    @property
    def header(self) -> int:
        """Ids between the opening marker and the first code."""
        return SIZE_DIGITS * len(self.written)

    @property
    def written(self) -> tuple[str, ...]:
        """Axes whose sizes stand in a sequence."""
        return self.axes if self.fixed is None else ()

    def count(self, sizes: tuple[int, int, int]) -> int:
        """Number of codes of an item with (t, h, w) sizes (1 where an axis is not written)."""
        return sizes[0] * sizes[1] * sizes[2] * self.num_levels

    def place(self, index: Tensor, t: Tensor | int, h: Tensor | int, w: Tensor | int) -> Place:
        """Level and offsets of the index-th code of an item; all arguments broadcast."""
        levels = self.num_levels
        if self.order == "level":
            level, frame = index // t, index % t
        else:
            level, frame = index % levels, index // levels
        if self.order != "raster":
            return Place(level, frame, level, torch.zeros_like(index))
        return Place(level, frame // (h * w), frame // w % h, frame % w)

    def extent(self, sizes: tuple[int, int, int]) -> int:
        """How far an item's codes move the clock."""
        if self.order == "raster":
            return max(sizes)
        return max(sizes[0], self.num_levels) if sizes[0] else 0

    def flatten(self, codes: Tensor) -> Tensor:
        """Local codes (K, *grid) -> global ids (n,) in sequence order."""
        shifted = codes + torch.tensor(self.starts).view(-1, *(1,) * (codes.ndim - 1))
        return (shifted if self.order == "level" else shifted.movedim(0, -1)).reshape(-1)

    def unflatten(self, ids: Tensor, sizes: tuple[int, int, int]) -> Tensor:
        """Global ids (n,) -> local codes (K, *grid)."""
        grid = sizes[:1] if self.order != "raster" else sizes[3 - len(self.axes) :]
        levels = self.num_levels
        if self.order == "level":
            codes = ids.view(levels, *grid)
        else:
            codes = ids.view(*grid, levels).movedim(-1, 0)
        return (codes - torch.tensor(self.starts).view(-1, *(1,) * len(grid))).contiguous()

    def first_misfit(self, ids: Tensor, sizes: tuple[int, int, int]) -> int:
        """Index of the first id that is not a code of the level due there; len(ids) if none."""
        place = self.place(torch.arange(len(ids)), *sizes)
        starts, ends = torch.tensor(self.starts), torch.tensor(self.ends)
        level = place.level.clamp(max=self.num_levels - 1)
        bad = (ids < starts[level]) | (ids >= ends[level])
        return int(bad.nonzero()[0]) if bool(bad.any()) else len(ids)


def _sides(grid: Sequence[int]) -> tuple[int, int, int]:
    """A raster grid (h, w) or (t, h, w) -> (t, h, w)."""
    t, h, w = (1,) * (3 - len(grid)) + tuple(grid)
    return t, h, w


def _find(tokens: list[int], token: int, start: int) -> int:
    """Where a token stands from `start` on; the end where it does not."""
    try:
        return tokens.index(token, start)
    except ValueError:
        return len(tokens)


class Grammar:
    """The grammar over one vocabulary.

    Args:
        vocabulary: decides which modalities have a rule, and audio's layout.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.bos, self.eos = vocabulary.marker("<bos>"), vocabulary.marker("<eos>")
        self.turns = {vocabulary.marker(f"<{role}>"): role for role in TURNS}
        self.rules: dict[str, Rule] = {}
        for modality in vocabulary.modalities[1:]:
            levelled = modality == "audio" and vocabulary.audio_layout == "level"
            axes, order = _TABLE["audio/level" if levelled else modality]
            blocks = vocabulary.levels(modality)
            grid = vocabulary.grids.get(modality)
            self.rules[modality] = Rule(
                modality=modality,
                open=vocabulary.marker(f"<{modality}>"),
                close=vocabulary.marker(f"</{modality}>"),
                axes=axes,
                order=order,
                starts=tuple(block.start for block in blocks),
                ends=tuple(block.end for block in blocks),
                fixed=None if grid is None else _sides(grid),
            )

    @cached_property
    def _by_marker(self) -> dict[int, Rule]:
        return {rule.open: rule for rule in self.rules.values()}

    def rule(self, modality: str) -> Rule:
        """The rule of a codec modality.

        Raises:
            ValueError: the vocabulary has no such modality.
        """
        if modality not in self.rules:
            known = ", ".join(self.vocabulary.modalities)
            raise ValueError(f"there is no codec for {modality!r} here; modalities are {known}")
        return self.rules[modality]

    # Writing

    def encode(self, segments: list[Segment], *, complete: bool = True) -> Tensor:
        """Segments -> ids (T,) int64; `complete=False` leaves out the final `<eos>` (a prompt).

        Raises:
            ValueError: codes out of range or of the wrong grid, named by item and level.
        """
        parts: list[Tensor] = []
        markers = [self.bos]  # that wait for the next codes: a tensor for each would cost more
        for number, segment in enumerate(segments):
            before, codes, after = self._write(segment, f"item {number} ({segment.kind})")
            parts += [torch.tensor(markers + before, dtype=torch.int64), codes]
            markers = after
        if complete:
            markers = [*markers, self.eos]
        return torch.cat([*parts, torch.tensor(markers, dtype=torch.int64)])

    def _write(self, segment: Segment, where: str) -> tuple[list[int], Tensor, list[int]]:
        """Markers and sizes before an item's ids, these ids, and the marker after them."""
        kind, codes = segment
        if kind in TURNS:
            return [self.vocabulary.marker(f"<{kind}>")], codes[:0], []
        if kind == "text":
            block = self.vocabulary["text"]
            self._require_range(codes[None], [block.size], where)
            return [], codes + block.start, []
        rule = self.rule(kind)
        sizes = self._sizes(rule, codes, where)
        levels = [end - start for start, end in zip(rule.starts, rule.ends, strict=True)]
        self._require_range(codes.flatten(1), levels, where)
        header = [rule.open]
        for axis, size in zip("thw", sizes, strict=True):
            if axis in rule.written:
                header.extend(self.size_ids(size))
        return header, rule.flatten(codes), [rule.close]

    @staticmethod
    def _require_range(codes: Tensor, sizes: list[int], where: str) -> None:
        """Codes (K, n) of each level lie in its range."""
        if not codes.numel():
            return
        lows, highs = (bound.tolist() for bound in codes.aminmax(dim=1))
        for level, (low, high, size) in enumerate(zip(lows, highs, sizes, strict=True)):
            if low < 0 or high >= size:
                at = f"{where}, level {level}" if len(sizes) > 1 else where
                raise ValueError(f"{at}: codes must lie in 0 to {size - 1}, found {low} to {high}")

    @staticmethod
    def _sizes(rule: Rule, codes: Tensor, where: str) -> tuple[int, int, int]:
        grid = len(rule.axes) if rule.order == "raster" else 1
        if codes.ndim != grid + 1 or codes.shape[0] != rule.num_levels:
            raise ValueError(
                f"{where}: expected codes of shape (K={rule.num_levels}, {grid} grid axes), got "
                f"{tuple(codes.shape)}"
            )
        lengths = codes.shape[1:]
        if rule.axes and not all(1 <= n <= MAX_SIZE for n in lengths):
            raise ValueError(f"{where}: grid sizes must be 1 to {MAX_SIZE}, got {tuple(lengths)}")
        if rule.order != "raster":
            return lengths[0], 1, 1
        sizes = _sides(lengths)
        if rule.fixed not in (None, sizes):
            raise ValueError(
                f"{where}: this vocabulary fixes the grid at {rule.fixed} (t, h, w), got {sizes}"
            )
        return sizes

    def length(self, segment: Segment) -> int:
        """Number of ids that an item is written with, its markers and sizes included."""
        kind, codes = segment
        if kind in TURNS:
            return 1
        return codes.numel() + (0 if kind == "text" else 2 + self.rule(kind).header)

    def size_ids(self, size: int) -> list[int]:
        """The two digit tokens that write a size (1 to 65,535)."""
        start = self.vocabulary["digit"].start
        return [start + size // SIZE_BASE, start + size % SIZE_BASE]

    # Reading

    def parse(self, ids: Tensor, *, strict: bool = True, complete: bool = True) -> list[Segment]:
        """Ids (T,) -> segments; the inverse of `encode`.

        Args:
            ids: int64 (T,).
            strict: refuse malformed ids; otherwise keep every whole item and skip the rest.
            complete: require the final `<eos>` (strict only).

        Raises:
            GrammarError: the ids are malformed and `strict` is set.
        """
        segments = []
        for span in self.spans(ids, strict=strict, complete=complete):
            if span.kind in TURNS:
                segments.append(Segment(span.kind, ids.new_zeros(0)))
            elif span.kind == "text":
                piece = ids[span.start : span.stop] - self.vocabulary["text"].start
                segments.append(Segment("text", piece))
            else:
                rule = self.rules[span.kind]
                first = span.start + 1 + rule.header
                codes = ids[first : first + rule.count(span.sizes)]
                segments.append(Segment(span.kind, rule.unflatten(codes, span.sizes)))
        return segments

    def spans(self, ids: Tensor, *, strict: bool = True, complete: bool = True) -> Iterator[Span]:
        """The items of a sequence, in order; see `parse`."""
        text = self.vocabulary["text"]
        tokens: list[int] = ids.tolist()
        length = len(tokens)
        at = 0
        if length and tokens[0] == self.bos:
            at = 1
        elif strict:
            raise self._error(tokens, 0, "the beginning", "<bos>")
        while at < length:
            token = tokens[at]
            if text.start <= token < text.end:
                stop = at + 1
                while stop < length and text.start <= tokens[stop] < text.end:
                    stop += 1
                yield Span("text", at, stop, (1, 1, 1))
                at = stop
            elif token in self.turns:
                yield Span(self.turns[token], at, at + 1, (1, 1, 1))
                at += 1
            elif token in self._by_marker:
                span = self._read_item(ids, tokens, at, self._by_marker[token], strict)
                if span is not None:
                    yield span
                at = at + 1 if span is None else span.stop
            elif token == self.eos:
                if strict and at != length - 1:
                    raise self._error(tokens, at + 1, "after <eos>", "the end")
                return
            elif strict:
                raise self._error(tokens, at, "between items", "text, an opening marker or <eos>")
            else:
                at += 1
        if strict and complete:
            raise self._error(tokens, length, "between items", "<eos>")

    def _read_item(
        self, ids: Tensor, tokens: list[int], start: int, rule: Rule, strict: bool
    ) -> Span | None:
        try:
            return self._require_item(ids, tokens, start, rule, salvage=not strict)
        except GrammarError:
            if strict:
                raise
            return None

    def _require_item(
        self, ids: Tensor, tokens: list[int], start: int, rule: Rule, *, salvage: bool
    ) -> Span:
        name = rule.modality
        sizes = self._read_sizes(tokens, start, rule)
        first = start + 1 + rule.header
        stop = first + rule.count(sizes) if rule.axes else _find(tokens, rule.close, first)
        misfit = rule.first_misfit(ids[first:stop], sizes)
        if not rule.axes:
            sizes = (misfit // rule.num_levels, 1, 1)
            whole = first + rule.count(sizes)
            closed = whole < len(tokens) and tokens[whole] == rule.close
            if salvage and (sizes[0] or closed):  # whole frames are worth keeping, closed or not
                return Span(name, start, whole + closed, sizes)
        if first + misfit < stop:
            level = int(rule.place(torch.tensor(misfit), *sizes).level)
            raise self._error(
                tokens,
                first + misfit,
                f"in {name} codes (number {misfit})",
                f"an id of {name} level {level}, {rule.starts[level]} to {rule.ends[level] - 1}",
            )
        if not rule.axes and (stop - first) % rule.num_levels:
            raise self._error(tokens, stop, f"inside an {name} frame", "the frame's other levels")
        if stop >= len(tokens) or tokens[stop] != rule.close:
            raise self._error(tokens, stop, f"at the end of {name}", f"</{name}>")
        return Span(name, start, stop + 1, sizes)

    def _read_sizes(self, tokens: list[int], start: int, rule: Rule) -> tuple[int, int, int]:
        if rule.fixed is not None:
            return rule.fixed
        digit = self.vocabulary["digit"]
        sizes = {"t": 1, "h": 1, "w": 1}
        at = start + 1
        for axis in rule.axes:
            value = 0
            for _ in range(SIZE_DIGITS):
                if at >= len(tokens) or not digit.start <= tokens[at] < digit.end:
                    raise self._error(tokens, at, f"in {rule.modality} size {axis}", "a digit")
                value = value * SIZE_BASE + tokens[at] - digit.start
                at += 1
            if value == 0:
                state = f"in {rule.modality} size {axis}"
                raise self._error(tokens, at - 1, state, "a size of at least 1")
            sizes[axis] = value
        return sizes["t"], sizes["h"], sizes["w"]

    @staticmethod
    def _error(tokens: list[int], at: int, state: str, expected: str) -> GrammarError:
        found = f"id {tokens[at]}" if at < len(tokens) else "the end of the ids"
        return GrammarError(f"position {at}, {state}: expected {expected}, found {found}")

    # What the grammar knows of each id

    def layout(self, ids: Tensor, *, complete: bool = True) -> Layout:
        """Positions (3, T) and modality (T,) of well-formed ids; markers count to their item.

        Raises:
            GrammarError: the ids are malformed.
        """
        length = len(ids)
        positions = torch.empty(3, length, dtype=torch.int64)
        modality = torch.zeros(length, dtype=torch.int64)
        clock, done = 0, 0

        def run(stop: int) -> None:  # ids up to `stop` that advance the clock one by one
            nonlocal clock, done
            positions[:, done:stop] = torch.arange(clock, clock + stop - done)
            clock, done = clock + stop - done, stop

        for span in self.spans(ids, complete=complete):
            if span.kind not in self.rules:
                run(span.stop)
                continue
            rule = self.rules[span.kind]
            run(span.start + 1 + rule.header)
            count = rule.count(span.sizes)
            place = rule.place(torch.arange(count), *span.sizes)
            positions[:, done : done + count] = clock + torch.stack(place[1:])
            modality[span.start : span.stop] = MODALITIES.index(span.kind)
            clock, done = clock + rule.extent(span.sizes), done + count
            run(span.stop)
        run(length)
        return Layout(positions, modality)
