# pyright: strict
# torch's own types are partly unknown, and what users give is checked whatever its annotation says.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnnecessaryIsInstance=false

"""Answers while they are written: words, rows of pictures, chunks of sound, frames of film.

Sound and film go through the codec's streaming decoder, whose chunks joined are the whole. A
picture's decoder looks at the rows below too, so a row's piece carries the picture so far, and the
last one the picture. A codec that can't stream gives its item when it is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unimm.generation.api import make_job, seeds_of
from unimm.generation.engine import Step, run
from unimm.generation.requests import Size, cut, sample_count
from unimm.model import UnifiedLM
from unimm.sequence import SIZE_BASE, Grammar, Rule, Segment
from unimm.signals import Audio, Item, Video
from unimm.tokenizer import UnifiedTokenizer, signal_item

SOUND_CHUNK = 0.08  # seconds of sound in a piece, at least; the first frame comes at once


class Piece(NamedTuple):
    """Part of an answer.

    kind: "text", a codec modality, "user" or "assistant". item: its item's number, from 0.
    content: text, samples or frames that are new; of a picture all that there is so far; None
        where the codes tell nothing yet. codes: int64 (n,), local codes that are new, in the order
        of writing. sizes: its grid (t, h, w) in codes. final: the item is whole.
    """

    kind: str
    item: int
    content: Item | None
    codes: Tensor
    sizes: tuple[int, int, int]
    final: bool


def stream(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompt: Sequence[Item],
    modality: str | None = None,
    *,
    size: Size | None = None,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    unconditional: Sequence[Item] | None = None,
    **sampling: Any,
) -> Iterator[Piece]:
    """Continue a document, giving out what is there as soon as it is.

    Args:
        lm, tok, prompt, modality, size, max_new_tokens, seed, unconditional: see `generate`.
        sampling: options of `Sampling`; a value, or modality -> value.

    Yields:
        What is new, in the order of writing; `join` of it is what `generate` returns.

    Raises:
        ValueError: as for `generate`.
    """
    bare = None if unconditional is None else [unconditional]
    seeds = seeds_of(seed, 1)
    job = make_job(lm, tok, [prompt], [modality], [size], max_new_tokens, seeds, bare, sampling)
    yield from pieces(tok, run(lm, tok.grammar, job), size)


def pieces(
    tok: UnifiedTokenizer, steps: Iterable[Step], size: Size | None = None
) -> Iterator[Piece]:
    """The pieces of the first row of a run."""
    teller = _Teller(tok, size)
    for step in steps:
        yield from teller.read(int(step.ids[0]))
    yield from teller.end()


def join(parts: Iterable[Piece]) -> list[Item]:
    """The document that the pieces of an answer make, of some of them what there is so far."""
    items: dict[int, list[Item]] = {}
    for part in parts:
        if part.content is not None:
            items.setdefault(part.item, []).append(part.content)
    return [_joined(contents) for contents in items.values()]


def _joined(contents: Sequence[Item]) -> Item:
    last = contents[-1]
    if isinstance(last, str):
        return "".join(content for content in contents if isinstance(content, str))
    if isinstance(last, Audio):
        samples = [content.samples for content in contents if isinstance(content, Audio)]
        return Audio(torch.cat(samples, 1), last.sample_rate)
    if isinstance(last, Video):
        frames = [content.frames for content in contents if isinstance(content, Video)]
        return Video(torch.cat(frames), last.fps)
    return last


class _Teller:
    """Reads one row's ids and tells what they hold."""

    def __init__(self, tok: UnifiedTokenizer, size: Size | None) -> None:
        self.tok, self.size = tok, size
        self.text = tok.vocabulary["text"]
        self.openings = {rule.open: rule for rule in tok.grammar.rules.values()}
        self.item = 0
        self.words: list[int] = []
        self.said = ""
        self.open: _Open | None = None

    def read(self, token: int) -> Iterator[Piece]:
        if self.open is not None:
            yield from self.open.read(token)
            if self.open.closed:
                self.open, self.item = None, self.item + 1
        elif self.text.start <= token < self.text.end:
            self.words.append(token - self.text.start)
            now = self.tok.text.decode(torch.tensor(self.words))
            if not now.endswith("\ufffd"):  # a character whose last byte is still to come
                yield self._said(now, 1, final=False)
        else:
            yield from self.end()
            if token in self.openings:
                rule = self.openings[token]
                self.open = _OPEN[rule.modality](self.tok, rule, self.item, self.size)
            elif token in self.tok.grammar.turns:
                role = self.tok.grammar.turns[token]
                segment = Segment(role, torch.zeros(0, dtype=torch.int64))
                (turn,) = self.tok.decode_segments([segment])
                yield Piece(role, self.item, turn, segment.codes, (1, 1, 1), final=True)
                self.item += 1

    def end(self) -> Iterator[Piece]:
        """The text that was being written is whole."""
        if self.words:
            now = self.tok.text.decode(torch.tensor(self.words))
            yield self._said(now, 0, final=True)
            self.words, self.said, self.item = [], "", self.item + 1

    def _said(self, now: str, count: int, *, final: bool) -> Piece:
        new, self.said = now[len(self.said) :], now
        codes = torch.tensor(self.words[len(self.words) - count :], dtype=torch.int64)
        return Piece("text", self.item, new, codes, (1, 1, 1), final)


