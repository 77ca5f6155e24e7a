"""Rows of a table: JSON lines, CSV and Parquet; and what kind of medium bytes in a cell are.

A cell of a Parquet table may hold a file itself: bytes, or the struct {"bytes": ..., "path": ...}
in which Hugging Face datasets keep pictures and sounds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

Row = Mapping[str, Any]
TABLES = (".jsonl", ".csv", ".parquet")
_BATCH_ROWS = 64
_BUFFER_BYTES = 2**20


def read_rows(source: Path) -> Iterator[tuple[int, Row]]:
    """Rows with their line numbers (jsonl) or numbers (csv, parquet), from 1.

    Raises:
        ValueError: the table is damaged; names the row where one is.
        ModuleNotFoundError: a Parquet table without pyarrow.
    """
    kind = source.suffix.lower()
    if kind == ".parquet":
        yield from _parquet(source)
        return
    try:
        with source.open(newline="", encoding="utf-8") as file:
            yield from (_csv if kind == ".csv" else _jsonl)(source, file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{source}: not a table in UTF-8 ({error})") from None


def _csv(source: Path, file: TextIO) -> Iterator[tuple[int, Row]]:
    for number, row in enumerate(csv.DictReader(file), start=1):
        if None in row or None in row.values():
            raise ValueError(f"{source}: row {number} has not as many fields as the header")
        yield number, row


def _jsonl(source: Path, file: TextIO) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}: row {number} is not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{source}: row {number} is no JSON object")
        yield number, row


def _parquet(source: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Parquet tables need pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source, buffer_size=_BUFFER_BYTES) as table:
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: damaged table after row {number} ({reason})") from None


def kind_of(data: bytes) -> str | None:
    """The extension of a medium by its first bytes; None where they are none that is known."""
    if data[:4] == b"RIFF":
        return {b"WAVE": "wav", b"WEBP": "webp"}.get(data[8:12])
    if data[4:8] == b"ftyp":
        return "mp4"
    for begin, extension in (
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"\xff\xd8\xff", "jpg"),
        (b"GIF8", "gif"),
        (b"fLaC", "flac"),
        (b"OggS", "ogg"),
        (b"ID3", "mp3"),
        (b"\x1aE\xdf\xa3", "webm"),
    ):
        if data.startswith(begin):
            return extension
    # An MPEG audio frame begins with eleven ones, and its layer is not 0 (ISO 11172-3, 2.4.2.3).
    frame = len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0 and data[1] & 6
    return "mp3" if frame else None
