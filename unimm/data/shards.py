"""Tar shards by offset: which files, which samples, and whether they are whole.

A shard is a WebDataset tar: the members that share a key are one sample. The key is the name up
to the first dot of its last part, the extension is the rest ("0001.ids.npy": "0001", "ids.npy").
Members are found by walking the 512-byte headers (POSIX.1-2001, `ustar` and `pax`; GNU long names)
and read by offset, so that nothing is unpacked and a sample costs only what is asked of it.

A plain tar reader takes a shard cut at a member's end, or a block of zeros inside it, for the end
of the archive (measured on webdataset 1.0.2 and Python's tarfile). Here every header's checksum,
both final zero blocks, and the absence of anything after them are required.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from unimm.checkpoint import replacing

BLOCK = 512
MAX_MEMBER = 256 * 2**20  # bytes; a longer member is refused before it is read
MAX_OPEN = 64  # files kept open by all readers of a process
_BRACE = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WILD = re.compile(r"[*?\[]")
_HEAD = b"0000644\0" + b"0000000\0" * 2  # mode, owner, group
_TIME = b"\0" + b"00000000000\0"  # the end of the size, and the time
_TAIL = (b"0" + bytes(100) + b"ustar\x0000").ljust(356, b"\0")  # a regular file
_TAIL_SUM = sum(_TAIL)
_REGULAR, _LONG_NAME, _PAX, _PAX_GLOBAL, _FOLDER = (b"0", b"\0", b"7"), b"L", b"x", b"g", b"5"


def expand(pattern: str | Path | Iterable[str | Path]) -> list[Path]:
    """Shards that a pattern names, in order and each once.

    Args:
        pattern: a file, a folder (all its tars), a glob, braces ("raw-{000..099}.tar" or
            "{a,b}.tar"), several of them with commas between, or a list of such patterns.

    Raises:
        ValueError: shards are missing (all are listed), nothing matches, or the pattern is no
            local path.
    """
    patterns = (
        split_pattern(str(pattern))
        if isinstance(pattern, str | Path)
        else [part for entry in pattern for part in split_pattern(str(entry))]
    )
    found: dict[Path, None] = {}
    missing: list[str] = []
    for part in patterns:
        if part.startswith("pipe:") or "://" in part:
            raise ValueError(f"shards {part!r}: only local files are read; give a path")
        matches = _matches(part)
        found.update(dict.fromkeys(path for path in matches if path.is_file()))
        missing += [str(path) for path in matches if not path.is_file()]
        if not matches:
            missing.append(part)
    if missing:
        listed = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" * (len(missing) > 20))
        raise ValueError(f"{len(missing)} missing shards: {listed}")
    if not found:
        raise ValueError("no shards are named; give a file, a folder or a pattern")
    return list(found)


def split_pattern(pattern: str) -> list[str]:
    """Cut a pattern at the commas that stand outside braces."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(pattern):
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append(pattern[start:at])
            start = at + 1
    return [part.strip() for part in [*parts, pattern[start:]] if part.strip()]


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.exists():
        return [path]
    matches: list[Path] = []
    for name in braces(str(path)):
        if _WILD.search(name):
            matches += sorted(Path(match) for match in glob.glob(name))
        else:
            matches.append(Path(name))
    return matches