class _Open:
    """A codec item that is being written; subclasses say what comes when."""

    def __init__(self, tok: UnifiedTokenizer, rule: Rule, item: int, size: Size | None) -> None:
        self.tok, self.rule, self.item, self.size = tok, rule, item, size
        # Whether a codec streams is its own affair: it then has `init_state`.
        self.codec: Any = tok.codecs[rule.modality]
        self.sizes = rule.fixed or (1, 1, 1)
        self.header: list[int] = []
        self.ids: list[int] = []
        self.told = 0  # codes that pieces have carried
        self.closed = False

    def read(self, token: int) -> Iterator[Piece]:
        rule = self.rule
        if len(self.header) < rule.header:
            self.header.append(token)
            if len(self.header) == rule.header:
                self.sizes = _sizes(self.tok.grammar, rule, self.header)
        elif token == rule.close:
            self.closed = True
            yield self._piece(self.whole(), final=True)
        else:
            self.ids.append(token)
            yield from self.written()

    def written(self) -> Iterator[Piece]:
        """A code has been written."""
        return iter(())

    def whole(self) -> Item | None:
        """What the final piece holds: all that has not been given out."""
        return cut(
            self.tok.decode_segments([Segment(self.rule.modality, self.codes())])[0], self.size
        )

    def codes(self, sizes: tuple[int, int, int] | None = None) -> Tensor:
        """Local codes (K, *grid) of what is written, of the first ones where sizes are given."""
        sizes = self.written_sizes if sizes is None else sizes
        return self.rule.unflatten(torch.tensor(self.ids[: self.rule.count(sizes)]), sizes)

    def _piece(self, content: Item | None, *, final: bool = False) -> Piece:
        new = torch.tensor(self.ids[self.told :], dtype=torch.int64)
        index = torch.arange(self.told, len(self.ids))
        self.told = len(self.ids)
        level = self.rule.place(index, *self.sizes).level
        codes = new - torch.tensor(self.rule.starts)[level]
        return Piece(self.rule.modality, self.item, content, codes, self.written_sizes, final)

    @property
    def written_sizes(self) -> tuple[int, int, int]:
        """(t, h, w); an open-ended item has as many frames as are written."""
        return self.sizes if self.rule.axes else (len(self.ids) // self.rule.num_levels, 1, 1)


class _Picture(_Open):
    """A piece for each row of codes, with the picture so far."""

    def written(self) -> Iterator[Piece]:
        row = self.sizes[2] * self.rule.num_levels
        rows = len(self.ids) // row
        if len(self.ids) % row == 0 and rows < self.sizes[1]:
            codes = self.codes((1, rows, self.sizes[2]))
            (content,) = self.tok.decode_segments([Segment("image", codes)])
            if isinstance(self.size, tuple):
                content = cut(content, (rows * self.codec.downsample[-2], self.size[1]))
            yield self._piece(content)


class _Stream(_Open):
    """An item of a codec that decodes in chunks."""

    def __init__(self, tok: UnifiedTokenizer, rule: Rule, item: int, size: Size | None) -> None:
        super().__init__(tok, rule, item, size)
        self.streams = hasattr(self.codec, "init_state")
        if self.streams:
            self.state: Any = self.codec.init_state(1)
        self.given = 0  # frames of codes that have been decoded

    def chunk(self, codes: Tensor, **options: bool) -> Tensor:
        """Decode the next frames, (K, n, ...) -> (C, signal); options are the codec's own."""
        device = next(self.codec.parameters()).device
        with torch.no_grad():
            signal, self.state = self.codec.decode_chunk(
                codes[None].to(device), self.state, **options
            )
        self.given += codes.shape[1]
        return signal[0].float().cpu()


class _Sound(_Stream):
    """A piece for the first frame, then one for each chunk."""

    def __init__(self, tok: UnifiedTokenizer, rule: Rule, item: int, size: Size | None) -> None:
        super().__init__(tok, rule, item, size)
        rate = self.codec.frame_rate
        assert rate is not None
        self.frames = max(1, round(SOUND_CHUNK * rate))
        self.samples = 0

    def written(self) -> Iterator[Piece]:
        levels = self.rule.num_levels
        frames, rest = divmod(len(self.ids), levels)
        if self.rule.order == "level":  # a frame is whole when its last level is
            frames, rest = len(self.ids) - (levels - 1) * self.sizes[0], 0
        due = 1 if self.given == 0 else self.frames
        if self.streams and rest == 0 and frames - self.given >= due:
            yield self._piece(self.sound(frames))

    def sound(self, frames: int, *, last: bool = False) -> Audio | None:
        """What the frames up to the given number add; None where nothing of it was asked for.

        The `last` frames bring what a codec with a delay has held back.
        """
        if self.rule.order == "level":
            missing = self.rule.count(self.sizes) - len(self.ids)
            ids = torch.tensor(self.ids + [0] * missing)
            codes = self.rule.unflatten(ids, self.sizes)[:, self.given : frames]
        else:
            codes = self.codes()[:, self.given : frames]
        signal = self.chunk(codes, last=last)
        if self.size is not None and not isinstance(self.size, tuple):
            assert self.codec.sample_rate is not None
            left = sample_count(self.size, self.codec.sample_rate) - self.samples
            signal = signal[:, : max(0, left)]
        self.samples += signal.shape[1]
        item = signal_item("audio", signal, self.codec)
        assert isinstance(item, Audio)
        return item if signal.shape[1] else None

    def whole(self) -> Item | None:
        if not self.streams:
            return super().whole()
        frames = len(self.ids) // self.rule.num_levels
        return self.sound(frames, last=True) if frames else None


class _Film(_Stream):
    """A piece for each frame of codes."""

    def __init__(self, tok: UnifiedTokenizer, rule: Rule, item: int, size: Size | None) -> None:
        super().__init__(tok, rule, item, size)
        self.streams = self.streams and rule.order == "raster"
        self.shown = 0

    def written(self) -> Iterator[Piece]:
        frame = self.sizes[1] * self.sizes[2] * self.rule.num_levels
        frames, rest = divmod(len(self.ids), frame)
        if self.streams and rest == 0:
            codes = self.codes((frames, self.sizes[1], self.sizes[2]))[:, self.given :]
            item = signal_item("video", self.chunk(codes), self.codec)
            assert isinstance(item, Video)
            yield self._piece(self.cropped(item))

    def cropped(self, item: Video) -> Video | None:
        """New frames without what was not asked for."""
        if not isinstance(self.size, tuple):
            return item
        left = self.size[0] - self.shown
        self.shown += len(item.frames)
        kept = cut(item, (left, *self.size[1:])) if left > 0 else None
        return kept if isinstance(kept, Video) else None

    def whole(self) -> Item | None:
        return None if self.streams else super().whole()


def _sizes(grammar: Grammar, rule: Rule, header: Sequence[int]) -> tuple[int, int, int]:
    """(t, h, w) from the digits of an item's header."""
    digit = grammar.vocabulary["digit"].start
    sizes = {"t": 1, "h": 1, "w": 1}
    for axis, high, low in zip(rule.axes, header[::2], header[1::2], strict=True):
        sizes[axis] = (high - digit) * SIZE_BASE + low - digit
    return sizes["t"], sizes["h"], sizes["w"]


_OPEN: dict[str, type[_Open]] = {
    "image": _Picture,
    "audio": _Sound,
    "video": _Film,
    "semantic": _Open,
}
