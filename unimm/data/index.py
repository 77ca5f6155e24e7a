"""Where every document of many token shards stands, found once and kept.

Walking the headers of a million documents takes a minute; reading what was found takes a moment.
What is kept is named by the digest of what it was made from, and is made again where a shard's
file is another one (inode, time or size).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unimm.checkpoint import replacing
from unimm.data.manifest import Manifest, digest, read_token_manifest
from unimm.data.shards import ShardReader, Stamp
from unimm.data.tokenize import IDS_FILE, META_FILE
from unimm.vocabulary import Vocabulary

FORMAT = 1
Arrays = dict[str, NDArray[np.int64]]


class ShardIndex(NamedTuple):
    """Documents of shards.

    stamps: which file each shard was. shard: int64 (N,), the shard of each document. places: int64
    (N, 4), offset and size of its ids, then of its meta. digest: names shards and their bytes.
    """

    stamps: list[Stamp]
    shard: NDArray[np.int64]
    places: NDArray[np.int64]
    digest: str


def index_shards(
    paths: Sequence[Path],
    vocabulary: Vocabulary,
    *,
    verify: bool = False,
    folder: Path | None = None,
) -> ShardIndex:
    """Find every document; kept in `folder` where one is given.

    Args:
        paths: token shards.
        vocabulary: the one that they must have been made with.
        verify: compare every byte of the shards with their manifests.
        folder: where what was found is kept; None: nowhere.

    Raises:
        ValueError: a shard is no committed token shard, was changed, or was made with another
            vocabulary.
    """
    manifests = [read_token_manifest(path, vocabulary) for path in paths]
    if verify:
        for path, manifest in zip(paths, manifests, strict=True):
            manifest.check(path, verify=True)
    name = digest([FORMAT, *([str(p), m.sha256] for p, m in zip(paths, manifests, strict=True))])
    now = np.array([_stamp(path) for path in paths], dtype=np.int64)
    found = kept(
        folder,
        f"index-{name[:24]}",
        lambda: _walk(paths, manifests),
        valid=lambda arrays: np.array_equal(arrays["stamps"], now),
    )
    stamps = [Stamp(*row) for row in found["stamps"].tolist()]
    shard = np.repeat(np.arange(len(paths)), found["counts"])
    return ShardIndex(stamps, shard, found["places"], name)


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return Stamp(status.st_ino, status.st_mtime_ns, status.st_size)


def _walk(paths: Sequence[Path], manifests: Sequence[Manifest]) -> Arrays:
    stamps, places, counts = [], [], []
    for path, manifest in zip(paths, manifests, strict=True):
        reader = ShardReader(path)
        manifest.check_samples(path, len(reader))
        stamps.append(reader.stamp)
        counts.append(len(reader))
        for sample in reader:
            if IDS_FILE not in sample or META_FILE not in sample:
                raise ValueError(f"{sample.where}: has only {sample.listed}; make the shard again")
            places.append((*sample.members[IDS_FILE], *sample.members[META_FILE]))
    return {
        "stamps": np.array(stamps, dtype=np.int64),
        "counts": np.array(counts, dtype=np.int64),
        "places": np.array(places, dtype=np.int64).reshape(-1, 4),
    }


def kept(
    folder: Path | None,
    name: str,
    make: Callable[[], Arrays],
    valid: Callable[[Mapping[str, NDArray[np.int64]]], bool] = lambda _: True,
) -> Arrays:
    """What `make` returns, read from `<folder>/<name>.npz` where that is there and valid.

    A file that cannot be read, such as one of a full disk, is made again.
    """
    if folder is None:
        return make()
    path = folder / f"{name}.npz"
    if path.is_file():
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {key: stored[key] for key in stored.files}
        except (OSError, EOFError, ValueError, zipfile.BadZipFile):
            arrays = {}
        if arrays and valid(arrays):
            return arrays
    made = make()
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **made)  # pyright: ignore[reportArgumentType]
    return made
