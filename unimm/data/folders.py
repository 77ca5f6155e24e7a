"""Pictures, sounds, films and captions -> raw shards.

A folder: files that differ only in their last extension are one sample ("cat.jpg", "cat.txt"). A
table (.jsonl, .csv or .parquet): a row is a sample; a field whose value ends in a media extension
names a file beside the table, one that holds bytes is the file; a field "txt", "text" or "caption"
is the text; the other fields become the sample's .json. Every file is decoded once, so that nothing
damaged gets in; samples that are equal in every byte are kept once. The same source makes the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from unimm.data.manifest import Manifest, manifest_path
from unimm.data.media import EXTENSIONS, FILMS, PICTURES, SOUNDS, MediaError, decode
from unimm.data.shards import MAX_MEMBER, ShardWriter
from unimm.data.tables import TABLES, kind_of, read_rows

MEDIA = (*PICTURES, *SOUNDS, *FILMS)
TEXT_FIELDS = ("txt", "text", "caption")
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
        left = {
            "duplicates": self.duplicates,
            "unusable samples": len(self.skipped),
            "other files": self.ignored,
        }
        out = ", ".join(f"{count:,} {kind}" for kind, count in left.items() if count)
        made = f"{self.samples:,} samples in {len(self.shards)} shards"
        return f"{made}; left out: {out}" if out else made


class _Source(NamedTuple):
    """A sample to be: its name for messages, and of each extension the file or its bytes."""

    name: str
    members: Mapping[str, Path | bytes]


def make_raw_shards(
    source: str | Path, out: str | Path, *, samples_per_shard: int = 1000
) -> RawSummary:
    """Write a folder or a table as raw shards with manifests, named after it.

    Args:
        source: a folder (read with its subfolders), a .jsonl, a .csv or a .parquet file.
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
        raise ValueError(f"{source}: give a folder, a .jsonl, a .csv or a .parquet file")
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
    for number, row in read_rows(source):
        members: dict[str, Path | bytes] = {}
        plain: dict[str, Any] = {}
        for name, value in row.items():
            found = _medium(value, source.parent)
            if found is None:
                plain[name] = value
                continue
            extension, member = found
            members[extension if extension not in members else f"{name}.{extension}"] = member
        text = next((plain[name] for name in TEXT_FIELDS if plain.get(name)), None)
        if text is not None:
            members["txt"] = str(text).encode()
        if plain:
            written = json.dumps(plain, sort_keys=True, ensure_ascii=False, default=str)
            members["json"] = written.encode()
        yield _Source(f"{source}: row {number}", members)


def _medium(value: Any, folder: Path) -> tuple[str, Path | bytes] | None:
    """Extension and file or bytes of a cell that is a medium; None of any other."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, bytes):
        # Bytes of no known kind get an extension that nothing decodes: the row is named.
        return kind_of(value) or "bytes", value
    if not isinstance(value, str):
        return None
    suffix = Path(value).suffix[1:].lower()
    return (suffix, folder / value) if suffix in MEDIA else None


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
            shard=path.name,
            samples=writer.samples,
            bytes=writer.bytes,
            sha256=writer.sha256,
            checks=tuple(writer.checks),
        ).write(out)
        summary.shards.append(path)
