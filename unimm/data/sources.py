"""Where raw shards come from: local files, a few remote schemes, and commands when asked for.

Schemes are an allow-list, read through fsspec: https, s3, gs, hf. A remote shard is fetched whole
into a folder beside the output, and removed when it was read: offsets need a file, and one pass
over the network is cheaper than many. `pipe:` runs a command of the user's own, so it has to be
allowed by name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from unimm.data.manifest import manifest_path
from unimm.data.shards import braces, expand, split_pattern

SCHEMES = ("https", "s3", "gs", "hf")
PIPE = "pipe:"
ATTEMPTS = 3
INCOMING = ".incoming"
_CHUNK = 2**23
_PACKAGES = {"https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
# What object stores and web servers call the version of a file.
_VERSIONS = ("ETag", "etag", "LastModified", "last_modified", "updated", "created", "blob_id")


@dataclass(frozen=True)
class Source:
    """One raw shard.

    Args:
        url: a local path, an address, or "pipe:" and a command.
        name: the shard's file name.
    """

    url: str
    name: str

    def __str__(self) -> str:
        return self.url

    @classmethod
    def of(cls, source: Source | str | Path) -> Source:
        """A source, or the one at a local path."""
        return source if isinstance(source, Source) else cls(str(source), Path(source).name)

    @property
    def path(self) -> Path | None:
        """The file, where it is a local one."""
        return None if self._scheme or self.url.startswith(PIPE) else Path(self.url)

    @property
    def _scheme(self) -> str:
        return _scheme(self.url)

    def origin(self) -> str:
        """Address, size and version as its server says; "" for files, commands, silent servers."""
        if not self._scheme:
            return ""
        info = _file_system(self._scheme).info(self.url)
        version = [f"{name}={info[name]}" for name in _VERSIONS if info.get(name)]
        return " ".join([self.url, f"size={info.get('size')}", *version]) if version else ""

    def manifest(self) -> bytes | None:
        """What stands beside a remote shard as its manifest; None where nothing does."""
        try:
            return _file_system(self._scheme).cat_file(f"{self.url}.json")
        except FileNotFoundError:
            return None

    @contextmanager
    def local(self, folder: str | Path) -> Iterator[Path]:
        """The shard as a local file; a fetched one is gone when the block ends.

        Args:
            folder: where fetched shards stand for the while.

        Raises:
            ValueError: it can't be fetched whole.
        """
        path = self.path
        if path is not None:
            yield path
            return
        incoming = Path(folder) / INCOMING
        for left in incoming.glob("*"):  # of processes that were killed
            if not Path(f"/proc/{left.name}").exists():
                shutil.rmtree(left, ignore_errors=True)
        place = incoming / str(os.getpid()) / self.name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self._scheme:
                self._fetch(place)
            else:
                self._run(place)
            yield place
        finally:
            shutil.rmtree(place.parent, ignore_errors=True)
            with suppress(OSError):  # another process's shards may stand there
                incoming.rmdir()

    def _fetch(self, place: Path) -> None:
        """Shard and manifest, tried three times."""
        files = _file_system(self._scheme)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                size = files.info(self.url).get("size")
                with files.open(self.url, "rb") as remote, place.open("wb") as file:
                    shutil.copyfileobj(remote, file, _CHUNK)  # type: ignore[arg-type]
                if size is not None and place.stat().st_size != size:
                    raise OSError(f"{place.stat().st_size} of {size} bytes came")
                manifest = self.manifest()
                if manifest is not None:
                    manifest_path(place).write_bytes(manifest)
                return
            except FileNotFoundError:
                raise ValueError(f"{self.url}: no such shard") from None
            except OSError as error:
                if attempt == ATTEMPTS:
                    raise ValueError(f"{self.url}: can't be fetched: {error}") from None
                time.sleep(attempt)

    def _run(self, place: Path) -> None:
        command = self.url.removeprefix(PIPE)
        with place.open("wb") as file:
            code = subprocess.run(["/bin/sh", "-c", command], stdout=file, check=False).returncode
        if code:
            raise ValueError(f"{self.url}: the command failed with exit code {code}")


def find_sources(
    pattern: str | Path | Iterable[str | Path], *, allow_pipe: bool = False
) -> list[Source]:
    """Raw shards that a pattern names, in order and each once.

    Args:
        pattern: as `unimm.data.shards.expand`; also addresses such as
            "s3://bucket/raw-{000..099}.tar", with globs and folders where the store can list them,
            and, when allowed, "pipe:" and a command.
        allow_pipe: run commands.

    Raises:
        ValueError: shards are missing, a scheme is not allowed, or two shards share a name.
        ModuleNotFoundError: the package that reads a scheme is not installed.
    """
    found: dict[str, Source] = {}
    for part in _parts(pattern):
        if part.startswith(PIPE):
            made: Sequence[Source] = [_piped(part, allow_pipe=allow_pipe)]
        elif _scheme(part):
            made = _remote(part)
        else:
            made = [Source.of(path) for path in expand([part])]
        found.update({source.url: source for source in made})
    if not found:
        raise ValueError("no shards are named; give a file, a folder or a pattern")
    names: dict[str, str] = {}
    for source in found.values():
        if names.setdefault(source.name, source.url) != source.url:
            raise ValueError(
                f"several raw shards are named {source.name}: tokenize them into two folders"
            )
    return list(found.values())


def _parts(pattern: str | Path | Iterable[str | Path]) -> Iterator[str]:
    for entry in [pattern] if isinstance(pattern, str | Path) else pattern:
        # A command may hold commas and braces of its own.
        yield from [str(entry)] if str(entry).startswith(PIPE) else split_pattern(str(entry))


def _scheme(url: str) -> str:
    return url.partition("://")[0] if "://" in url else ""


def _file_system(scheme: str) -> Any:
    # The file system by its name, not by the address: fsspec would follow "::" to other schemes.
    if scheme not in SCHEMES:
        raise ValueError(
            f"scheme {scheme!r} is not allowed; shards are read from files and "
            f"{', '.join(f'{name}://' for name in SCHEMES)}"
        )
    try:
        return fsspec.filesystem(scheme)
    except ImportError:
        raise ModuleNotFoundError(
            f"{scheme}:// needs a package: pip install {_PACKAGES.get(scheme, scheme)}"
        ) from None


def _remote(pattern: str) -> list[Source]:
    scheme = _scheme(pattern)
    if "::" in pattern:
        raise ValueError(f"shards {pattern!r}: chained addresses ('::') are not allowed")
    files = _file_system(scheme)
    urls: list[str] = []
    for url in braces(pattern):
        if any(mark in url for mark in "*[") or url.endswith("/"):
            listed = files.glob(f"{url}*.tar" if url.endswith("/") else url)
            urls += sorted(files.unstrip_protocol(name) for name in listed)
            if not listed:
                raise ValueError(f"1 missing shards: {url}")
        else:
            urls.append(url)
    return [Source(url, _name(url)) for url in urls]


def _name(url: str) -> str:
    name = url.partition("?")[0].rpartition("/")[2]
    if not name.endswith(".tar") or name.startswith("."):
        raise ValueError(f"shards {url!r}: name a .tar, a folder (with a / at the end) or a glob")
    return name


def _piped(part: str, *, allow_pipe: bool) -> Source:
    if not allow_pipe:
        raise ValueError(f"shards {part!r}: commands are not run unless they are allowed")
    named = [word for word in part.split() if word.endswith(".tar")]
    if not named:
        raise ValueError(f"shards {part!r}: the command must name a .tar, which names the shard")
    return Source(part, named[-1].rpartition("/")[2])
