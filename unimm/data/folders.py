"""Pictures, sounds, films and captions -> raw shards.

A folder: files that differ only in their last extension are one sample ("cat.jpg", "cat.txt"). A
table (.jsonl or .csv): a row is a sample; a field whose value ends in a media extension names a
file beside the table; a field "txt", "text" or "caption" is the text; the fields that name no file
become the sample's .json. Every file is decoded once, so that nothing damaged gets in; samples
that are equal in every byte are kept once. The same source makes the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from unimm.data.manifest import Manifest, manifest_path
from unimm.data.media import EXTENSIONS, FILMS, PICTURES, SOUNDS, MediaError, decode
from unimm.data.shards import MAX_MEMBER, ShardWriter

MEDIA = (*PICTURES, *SOUNDS, *FILMS)
TEXT_FIELDS = ("txt", "text", "caption")
TABLES = (".jsonl", ".csv")
_log = logging.getLogger("unimm")


@dataclass
class RawSummary:
    """What was made.

    Args:
        shards: in order.
        samples: number of samples in them.
        duplicates: samples that were equal to an earlier one.
        ignored: files of a folder that nothing decodes.
        skipped: (name of the sample, reason) of those that could not be used.
    """

    shards: list[Path] = field(default_factory=list)
    samples: int = 0
    duplicates: int = 0
    ignored: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.samples:,} samples in {len(self.shards)} shards; {self.duplicates} duplicates, "
            f"{len(self.skipped)} unusable samples and {self.ignored} other files left out"
        )


class _Source(NamedTuple):
    """A sample to be: its name for messages, and of each extension the file or its bytes."""

    name: str
    members: Mapping[str, Path | bytes]


def make_raw_shards(
    source: str | Path, out: str | Path, *, samples_per_shard: int = 1000
) -> RawSummary:
    """Write a folder or a table as raw shards with manifests, named after it.

    Args:
        source: a folder (read with its subfolders), a .jsonl or a .csv file.
        out: folder of the shards. Shards of the same name are replaced, and those that an earlier,
            longer run left are removed.
        samples_per_shard: samples in every shard but the last.

    Raises:
        ValueError: the source is missing, of another kind, or holds nothing usable; or a row of
            the table is damaged.
    """
    source, out = Path(source), Path(out)
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be 1 or more, got {samples_per_shard}")
    summary = RawSummary()
    if source.is_dir():
        sources = _folder(source, out, summary)
    elif not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    elif source.suffix.lower() in TABLES:
        sources = _table(source)
    else:
        raise ValueError(f"{source}: give a folder, a .jsonl or a .csv file")
    _write(_usable(sources, summary), out, source.resolve().stem, samples_per_shard, summary)
    if not summary.samples:
        first = f"; the first: {': '.join(summary.skipped[0])}" if summary.skipped else ""
        raise ValueError(f"{source}: holds no usable sample{first}")
    for stale in sorted(out.glob(f"{source.resolve().stem}-??????.tar")):
        if stale not in summary.shards:
            manifest_path(stale).unlink(missing_ok=True)
            stale.unlink()
    return summary


def _folder(source: Path, out: Path, summary: RawSummary) -> Iterator[_Source]:
    """Files grouped by their path without the last extension, in the order of these paths."""
    groups: defaultdict[Path, dict[str, Path | bytes]] = defaultdict(dict)
    for path in sorted(source.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if not path.is_file() or hidden or path.is_relative_to(out) != source.is_relative_to(out):
            continue
        extension = path.suffix[1:].lower()
        if extension not in EXTENSIONS:
            summary.ignored += 1
            continue
        group = groups[path.relative_to(source).with_suffix("")]
        if extension in group:
            raise ValueError(f"{path}: a second .{extension} of this name; rename one of them")
        group[extension] = path
    for name in sorted(groups):
        yield _Source(str(source / name), groups[name])


def _table(source: Path) -> Iterator[_Source]:
    for number, row in _rows(source):
        where = f"{source}: row {number}"
        members: dict[str, Path | bytes] = {}
        plain: dict[str, Any] = {}
        for name, value in row.items():
            suffix = Path(value).suffix[1:].lower() if isinstance(value, str) else ""
            if suffix not in MEDIA:
                plain[name] = value
            elif suffix in members:
                members[f"{name}.{suffix}"] = source.parent / str(value)
            else:
                members[suffix] = source.parent / str(value)
        text = next((plain[name] for name in TEXT_FIELDS if plain.get(name)), None)
        if text is not None:
            members["txt"] = str(text).encode()
        if plain:
            members["json"] = json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()
        yield _Source(where, members)


def _rows(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows with their line numbers (jsonl) or numbers (csv), from 1."""
    try:
        with source.open(newline="", encoding="utf-8") as file:
            yield from (_csv if source.suffix.lower() == ".csv" else _jsonl)(source, file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{source}: not a table in UTF-8 ({error})") from None


def _csv(source: Path, file: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, row in enumerate(csv.DictReader(file), start=1):
        if None in row or None in row.values():
            raise ValueError(f"{source}: row {number} has not as many fields as the header")
        yield number, row


def _jsonl(source: Path, file: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
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


def _usable(sources: Iterable[_Source], summary: RawSummary) -> Iterator[dict[str, bytes]]:
    """Samples whose files can all be decoded, each once."""
    seen: set[bytes] = set()
    for name, members in sources:
        try:
            files = {ext: _read(ext, member, name) for ext, member in sorted(members.items())}
            if not files:
                raise MediaError(name, "names no file and no text")
        except MediaError as error:
            _log.warning("%s: left out: %s", error.where, error.reason)
            summary.skipped.append((error.where, error.reason))
            continue
        total = hashlib.sha256()
        for extension, data in files.items():
            total.update(f"{extension} {len(data)} ".encode() + data)
        if total.digest() in seen:
            summary.duplicates += 1
            continue
        seen.add(total.digest())
        yield files


def _read(extension: str, member: Path | bytes, where: str) -> bytes:
    if isinstance(member, Path):
        where = str(member)
        if not member.is_file():
            raise MediaError(where, "the file is missing")
        if member.stat().st_size > MAX_MEMBER:
            raise MediaError(where, f"longer than {MAX_MEMBER} bytes")
        member = member.read_bytes()
    if extension == "txt":
        member = member.rstrip(b"\r\n")  # the line end of a text file is not part of a caption
        if not member:
            raise MediaError(where, "the text is empty")
    decode(extension, member, where)
    return member


def _write(
    samples: Iterable[Mapping[str, bytes]], out: Path, name: str, size: int, summary: RawSummary
) -> None:
    """Fill shard after shard."""
    source = iter(samples)
    waiting = next(source, None)
    while waiting is not None:
        path = out / f"{name}-{len(summary.shards):06d}.tar"
        manifest_path(path).unlink(missing_ok=True)
        with ShardWriter(path) as writer:
            while waiting is not None and writer.samples < size:
                writer.write(f"{summary.samples:08d}", waiting)
                summary.samples += 1
                waiting = next(source, None)
        Manifest(
            shard=path.name, samples=writer.samples, bytes=writer.bytes, sha256=writer.sha256
        ).write(out)
        summary.shards.append(path)
