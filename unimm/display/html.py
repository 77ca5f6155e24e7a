"""Building blocks of the HTML that notebooks show; every text that comes from data is escaped.

Standard library only: the vocabulary uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# One colour for each modality, light enough for dark text on it; markers and sizes are grey.
COLOURS = {
    "special": "#d9d9d9",
    "digit": "#efefef",
    "text": "#fff3bf",
    "image": "#c3e6cb",
    "video": "#bde0f5",
    "audio": "#f5c6cb",
    "semantic": "#dccbf2",
}
_STYLE = "border-collapse:collapse;font-family:monospace;font-size:12px"
_CELL = "border:1px solid #ccc;padding:2px 8px;text-align:left;vertical-align:top"


def text(value: object) -> str:
    """A value as HTML text."""
    return escape(str(value))


def colour_of(name: str) -> str:
    """Colour of a modality or of a block such as "audio.3"."""
    return COLOURS.get(name.partition(".")[0], "#ffffff")


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], colours: Sequence[str] = ()
) -> str:
    """A table; `colours` give a row's background, where there are some."""
    lines = "".join(f'<th style="{_CELL}">{text(name)}</th>' for name in head)
    body = [f"<tr>{lines}</tr>" if head else ""]
    for number, row in enumerate(rows):
        colour = colours[number] if number < len(colours) else "transparent"
        cells = "".join(f'<td style="{_CELL}">{_cell(value)}</td>' for value in row)
        body.append(f'<tr style="background:{colour};color:#111">{cells}</tr>')
    return f'<table style="{_STYLE}">{"".join(body)}</table>'


class Raw(str):
    """HTML that is finished, and not escaped again."""


def _cell(value: object) -> str:
    return value if isinstance(value, Raw) else text(value)


def card(title: str, facts: Iterable[tuple[str, object]], below: str = "") -> str:
    """A heading and a table of facts, on one screen; `below` is HTML."""
    return f"<div><b>{text(title)}</b>{table((), facts)}{below}</div>"


def swatch(value: object, colour: str, title: str = "") -> str:
    """A few words on a colour."""
    return (
        f'<span title="{escape(title)}" style="background:{colour};color:#111;margin:1px;'
        f'padding:1px 4px;border-radius:3px;display:inline-block;font-family:monospace">'
        f"{_cell(value)}</span>"
    )


def row(parts: Iterable[str]) -> str:
    """Pieces of HTML side by side, wrapped where the line ends."""
    joined = "".join(f'<div style="margin:4px">{part}</div>' for part in parts)
    return f'<div style="display:flex;flex-wrap:wrap;align-items:flex-start">{joined}</div>'


def figure(content: str, caption: str) -> str:
    """Something with a line under it."""
    return (
        f'<figure style="margin:0">{content}<figcaption style="font-family:monospace;'
        f'font-size:11px">{text(caption)}</figcaption></figure>'
    )
