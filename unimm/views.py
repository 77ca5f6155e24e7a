# pyright: strict
# torch's own types are partly unknown, and what users give is checked whatever its annotation says.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnnecessaryIsInstance=false

"""`unimm.show`: documents, tokens, codes and reconstructions as a notebook shows them.

    unimm.show(document)             every item of it
    unimm.show(ids, tok)             tokens, coloured by modality, with sizes and grids
    unimm.show(codes, codec)         grids of codes, and how many of the codebook they use
    unimm.show(picture, codec)       original, reconstruction, error, figures

In a terminal each prints itself in at most five lines.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimm.display import html, media
from unimm.display.regions import region_figure
from unimm.sequence import TURNS, Span
from unimm.signals import Audio, Item, Semantic, Turn, Video
from unimm.tokenizer import (
    UnifiedTokenizer,
    audio_signal,
    image_signal,
    modality_of,
    signal_item,
    video_signal,
)
from unimm_tokenizers.codec import Codec
from unimm_tokenizers.quantize import code_usage
from unimm_tokenizers.semantic import SemanticCodec

MAX_PIECES = 400  # text pieces that a view spells out one by one
MAX_GRIDS = 32  # pictures of code grids in a view
_WIDTH = 96  # letters of a line in a terminal


class View(ABC):
    """What a notebook shows by `_repr_html_`, and a terminal in at most five lines."""

    @abstractmethod
    def _repr_html_(self) -> str:
        """A piece of a page."""

    @abstractmethod
    def lines(self) -> list[str]:
        """The same in words."""

    def __repr__(self) -> str:
        lines = [
            line if len(line) <= _WIDTH else line[: _WIDTH - 3] + "..." for line in self.lines()
        ]
        return "\n".join(lines if len(lines) <= 5 else [*lines[:4], f"... {len(lines) - 4} more"])


@dataclass(frozen=True, repr=False)
class DocumentView(View):
    """The items of a document."""

    document: Sequence[Item]

    def lines(self) -> list[str]:
        """An item a line."""
        return [_words(item) for item in self.document] or ["(an empty document)"]

    def _repr_html_(self) -> str:
        return html.row(item_html(item) for item in self.document)


@dataclass(frozen=True, repr=False)
class TokensView(View):
    """Ids (T,) of one vocabulary; malformed parts are shown as plain ids."""

    tokenizer: UnifiedTokenizer
    ids: Tensor

    def _spans(self) -> list[Span]:
        return list(self.tokenizer.grammar.spans(self.ids, strict=False))

    def lines(self) -> list[str]:
        """Sum of ids, then items with the ids that they take."""
        spans = self._spans()
        items = [f"{span.kind}{_sides(span)} ({span.stop - span.start})" for span in spans]
        return (
            [f"{len(self.ids)} ids, {len(spans)} items", ", ".join(items)] if items else ["0 ids"]
        )

    def _repr_html_(self) -> str:
        parts: list[str] = []
        done, grids = 0, 0
        for span in self._spans():
            parts += self._outside(done, span.start)
            done = span.stop
            if span.kind == "text":
                parts += self._pieces(span)
            elif span.kind in TURNS:
                parts.append(html.swatch(f"<{span.kind}>", html.COLOURS["special"]))
            else:
                label = f"<{span.kind}>{_sides(span)}, {span.stop - span.start} ids"
                parts.append(html.swatch(label, html.colour_of(span.kind)))
                grids += 1
                parts += [self._grid(span)] if grids <= MAX_GRIDS else []
        parts += self._outside(done, len(self.ids))
        return html.row(parts)

    def _outside(self, start: int, stop: int) -> list[str]:
        """Markers and whatever else stands between items."""
        return [
            html.swatch(self._name(token), html.COLOURS["special"], f"id {token}")
            for token in self.ids[start:stop].tolist()
        ]

    def _name(self, token: int) -> str:
        grammar = self.tokenizer.grammar
        return {grammar.bos: "<bos>", grammar.eos: "<eos>"}.get(token, str(token))

    def _pieces(self, span: Span) -> list[str]:
        ids = self.ids[span.start : span.stop]
        local = ids - self.tokenizer.vocabulary["text"].start
        shown = [
            html.swatch(
                self.tokenizer.text.decode(piece[None]) or "\u2205",
                html.COLOURS["text"],
                f"id {token}",
            )
            for token, piece in zip(ids[:MAX_PIECES].tolist(), local[:MAX_PIECES], strict=True)
        ]
        if len(ids) > MAX_PIECES:
            shown.append(html.swatch(f"... {len(ids) - MAX_PIECES} more", html.COLOURS["text"]))
        return shown

    def _grid(self, span: Span) -> str:
        rule = self.tokenizer.grammar.rules[span.kind]
        first = span.start + 1 + rule.header
        codes = rule.unflatten(self.ids[first : first + rule.count(span.sizes)], span.sizes)
        return grids_html(codes, self.tokenizer.codecs[span.kind].codebook_size)


@dataclass(frozen=True, repr=False)
class CodesView(View):
    """Local codes (B, K, *grid) of a codec."""

    codec: Codec
    codes: Tensor

    def lines(self) -> list[str]:
        """Shape, and use of the codebook by level."""
        head = f"codes {tuple(self.codes.shape)} of {self.codec.name!r}"
        return [head, *(f"level {n}: {used}" for n, used in enumerate(self._use()))]

    def _use(self) -> list[str]:
        usage = code_usage(self.codes.cpu(), self.codec.codebook_size)
        return [
            f"{share:.1%} of {self.codec.codebook_size:,} codes used, {abs(bits):.2f} bits per code"
            for share, bits in zip(usage.usage.tolist(), usage.entropy.tolist(), strict=True)
        ]

    def _repr_html_(self) -> str:
        size = self.codec.codebook_size
        grids = (grids_html(codes, size) for codes in self.codes[:MAX_GRIDS].cpu())
        levels = [(f"level {level}", used) for level, used in enumerate(self._use())]
        facts: list[tuple[str, object]] = [("shape", tuple(self.codes.shape)), *levels]
        return html.card(f"codes of {self.codec.name}", facts, html.row(grids))


@dataclass(frozen=True, repr=False)
class Reconstruction(View):
    """An item and what a codec makes of it.

    figures: PSNR or SNR in dB (of the signal in [-1, 1], whose peak is 2), and the bits spent.
    regions: HTML of a semantic picture's regions and the code of each.
    """

    original: Item
    made: Item
    error: Item
    figures: dict[str, str]
    regions: str = ""

    def lines(self) -> list[str]:
        """The figures."""
        return [_words(self.original), ", ".join(f"{k} {v}" for k, v in self.figures.items())]

    def _repr_html_(self) -> str:
        names = ("original", "reconstruction", "error")
        items = (self.original, self.made, self.error)
        parts = [
            html.figure(item_html(item), name) for name, item in zip(names, items, strict=True)
        ]
        parts += [self.regions] if self.regions else []
        return html.card("reconstruction", self.figures.items(), html.row(parts))


@torch.no_grad()
def reconstruct(item: Item, codec: Codec) -> Reconstruction:
    """Encode and decode an item.

    Args:
        item: a picture, Audio or Video, of any size and rate.
        codec: one for its modality.

    Returns:
        The item as the codec takes it, what comes back, their difference, and figures.

    Raises:
        ValueError: the codec is not for such an item.
    """
    kind = modality_of(item)
    if kind not in codec.modalities:
        raise ValueError(f"{codec.name!r} is a codec for {', '.join(codec.modalities)}, not {kind}")
    if isinstance(item, Audio):
        signal = audio_signal(item, codec)
    elif isinstance(item, Video):
        signal = video_signal(item, codec)
    else:
        picture = item.image if isinstance(item, Semantic) else item
        assert isinstance(picture, Image.Image)
        signal = image_signal(picture, codec)
    device = next(codec.parameters()).device
    codes = codec.encode(signal[None].to(device))
    made = codec.decode(codes, tuple(signal.shape[1:])).float().cpu()[0].clamp(-1, 1)
    error = made - signal
    power, noise = float(signal.square().mean()), float(error.square().mean())
    written = int((codes >= 0).sum())  # semantic codes are padded
    bits = written * math.log2(codec.codebook_size)
    if kind == "audio":
        figures = {"SNR": _decibels(power, noise)}
        figures["bit rate"] = (
            f"{bits / max(1e-9, signal.shape[-1] / (codec.sample_rate or 1)):.0f} bit/s"
        )
        difference = error
    else:
        figures = {"PSNR": _decibels(4.0, noise)}
        figures["bits per pixel"] = f"{bits / signal[0].numel():.3f}"
        difference = error.abs() - 1  # black where nothing differs
    figures["codes"] = f"{written:,}"
    shown = [signal_item(kind, part, codec) for part in (signal, made, difference)]
    regions = _regions(shown[0], signal, codec, codes) if kind == "semantic" else ""
    return Reconstruction(shown[0], shown[1], shown[2], figures, regions)


def _regions(item: Item, signal: Tensor, codec: Codec, codes: Tensor) -> str:
    """HTML of a semantic picture's regions, of a codec that can tell them."""
    if not (isinstance(codec, SemanticCodec) and isinstance(item, Semantic)):
        return ""
    found = codec.explain(signal[None].to(codes.device))[0].cpu().numpy()
    return region_figure(item.image, found, codes[codes >= 0].tolist())


