"""One self-contained HTML page that shows what a run reached, and `results.json` beside it.

A page is built block by block and written once:

    report = Report("unimm demo", "Trained and measured in one go.")
    report.section("Accuracy")
    report.accuracies(results)
    report.gallery("Made from words", cards)
    report.curve("Language model", {"training": points}, y_label="nats per token")
    report.write("out/report.html")

It opens offline on any screen, light or dark: no font, no address but `data:`, and no script but,
on pages with sortable tables, one of our own that the policy allows by its hash. Every caption is
escaped. It stays under 10 MB, or `write` says so.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from unimm import __version__
from unimm.evaluation.accuracy import DirectionResult, Example, label
from unimm.evaluation.figures import Points, line_chart
from unimm.evaluation.report_parts import (
    SMALL_SIDE,
    STYLE,
    WIDE,
    Card,
    Cell,
    Part,
    Tile,
    duration,
    render_card,
    render_share_bar,
    render_table,
)
from unimm.signals import Item, Semantic, Turn
from unimm_tokenizers.storage import write_text

__all__ = ["Card", "Part", "Report", "Tile", "environment", "example_card", "write_results"]

MAX_BYTES = 10_000_000
# Nothing may be fetched and nothing may run; style attributes carry widths of bars.
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
# Sorts a table by the column whose head is clicked, the other way the second time; dashes last.
_SORTING = """
document.querySelectorAll("th button").forEach(b=>b.onclick=()=>{const h=b.parentNode,
i=h.cellIndex,t=h.closest("table").tBodies[0],d=h.dataset.down=h.dataset.down==="1"?"0":"1",
k=r=>{const s=r.cells[i].textContent.trim(),n=parseFloat(s);return isNaN(n)?s:n},
f=(x,y)=>typeof x===typeof y?(x<y?-1:x>y?1:0):typeof x==="number"?-1:1;
[...t.rows].sort((a,b)=>{const x=k(a),y=k(b),c=f(x,y);
return d==="1"&&typeof x===typeof y?-c:c}).forEach(r=>t.append(r))})
"""


class _Block(NamedTuple):
    kind: str  # blocks of one kind in a row share a grid
    html: str


class _Section:
    def __init__(self, title: str, text: str, anchor: str) -> None:
        self.title, self.text, self.anchor = title, text, anchor
        self.blocks: list[_Block] = []


class Report:
    """A page under construction.

    Args:
        title: the page's heading.
        lead: one or two sentences below it.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self.lead = lead
        self._tiles: list[Tile] = []
        self._sections: list[_Section] = []
        self._sorts = False

    def tiles(self, tiles: Iterable[Tile]) -> None:
        """Headline figures, at the top of the page."""
        self._tiles.extend(tiles)

    def section(self, title: str, text: str = "") -> None:
        """Begin a section: what is added from here on stands in it."""
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        self._sections.append(_Section(title, text, f"{anchor}-{len(self._sections) + 1}"))

    def accuracies(self, results: Sequence[DirectionResult], title: str = "") -> None:
        """The accuracy of every direction: bar, interval, prompts, goal."""
        rows = []
        for result in results:
            share, goal = result.share, result.direction.goal
            state = ""
            if result.reached is not None:
                word = "met" if result.reached else "missed"
                state = f'<span class="state {word}">{word}</span>'
            wanted = "&ndash;" if goal is None else f"{goal:.0%}"
            rows.append(
                f"<tr><td><b>{escape(_arrow(result.direction.name))}</b></td>"
                f'<td class="number"><b>{share.value:.1%}</b></td>'
                f'<td class="wide">{render_share_bar(share, goal)}</td>'
                f'<td class="number">{share.low:.1%} to {share.high:.1%}</td>'
                f'<td class="number">{share.total}</td><td class="number">{wanted}</td>'
                f"<td>{state}</td></tr>"
            )
        head = (
            '<th>direction</th><th class="number">accuracy</th><th class="wide">0 to 100%</th>'
            '<th class="number">95% interval</th><th class="number">prompts</th>'
            '<th class="number">goal</th><th></th>'
        )
        self._add(
            "table",
            f'{_heading(title)}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>'
            f"{''.join(rows)}</tbody></table></div>",
        )

    def direction(self, result: DirectionResult) -> None:
        """A direction's examples, its mistakes, and what was read for what."""
        direction = result.direction
        note = f"{result.share}. " + "; ".join(f"{n} {cause}" for cause, n in result.causes.items())
        if direction.guidance is not None:
            note += f"; guidance {direction.guidance:g}"
        cards = [example_card(example) for example in result.examples]
        self.gallery(_arrow(direction.name), cards, note)
        if result.mistakes:
            cards = _gallery([example_card(example) for example in result.mistakes])
            self._add("details", _details(f"The first {len(result.mistakes)} mistakes", cards))
        self._add("details", _details("What was read for what", _confusion(result.confusion)))

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        note: str = "",
        *,
        sortable: bool = False,
    ) -> None:
        """A table; shares and means show their intervals. A sortable one sorts at a click.

        Raises:
            ValueError: a row has more or fewer cells than there are columns.
        """
        self._sorts = self._sorts or sortable
        table = render_table(columns, rows, sortable=sortable)
        self._add("table", _heading(title) + _note(note) + table)

    def seconds(self, title: str, steps: Mapping[str, float]) -> None:
        """Wall times of a run's steps as bars, and their sum."""
        longest = max([*steps.values(), 1e-9])
        rows = "".join(
            f'<span>{escape(name)}</span><span class="number">{duration(value)}</span>'
            f'<div class="bar"><i class="fill" style="width:{value / longest:.2%}"></i></div>'
            for name, value in steps.items()
        )
        note = f"{duration(sum(steps.values()))} in all"
        self._add("table", f'{_heading(title)}{_note(note)}<div class="panel steps">{rows}</div>')

    def gallery(self, title: str, cards: Sequence[Card], note: str = "") -> None:
        """Cards side by side: pictures, players, films, words, with captions and verdicts."""
        self._add("gallery", _heading(title) + _note(note) + _gallery(cards))

    def curve(
        self,
        title: str,
        series: Mapping[str, Points],
        *,
        x_label: str = "step",
        y_label: str = "",
        log_x: bool = False,
        log_y: bool = False,
        markers: bool = False,
    ) -> None:
        """A chart of up to ten curves; charts in a row stand side by side.

        Raises:
            ValueError: there is nothing that can be drawn.
        """
        chart = line_chart(
            series, x_label=x_label, y_label=y_label, log_x=log_x, log_y=log_y, markers=markers
        )
        self.chart(title, chart, list(series))

    def chart(self, title: str, svg: str, names: Sequence[str]) -> None:
        """A chart that `line_chart` drew, and what its curves are called."""
        keys = "".join(
            f'<li><i style="background:var(--s{number})"></i>{escape(name)}</li>'
            for number, name in enumerate(names, start=1)
        )
        legend = f'<ul class="legend">{keys}</ul>' if len(names) > 1 else ""
        self._add("charts", f'<figure class="panel">{_heading(title)}{legend}{svg}</figure>')

    def facts(self, title: str, facts: Mapping[str, Any]) -> None:
        """Names and values: a configuration, versions, a machine; nested names get dots."""
        rows = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _flat(facts)
        )
        self._add("charts", f'<div class="panel">{_heading(title)}<dl>{rows}</dl></div>')

    def html(self) -> str:
        """The whole page."""
        links = "".join(
            f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in self._sections if s.title
        )
        nav = f"<nav><div>{links}</div></nav>" if links else ""
        lead = f'<p class="lead">{escape(self.lead)}</p>' if self.lead else ""
        tiles = "".join(_tile(tile) for tile in self._tiles)
        tiles = f'<div class="tiles">{tiles}</div>' if tiles else ""
        body = "".join(_section(section) for section in self._sections)
        policy, script = _POLICY, ""
        if self._sorts:
            digest = base64.b64encode(hashlib.sha256(_SORTING.encode()).digest()).decode()
            policy += f"; script-src 'sha256-{digest}'"
            script = f"<script>{_SORTING}</script>"
        return (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head><body>"
            f"<header><h1>{escape(self.title)}</h1>"
            f"{lead}{tiles}</header>"
            f"{nav}<main>{body}</main><footer>unimm {escape(__version__)}. Pictures over 96 pixels "
            "are shown as WebP of quality 90 and at most 512 pixels; figures are measured on the "
            f"signals themselves.</footer>{script}</body></html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page atomically.

        Raises:
            ValueError: it is larger than 10 MB.
        """
        page = self.html()
        size = len(page.encode())
        if size > MAX_BYTES:
            raise ValueError(
                f"{path}: the page has {size / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f} MB are "
                f"allowed; show fewer examples"
            )
        write_text(path, page)
        return Path(path)

    def _add(self, kind: str, html: str) -> None:
        if not self._sections:
            self.section("")
        self._sections[-1].blocks.append(_Block(kind, html))


def example_card(example: Example) -> Card:
    """A prompt, what was written for it, and the verdict."""
    parts = [Part("prompt", item) for item in example.prompt]
    parts.append(Part("written", "" if example.item is None else example.item))
    caption = label(example.expected)
    if not example.right:
        known = example.item is not None and example.answer is not None
        read = f"read as {label(example.answer)}" if known else example.cause
        caption = f"expected {caption}, {read}"
    return Card(parts, caption, example.right)


def environment() -> dict[str, str]:
    """Versions and machine, for a report's last section."""
    facts = {
        "unimm": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "CPU cores": str(os.cpu_count()),
        "threads of torch": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    return facts


def write_results(
    path: str | Path,
    *,
    accuracy: Mapping[str, float] | None = None,
    seconds: Mapping[str, float] | None = None,
    **details: Any,
) -> Path:
    """Write `results.json` atomically: the figures of a run, by direction and by step.

    Args:
        path: the file.
        accuracy: direction -> accuracy, 0 to 1; left out where None.
        seconds: step -> wall time; left out where None.
        details: whatever else the run reports, as plain JSON.

    Raises:
        ValueError: a number is not finite, or something is not plain JSON.
    """
    results: dict[str, Any] = {} if accuracy is None else {"accuracy": dict(accuracy)}
    results |= ({} if seconds is None else {"seconds": dict(seconds)}) | details
    try:
        text = json.dumps(results, indent=1, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: results are not plain JSON: {error}") from None
    write_text(path, text + "\n")
    return Path(path)


def _section(section: _Section) -> str:
    blocks = []
    for kind, members in groupby(section.blocks, key=lambda block: block.kind):
        inner = "".join(block.html for block in members)
        blocks.append(f'<div class="charts">{inner}</div>' if kind == "charts" else inner)
    title = f"<h2>{escape(section.title)}</h2>" if section.title else ""
    text = f'<p class="lead">{escape(section.text)}</p>' if section.text else ""
    return f'<section id="{section.anchor}">{title}{text}{"".join(blocks)}</section>'


def _tile(tile: Tile) -> str:
    state = "" if tile.good is None else (" met" if tile.good else " missed")
    note = f"<small>{escape(tile.note)}</small>" if tile.note else ""
    return (
        f'<div class="tile{state}"><span>{escape(tile.label)}</span><b>{escape(tile.value)}</b>'
        f"{note}</div>"
    )


def _gallery(cards: Sequence[Card]) -> str:
    """A grid whose cells are wide enough for what the cards hold."""
    widths = [sum(_part_width(part.item) for part in card.parts) for card in cards]
    width = min(max([150, *widths]), 840)
    inner = "".join(render_card(card) for card in cards)
    return f'<div class="gallery" style="--card-width:{width}px">{inner}</div>'


def _part_width(item: Item) -> int:
    """Pixels across that an item wants in a card."""
    if isinstance(item, str | Turn):
        return 110
    picture = item.image if isinstance(item, Semantic) else item
    if not isinstance(picture, Image.Image):
        return 210  # a player, a film's strip
    if picture.width > WIDE * picture.height:
        return 0  # stands below the others
    return 120 if max(picture.size) <= SMALL_SIDE else 210


def _confusion(confusion: Mapping[str, Mapping[str, int]]) -> str:
    """Expected (rows) against read (columns) as a shaded table."""
    columns = list(dict.fromkeys([*confusion, *sorted({c for r in confusion.values() for c in r})]))
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = []
    for expected, counts in confusion.items():
        total = sum(counts.values())
        cells = "".join(
            f'<td class="{"hit" if name == expected else "miss"}" '
            f'style="--share:{_shade(counts.get(name, 0) / total)}">{counts.get(name) or ""}</td>'
            for name in columns
        )
        rows.append(f"<tr><th>{escape(expected)}</th>{cells}</tr>")
    return (
        '<div class="scroll confusion"><table><thead><tr><th>expected</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _shade(share: float) -> str:
    """Opacity of a cell: nothing for none, and a single mistake can still be seen."""
    return f"{10 + 50 * share:.0f}%" if share else "0%"


def _details(summary: str, html: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def _arrow(name: str) -> str:
    return name.replace("->", " \u2192 ")


def _heading(title: str) -> str:
    return f"<h3>{escape(title)}</h3>" if title else ""


def _note(note: str) -> str:
    return f'<p class="note">{escape(note)}</p>' if note else ""


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{prefix}{name}", shown
