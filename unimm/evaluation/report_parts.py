"""The pieces of a report page: its style, and documents' items as HTML.

Every text is escaped here and nowhere else, every medium is embedded as a `data:` address. Pages
carry a content security policy that lets a browser load nothing and run nothing, so whatever a
caption holds stays a caption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple, TypeAlias

from PIL import Image

from unimm.evaluation.figures import (
    data_uri,
    film_bytes,
    film_strip,
    png_bytes,
    spectrogram,
    wav_bytes,
    webp_bytes,
)
from unimm.evaluation.statistics import Mean, Share
from unimm.signals import Audio, Item, Semantic, Turn, Video

SMALL_SIDE = 96  # pixels; smaller pictures are shown exactly, their pixels enlarged
LARGEST_SIDE = 512  # larger ones are shown reduced
WIDE = 4  # pictures that many times as wide as high take a card's whole width
Cell: TypeAlias = "str | int | float | bool | Share | Mean | None"


class Part(NamedTuple):
    """One item of a card under its own small label, such as "prompt" or "original"."""

    label: str
    item: Item


@dataclass(frozen=True)
class Card:
    """Items that belong together, a caption, and whether a judge found them right."""

    parts: Sequence[Part]
    caption: str = ""
    right: bool | None = None


class Tile(NamedTuple):
    """A headline figure: what it is, the figure, a remark, and whether it is as wished."""

    label: str
    value: str
    note: str = ""
    good: bool | None = None


def render_item(item: Item) -> str:
    """One item of a document as HTML."""
    if isinstance(item, str):
        return f'<p class="words">{escape(item) or "<i>empty</i>"}</p>'
    if isinstance(item, Turn):
        return f'<p class="turn">{item.role}</p>'
    if isinstance(item, Semantic):
        return render_image(item.image)
    if isinstance(item, Audio):
        return _audio(item)
    if isinstance(item, Video):
        return _video(item)
    return render_image(item)


def render_image(image: Image.Image) -> str:
    """A picture: small ones and strips lossless, others as WebP of quality 90."""
    alt = f"picture, {image.width} x {image.height} pixels"
    if max(image.size) <= SMALL_SIDE:
        picture = image if image.mode in ("1", "L", "P", "RGB", "RGBA") else image.convert("RGB")
        return _img(png_bytes(picture), "image/png", alt, "small")
    shown = image.convert("RGB")
    if shown.width > WIDE * shown.height:
        return _img(png_bytes(shown), "image/png", alt, "strip")
    shown.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return _img(webp_bytes(shown), "image/webp", alt, "large")


def render_card(card: Card) -> str:
    """A card, with its verdict as a sign, a colour and a word."""
    parts = "".join(
        f'<div class="part {_kind(part.item)}"><span class="label">{escape(part.label)}</span>'
        f"{render_item(part.item)}</div>"
        for part in card.parts
    )
    verdict, badge = "", ""
    if card.right is not None:
        verdict = "right" if card.right else "wrong"
        badge = f'<b class="badge">{"&#10003;" if card.right else "&#10007;"} {verdict}</b>'
        badge += " &middot; " if card.caption else ""
    footer = f"<figcaption>{badge}{escape(card.caption)}</figcaption>"
    return (
        f'<figure class="card {verdict}"><div class="parts">{parts}</div>'
        f"{footer if badge or card.caption else ''}</figure>"
    )


def render_table(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, sortable: bool = False
) -> str:
    """A table that scrolls sideways on a narrow screen; numbers stand right.

    The heads of a sortable one are buttons, for the page's script.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
    """
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(f"table: row {number} has {len(row)} cells for {len(columns)} columns")
    numeric = [
        bool(rows) and all(not isinstance(row[i], str | bool) for row in rows)
        for i in range(len(columns))
    ]
    marks = [' class="number"' if right else "" for right in numeric]
    names = [f"<button>{escape(n)}</button>" if sortable else escape(n) for n in columns]
    head = "".join(f"<th{mark}>{name}</th>" for name, mark in zip(names, marks, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{mark}>{cell(c)}</td>" for c, mark in zip(row, marks, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def cell(value: Cell) -> str:
    """A table cell's HTML: shares and means with their intervals, a dash for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "&ndash;"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Share):
        return f"{value.value:.1%} <small>{value.low:.1%} to {value.high:.1%}</small>"
    if isinstance(value, Mean):
        interval = f" <small>{value.low:.4g} to {value.high:.4g}</small>"
        return f"{value.value:.4g}{interval if value.low < value.high else ''}"
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """The same table for terminals and Markdown files."""

    def plain(value: Cell) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        if isinstance(value, Mean):
            return f"{value.value:.4g} ({value.low:.4g} to {value.high:.4g})"
        return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", "\\|")

    lines = [columns, ["---"] * len(columns), *([plain(value) for value in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def render_share_bar(share: Share, goal: float | None) -> str:
    """A bar from 0 to 100% with the interval on it and a tick at the goal."""
    mark = "" if goal is None else f'<i class="goal" style="left:{goal:.2%}"></i>'
    state = "" if goal is None else (" met" if share.value >= goal else " missed")
    return (
        f'<div class="bar{state}"><i class="fill" style="width:{share.value:.2%}"></i>'
        f'<i class="interval" style="left:{share.low:.2%};width:{share.high - share.low:.2%}"></i>'
        f"{mark}</div>"
    )


def duration(seconds: float) -> str:
    """Seconds in words: "48 ms", "7.2 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _kind(item: Item) -> str:
    if isinstance(item, Image.Image) and item.width > WIDE * item.height:
        return "wide"
    if isinstance(item, Image.Image) and max(item.size) > SMALL_SIDE:
        return "picture photo"
    names = {str: "text", Turn: "text", Audio: "sound", Video: "film"}
    return next((name for kind, name in names.items() if isinstance(item, kind)), "picture")


def _img(data: bytes, media_type: str, alt: str, style: str) -> str:
    return f'<img class="{style}" src="{data_uri(data, media_type)}" alt="{escape(alt)}">'


def _audio(audio: Audio) -> str:
    alt = f"spectrogram, {audio.seconds:.2f} s, 0 to {audio.sample_rate / 2000:g} kHz"
    picture = _img(png_bytes(spectrogram(audio)), "image/png", alt, "spectrogram")
    player = f'<audio controls src="{data_uri(wav_bytes(audio), "audio/wav")}"></audio>'
    return f'{picture}{player}<span class="fact">{audio.seconds:.2f} s</span>'


def _video(video: Video) -> str:
    count, height, width, _ = video.frames.shape
    alt = f"film, {count} frames of {width} x {height} pixels"
    style = "small" if max(height, width) <= SMALL_SIDE else "large"
    strip = film_strip(video)
    strip.thumbnail((2 * LARGEST_SIDE, LARGEST_SIDE))
    return (
        _img(film_bytes(video, lossless=style == "small"), "image/webp", alt, style)
        + _img(png_bytes(strip), "image/png", f"frames of the {alt}", "strip")
        + f'<span class="fact">{count} frames, {video.fps:g} per second</span>'
    )


# Colours and charts, for pages and for plots that stand alone in a notebook.
CHART_STYLE = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--ink:#1b1c1e;--soft:#5d6066;
--line:#e1e1dc;--grid:#e9e9e4;--fill:#2f6fd0;--fill-soft:#dfe9f8;--good:#17784a;--good-soft:#e0f2e8;
--bad:#b3372b;--bad-soft:#fae6e3;--s1:#2f6fd0;--s2:#c8591c;--s3:#188a6b;--s4:#8a4fc0;--s5:#b08400;
--s6:#c23a73;--s7:#4a7d1f;--s8:#0e8aa8;--s9:#8b5a3c;--s10:#6b6f76}
@media(prefers-color-scheme:dark){:root{--page:#141517;--card:#1d1f22;--ink:#ececea;--soft:#a2a5aa;
--line:#303338;--grid:#2a2d31;--fill:#6ca2f2;--fill-soft:#223148;--good:#5cc994;--good-soft:#17342a;
--bad:#f08a7d;--bad-soft:#412422;--s1:#6ca2f2;--s2:#ee8b52;--s3:#4cc2a0;--s4:#b78ae6;--s5:#d8b03c;
--s6:#ee7ba7;--s7:#9ccb6a;--s8:#5cc4dd;--s9:#c99a7a;--s10:#a9adb4}}
.chart{display:block;width:100%;height:auto}
.chart text{font:12px system-ui,sans-serif;fill:var(--soft)}
.chart .end{text-anchor:end}.chart .mid{text-anchor:middle}
.chart .grid{stroke:var(--grid);stroke-width:1}.chart .axis{stroke:var(--soft);stroke-width:1}
.chart .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.chart .dot{stroke:var(--card);stroke-width:2}
.line.s1{stroke:var(--s1)}.line.s2{stroke:var(--s2)}.line.s3{stroke:var(--s3)}
.line.s4{stroke:var(--s4)}.line.s5{stroke:var(--s5)}.line.s6{stroke:var(--s6)}
.line.s7{stroke:var(--s7)}.line.s8{stroke:var(--s8)}.line.s9{stroke:var(--s9)}
.line.s10{stroke:var(--s10)}
.dot.s1{fill:var(--s1)}.dot.s2{fill:var(--s2)}.dot.s3{fill:var(--s3)}
.dot.s4{fill:var(--s4)}.dot.s5{fill:var(--s5)}.dot.s6{fill:var(--s6)}
.dot.s7{fill:var(--s7)}.dot.s8{fill:var(--s8)}.dot.s9{fill:var(--s9)}.dot.s10{fill:var(--s10)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.2rem 0 .4rem;font-size:.83rem;
color:var(--soft);list-style:none;padding:0}
.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;vertical-align:middle;
margin-right:.4rem}
"""

STYLE = (
    CHART_STYLE
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth;scroll-padding-top:3.5rem}
body{margin:0;background:var(--page);color:var(--ink);line-height:1.5;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header,main,footer{max-width:1120px;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.75rem}
h1{font-size:clamp(1.7rem,4.5vw,2.5rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 .4rem}
h2{font-size:1.35rem;letter-spacing:-.01em;margin:0 0 .3rem}
h3{font-size:1rem;margin:1.6rem 0 .6rem}
.lead,.note{color:var(--soft);margin:0 0 1rem;max-width:46rem}
.note{font-size:.9rem}
nav{position:sticky;top:0;z-index:2;background:var(--page);border-bottom:1px solid var(--line);
margin-top:1.25rem}
nav div{max-width:1120px;margin:0 auto;padding:.55rem 1.25rem;display:flex;gap:1.25rem;
overflow-x:auto;white-space:nowrap;font-size:.9rem}
nav a{color:var(--soft);text-decoration:none}
nav a:hover,nav a:focus{color:var(--fill)}
section{padding:2.25rem 0 .5rem}
section+section{border-top:1px solid var(--line);margin-top:2rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.75rem;
margin:1.4rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:.85rem 1rem}
.tile b{display:block;font-size:1.6rem;line-height:1.25;font-weight:650;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.tile span,.tile small{display:block;color:var(--soft);font-size:.83rem}
.tile.met b{color:var(--good)}.tile.missed b{color:var(--bad)}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:12px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.93rem}
th,td{padding:.5rem .75rem;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
tbody tr:last-child td{border-bottom:0}
th{color:var(--soft);font-weight:550;font-size:.83rem;white-space:normal;vertical-align:bottom}
.number{text-align:right}
th button{all:unset;cursor:pointer}th button:hover,th button:focus-visible{color:var(--fill)}
th button::after{content:" \\2195";opacity:.5}
td small{display:block;color:var(--soft);font-size:.78rem;line-height:1.25}
td.wide{width:45%;min-width:9rem}
.bar{position:relative;height:14px;border-radius:4px;background:var(--grid)}
.bar i{position:absolute;top:0;bottom:0}
.bar .fill{left:0;border-radius:4px;background:var(--fill)}
.bar.missed .fill{background:var(--bad)}
.bar .interval{top:5px;bottom:5px;background:var(--ink);border-radius:2px;min-width:2px}
.bar .goal{width:2px;margin-left:-1px;top:-4px;bottom:-4px;background:var(--ink);
box-shadow:0 0 0 1.5px var(--card)}
.state{font-weight:600}.state.met{color:var(--good)}.state.missed{color:var(--bad)}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--card-width)),1fr));
gap:.75rem}
.card{margin:0;display:flex;flex-direction:column;background:var(--card);overflow:hidden;
border:1px solid var(--line);border-radius:12px}
.parts{display:flex;flex-wrap:wrap;gap:.75rem;padding:.75rem;flex:1;align-content:flex-start}
.part{display:flex;flex-direction:column;gap:.35rem;flex:1 1 86px;min-width:0}
.part.photo{flex-basis:140px}.part.sound,.part.film{flex-basis:180px}.part.wide{flex-basis:100%}
.label,.fact{color:var(--soft);font-size:.76rem}
.words{margin:0;font-size:1.2rem;font-weight:600;line-height:1.3;overflow-wrap:anywhere}
.turn{margin:0;color:var(--soft);font-style:italic}
img{display:block;max-width:100%;border-radius:6px}
img.small{image-rendering:pixelated;width:112px;height:auto}
img.large{width:100%;height:auto}
img.strip{image-rendering:pixelated;width:100%;height:auto;border-radius:3px}
img.spectrogram{width:100%;height:64px;image-rendering:pixelated}
audio{width:100%;height:34px}
figcaption{padding:.45rem .75rem;font-size:.85rem;color:var(--soft);
border-top:1px solid var(--line);overflow-wrap:anywhere}
.right figcaption{background:var(--good-soft);color:var(--good)}
.wrong figcaption{background:var(--bad-soft);color:var(--bad)}
.badge{font-weight:650}
details{margin:.9rem 0}
summary{cursor:pointer;color:var(--soft);font-size:.92rem;margin-bottom:.7rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:.75rem}
.panel{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:.9rem 1rem;
margin:0;min-width:0}
.panel h3{margin:0 0 .3rem}
.steps{display:grid;grid-template-columns:max-content 1fr max-content;gap:.5rem .9rem;
grid-auto-flow:row dense;align-items:center;font-size:.93rem;font-variant-numeric:tabular-nums}
.steps .bar{grid-column:2}.steps .number{grid-column:3}.steps .bar .fill{min-width:2px}
.confusion td{text-align:center;padding:.3rem .5rem}
.confusion td.hit{background:color-mix(in srgb,var(--fill) var(--share),transparent)}
.confusion td.miss{background:color-mix(in srgb,var(--bad) var(--share),transparent)}
dl{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;gap:.35rem 1.25rem;margin:0;
font-size:.92rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
footer{color:var(--soft);font-size:.85rem;padding-top:2.5rem;padding-bottom:3rem}
@media(max-width:560px){header{padding-top:1.75rem}th,td{padding:.45rem .6rem}
.chart text{font-size:16px}.tile b{font-size:1.35rem}.tiles{grid-template-columns:1fr 1fr}
.gallery{grid-template-columns:repeat(auto-fill,minmax(min(100%,.62*var(--card-width)),1fr))}
.steps{grid-template-columns:1fr max-content}.steps .number{grid-column:2}
.steps .bar{grid-column:1/-1;height:10px;margin-bottom:.4rem}.wide{display:none}
dl{grid-template-columns:1fr}dd{margin-bottom:.5rem}}
@media print{nav,audio{display:none}.card,.panel{break-inside:avoid}}
"""
)