def show(value: object, of: UnifiedTokenizer | Codec | None = None) -> View:
    """A view of a document, of ids, of codes, or of a reconstruction.

    Args:
        value: a document (a list) or one item; int64 ids (T,); int64 codes (B, K, *grid).
        of: the tokenizer of the ids; the codec of the codes, or one to reconstruct the item with.

    Raises:
        ValueError: there is no view of such a value.

    >>> show(["seven", "eight"])
    text 'seven'
    text 'eight'
    """
    if isinstance(value, Tensor) and isinstance(of, UnifiedTokenizer) and value.ndim == 1:
        return TokensView(of, value.cpu())
    if isinstance(value, Tensor) and isinstance(of, Codec) and value.ndim >= 3:
        return CodesView(of, value)
    if isinstance(value, Tensor):
        raise ValueError(
            f"show: a tensor {tuple(value.shape)} needs what it is of: ids (T,) a tokenizer, codes "
            "(B, K, *grid) a codec"
        )
    if isinstance(value, list | tuple):
        return DocumentView(value)
    if isinstance(of, Codec) and isinstance(value, Image.Image | Audio | Video | Semantic):
        return reconstruct(value, of)
    if isinstance(value, str | Image.Image | Audio | Video | Semantic | Turn):
        return DocumentView([value])
    raise ValueError(f"show: there is no view of a {type(value).__name__}")


