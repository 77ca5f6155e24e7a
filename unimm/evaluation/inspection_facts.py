"""What an inspection finds: sections of facts and tables, as plain data and as text.

Each fact is stored once, as data. People read thousands separators, units and short hashes, which
`Said` adds; programs read the data itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_ROWS = 20  # rows of a long table that people see; programs get them all
SHORT = 12  # characters of a hash that people see


@dataclass(frozen=True)
class Said:
    """A value that people read otherwise than programs do."""

    value: Any
    words: str


def digest(value: str) -> Said:
    """A hash, of which people read the beginning."""
    return Said(value, value[:SHORT])


def size(count: int) -> Said:
    """Bytes; people read decimal units, three digits."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return Said(count, f"{value:.3g} {unit}")


@dataclass(frozen=True)
class Table:
    """Rows of plain values or `Said`, one for each column; shown: how many people see, at most."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    shown: int | None = None

    def data(self) -> list[dict[str, Any]]:
        """A mapping for each row."""
        keys = [_key(column) for column in self.columns]
        return [dict(zip(keys, map(_value, row), strict=True)) for row in self.rows]

    def lines(self) -> list[str]:
        """Columns two spaces apart: the first to the left, the others to the right."""
        cells = [tuple(self.columns), *(tuple(map(words, row)) for row in self.rows[: self.shown])]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.columns))]
        lines = [
            "  ".join(
                value.rjust(width) if column else value.ljust(width)
                for column, (value, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ]
        left = len(self.rows[self.shown :]) if self.shown is not None else 0
        return lines + ([f"and {left:,} more"] if left else [])


@dataclass(frozen=True, kw_only=True)
class Section:
    """What is known of one thing; `str()` is for people, `data()` for programs.

    kind: "bundle", "codec", "raw shard", ... name: where it stands, or which one it is. facts: name
    -> plain value or `Said`. tables: name -> rows. parts: name -> what it consists of; None says
    that there is none. advice: a line for people alone.
    """

    kind: str
    name: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    parts: Mapping[str, Section | Sequence[Section] | None] = field(default_factory=dict)
    advice: str = ""

    def data(self) -> dict[str, Any]:
        """Everything but the advice, as JSON can hold it; blanks in names become underscores."""
        return {"kind": self.kind, **self._inner()}

    def _inner(self) -> dict[str, Any]:
        made: dict[str, Any] = {"name": self.name} if self.name else {}
        made |= {_key(name): _value(value) for name, value in self.facts.items()}
        made |= {_key(name): table.data() for name, table in self.tables.items()}
        for name, part in self.parts.items():
            if part is None or isinstance(part, Section):
                made[_key(name)] = None if part is None else part._inner()
            else:
                made[_key(name)] = [one._inner() for one in part]
        return made

    def __str__(self) -> str:
        width = max((len(name) for name in self.facts), default=0)
        body = [f"{name.ljust(width)}  {words(value)}" for name, value in self.facts.items()]
        for table in self.tables.values():
            body += table.lines()
        body += [self.advice] if self.advice else []
        pages = ["\n  ".join([f"{self.kind} {self.name}".strip(), *body])]
        for name, part in self.parts.items():
            if part is None:
                pages.append(f"{name}: none")
            else:
                pages += map(str, [part] if isinstance(part, Section) else part)
        return "\n\n".join(pages)


def words(value: object) -> str:
    """How people read a value: 1,024; 4 x 8 x 8; image, video; top_k 1, temperature 0.9."""
    match value:
        case Said():
            return value.words
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:g}"
        case Mapping():
            return _joined(", ", (f"{name} {words(part)}" for name, part in value.items()))
        case list() | tuple():
            numbers = all(isinstance(part, int | float) for part in value)
            return _joined(" x " if numbers else ", ", map(words, value))
        case _:
            return str(value)


def _joined(between: str, parts: Iterable[str]) -> str:
    return between.join(parts) or "none"


def _value(value: object) -> Any:
    """The data of a value, whatever stands inside it."""
    if isinstance(value, Said):
        return _value(value.value)
    if isinstance(value, Mapping):
        return {name: _value(part) for name, part in value.items()}
    return [_value(part) for part in value] if isinstance(value, list | tuple) else value


def _key(name: str) -> str:
    return name.replace(" ", "_").replace("-", "_")