def braces(pattern: str) -> Iterator[str]:
    """The names that a pattern's braces spell out: "{a,b}" and "{000..099}".

    Raises:
        ValueError: a range counts down.
    """
    found = _BRACE.search(pattern)
    if found is None:
        yield pattern
        return
    numbers = _RANGE.fullmatch(found[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if last < first:
            raise ValueError(f"shards {pattern!r}: the range {found[0]} counts down")
        choices = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    else:
        choices = found[1].split(",")
    for choice in choices:
        yield from braces(pattern[: found.start()] + choice + pattern[found.end() :])


class Member(NamedTuple):
    """Where one file of a sample stands: offset and size in bytes."""

    offset: int
    size: int


class Stamp(NamedTuple):
    """Which file stood under a name: offsets are worth nothing in another one."""

    inode: int
    modified: int  # nanoseconds
    size: int


def _stamp(descriptor: int) -> Stamp:
    status = os.fstat(descriptor)
    return Stamp(status.st_ino, status.st_mtime_ns, status.st_size)


class OpenFiles:
    """Files kept open for reading by offset, the least recently used closed first.

    Reading is `os.pread`: no shared position, so processes that inherit a file may read at once.

    Args:
        limit: files kept open.
    """

    def __init__(self, limit: int = MAX_OPEN) -> None:
        self._limit = limit
        self._descriptors: OrderedDict[tuple[Path, Stamp], int] = OrderedDict()

    def read(self, path: Path, stamp: Stamp, member: Member) -> bytes:
        """The bytes of one member.

        Raises:
            ValueError: it is longer than 256 MiB, or the file is not the one with that stamp.
        """
        if member.size > MAX_MEMBER:
            raise ValueError(f"{member.size} bytes; at most {MAX_MEMBER} are read")
        descriptor = self._descriptors.get((path, stamp))
        if descriptor is None:
            descriptor = self._open(path, stamp)
        else:
            self._descriptors.move_to_end((path, stamp))
        data = os.pread(descriptor, member.size, member.offset)
        if len(data) != member.size:
            raise ValueError("the shard became shorter while it was read")
        return data

    def _open(self, path: Path, stamp: Stamp) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if _stamp(descriptor) != stamp:
            os.close(descriptor)
            raise ValueError("the shard was changed while it was read")
        self._descriptors[path, stamp] = descriptor
        if len(self._descriptors) > self._limit:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor


_OPEN = OpenFiles()


def read_member(shard: Path, stamp: Stamp, member: Member) -> bytes:
    """The bytes of one member of a shard that `ShardReader` has indexed; see `OpenFiles.read`."""
    return _OPEN.read(shard, stamp, member)


class Sample:
    """The files that share a key, read when asked for.

    Args:
        shard: the tar.
        stamp: which file that is.
        key: the sample's key.
        members: extension -> where it stands.
    """

    def __init__(self, shard: Path, stamp: Stamp, key: str, members: Mapping[str, Member]) -> None:
        self.shard = shard
        self.stamp = stamp
        self.key = key
        self.members = members

    def __contains__(self, extension: str) -> bool:
        return extension in self.members

    def __getitem__(self, extension: str) -> bytes:
        if extension not in self.members:
            raise ValueError(f"{self.where}: has no .{extension}; it has {self.listed}")
        try:
            return read_member(self.shard, self.stamp, self.members[extension])
        except ValueError as error:
            raise ValueError(f"{self.where}: .{extension}: {error}") from None

    @property
    def where(self) -> str:
        """Shard and key, for messages."""
        return f"{self.shard}: sample {self.key}"

    @property
    def listed(self) -> str:
        """The extensions, for messages."""
        return ", ".join(f".{extension}" for extension in self.members)


class ShardReader:
    """The samples of one tar, in order.

    Args:
        path: the tar; its headers are walked at once.

    Raises:
        ValueError: the tar is cut, has damaged blocks, links or unsafe names, a key comes twice, or
            there are no samples.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.samples: list[Sample] = []
        try:
            with self.path.open("rb") as file:
                self.stamp = _stamp(file.fileno())
                self._group(_walk(self.path, file, self.stamp.size))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such shard") from None
        if not self.samples:
            raise ValueError(f"{path}: the shard holds no samples")

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def _group(self, members: Iterable[tuple[str, Member]]) -> None:
        seen: set[str] = set()
        named = ((*self._key(name), member) for name, member in members)
        for key, files in itertools.groupby(named, key=lambda entry: entry[0]):
            if key in seen:
                raise ValueError(
                    f"{self.path}: sample {key} comes twice; its files are not together"
                )
            seen.add(key)
            found: dict[str, Member] = {}
            for _, extension, member in files:
                if extension in found:
                    raise ValueError(f"{self.path}: sample {key} has .{extension} twice")
                found[extension] = member
            self.samples.append(Sample(self.path, self.stamp, key, found))

    def _key(self, name: str) -> tuple[str, str]:
        clean = name.removeprefix("./")
        folder, slash, base = clean.rpartition("/")
        stem, dot, extension = base.partition(".")
        if clean.startswith("/") or ".." in clean.split("/"):
            raise ValueError(f"{self.path}: member {name!r} points outside the shard")
        if not stem or not dot or not extension:
            raise ValueError(f"{self.path}: member {name!r} is not named key.extension")
        return folder + slash + stem, extension.lower()


def _walk(path: Path, file: BinaryIO, length: int) -> Iterator[tuple[str, Member]]:
    """Names and places of the regular members of a tar of `length` bytes."""
    offset, name, size = 0, None, None
    after = "at its beginning"  # the last whole member, for messages
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise ValueError(f"{path}: cut at byte {length}, {after}: its end mark is missing")
        if not any(header):
            _require_end(path, file.read(), offset, after)
            return
        kind = header[156:157]
        _require_checksum(path, header, offset, after)
        count = size if size is not None and kind in _REGULAR else _number(header[124:136])
        start = offset + BLOCK
        offset = start + -(-count // BLOCK) * BLOCK
        if start + count > length:
            inside = (name or _ustar_name(header)) if kind in _REGULAR else "a long name"
            raise ValueError(f"{path}: cut at byte {length}, inside {inside}, {after}")
        if kind in (_LONG_NAME, _PAX):
            if count > 2**20:
                raise ValueError(f"{path}: a name of {count} bytes at byte {start}")
            data = file.read(count)
            if kind == _LONG_NAME:
                name = data.rstrip(b"\0").decode()
            else:
                fields = _pax(path, data, start)
                name = fields.get("path", name)
                size = int(fields["size"]) if "size" in fields else None
        elif kind in _REGULAR:
            whole = name or _ustar_name(header)
            yield whole, Member(start, count)
            name, size, after = None, None, f"after {whole}"
        elif kind not in (_FOLDER, _PAX_GLOBAL):
            linked = name or _ustar_name(header)
            raise ValueError(f"{path}: {linked!r} at byte {start} is a link or a device")


def _require_end(path: Path, rest: bytes, offset: int, after: str) -> None:
    if len(rest) < BLOCK:
        length = offset + BLOCK + len(rest)
        raise ValueError(f"{path}: cut at byte {length}, {after}: its end mark is missing")
    if rest.count(0) != len(rest):
        raise ValueError(f"{path}: a block of zeros at byte {offset}, {after}, data behind it")


def _require_checksum(path: Path, header: bytes, offset: int, after: str) -> None:
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    try:
        stated = _number(header[148:156])
    except ValueError:
        stated = -1
    if total != stated:
        raise ValueError(f"{path}: damaged tar header at byte {offset}, {after}")


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU base 256, for members of 8 GiB and more
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    return int(digits, 8) if digits else 0


def _ustar_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0].decode()
    prefix = header[345:500].split(b"\0")[0].decode() if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax(path: Path, data: bytes, start: int) -> dict[str, str]:
    """Records "length key=value\\n" of an extended header."""
    fields: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at]:
        digits, _, _ = data[at : at + 20].partition(b" ")
        if not digits.isdigit() or not len(digits) + 1 < int(digits) <= len(data) - at:
            raise ValueError(f"{path}: damaged extended header at byte {start}")
        record = data[at + len(digits) + 1 : at + int(digits) - 1]
        key, _, value = record.partition(b"=")
        fields[key.decode()] = value.decode()
        at += int(digits)
    return fields


class ShardWriter:
    """Write a tar under a temporary name; it takes its own name, whole, when the block ends well.

    Owner, mode and time of all members are fixed, so equal samples make equal bytes.

        with ShardWriter(path) as writer:
            writer.write("0001", {"txt": b"seven"})
        writer.sha256, writer.bytes, writer.checks

    Args:
        path: the shard's own name; an existing file is replaced.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.samples = 0
        self.bytes = 0
        self.sha256 = ""
        self.checks: list[str] = []

    def __enter__(self) -> Self:
        self._replacing = replacing(self.path)
        self._file = self._replacing.__enter__().open("wb")
        self._hash = hashlib.sha256()
        return self

    def write(self, key: str, files: Mapping[str, bytes]) -> None:
        """Append a sample: extension -> bytes.

        Raises:
            ValueError: the key holds a dot, or a name is too long for a tar.
        """
        if not key or "." in key.rpartition("/")[2] or not files:
            raise ValueError(f"{self.path}: sample key {key!r} must have no dot, and files")
        parts: list[bytes] = []
        for extension, data in files.items():
            parts += [_header(f"{key}.{extension}", len(data)), data, bytes(-len(data) % BLOCK)]
        self._append(b"".join(parts))
        self.samples += 1
        self.checks.append(sample_check(files))

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._append(bytes(-(self.bytes + 2 * BLOCK) % tarfile.RECORDSIZE + 2 * BLOCK))
            self.sha256 = self._hash.hexdigest()
        self._file.close()
        self._replacing.__exit__(*error)  # type: ignore[arg-type]


def _header(name: str, size: int) -> bytes:
    """A member's `ustar` header: time 0, mode 0644 and no owner, the same bytes everywhere."""
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11:  # the rare ones
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.USTAR_FORMAT)
    # tarfile takes ten times as long as this, a quarter of all time beside small codecs.
    begin = encoded.ljust(100, b"\0") + b"%s%011o%s" % (_HEAD, size, _TIME)
    total = sum(begin) + 8 * ord(" ") + _TAIL_SUM
    return b"%s%06o\0 %s" % (begin, total, _TAIL)


def sample_check(files: Mapping[str, bytes]) -> str:
    """CRC-32 (hex) of a sample's files: finds which sample of a damaged shard it is."""
    total = 0
    for extension, data in files.items():
        total = zlib.crc32(data, zlib.crc32(f"{extension} {len(data)} ".encode(), total))
    return f"{total:08x}"


def remove_abandoned(path: str | Path) -> None:
    """Remove the temporary files that killed writers of a shard left beside it.

    A temporary file carries the number of its process; one that still runs here is let be.
    """
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = left.name.removesuffix(".tmp").rpartition(".")[2]
        if not Path(f"/proc/{number}").exists():
            left.unlink(missing_ok=True)