def item_html(item: Item) -> str:
    """An item of a document as HTML.

    Raises:
        ValueError: the object is nothing that a document holds.
    """
    kind = modality_of(item)
    if isinstance(item, str):
        return html.swatch(item, html.COLOURS["text"])
    if isinstance(item, Image.Image):
        return media.picture(item)
    if isinstance(item, Audio | Video | Semantic):
        return item._repr_html_()  # pyright: ignore[reportPrivateUsage]  (notebooks' own name)
    return html.swatch(f"<{kind}>", html.COLOURS["special"])


def grids_html(codes: Tensor, size: int) -> str:
    """Codes (K, *grid) as pictures: a grid for each level and frame, sound as levels by time."""
    # (K, T) is one picture of all levels.
    grids = [codes] if codes.ndim == 2 else list(codes.flatten(0, -3)[:MAX_GRIDS])
    pictures = (media.code_grid(np.asarray(grid.cpu()), size) for grid in grids if grid.numel())
    return html.row(pictures)


def _words(item: Item) -> str:
    if isinstance(item, str):
        return f"text {item!r}"
    if isinstance(item, Image.Image):
        return f"picture of {item.width} x {item.height}"
    return repr(item)


def _sides(span: Span) -> str:
    """Sizes in codes, such as " 8 x 8"."""
    t, h, w = span.sizes
    sides = {"image": (h, w), "video": (t, h, w), "audio": (t,), "semantic": (t,)}.get(
        span.kind, ()
    )
    return f" {' x '.join(map(str, sides))}" if sides else ""


def _decibels(power: float, noise: float) -> str:
    return "infinite" if noise == 0 else f"{10 * math.log10(max(power, 1e-12) / noise):.2f} dB"
