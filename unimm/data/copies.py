"""Token shards on object storage, copied once to a folder of this machine.

Training reads documents in random order, by offset: from an object store that would be a request
each. So a shard is fetched whole, compared with its manifest, and kept; the manifest is renamed
into place last, so a copy without one does not exist, as with any shard.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from unimm.data.manifest import Manifest, manifest_path
from unimm.data.shards import expand, split_pattern
from unimm.data.sources import Source, find_sources

CACHE = "UNIMM_CACHE"
_log = logging.getLogger("unimm")


def cache_folder() -> Path:
    """Where copies are kept: `$UNIMM_CACHE`, or `~/.cache/unimm`."""
    return Path(os.environ.get(CACHE) or "~/.cache/unimm").expanduser()


def local_shards(pattern: str | Path | Iterable[str | Path]) -> list[Path]:
    """Token shards that a pattern names, as local files; those elsewhere are copied first.

    A copy is used again while the manifest of its source stays the same.

    Args:
        pattern: as `unimm.data.shards.expand`, and addresses as `unimm.data.sources.find_sources`
            knows them; addresses come after files.

    Raises:
        ValueError: shards are missing, uncommitted, or came with other bytes than their manifest
            says.
        OSError: the disk is full; what was copied before stays.
    """
    given = [pattern] if isinstance(pattern, str | Path) else pattern
    parts = [part for entry in given for part in split_pattern(str(entry))]
    addresses = [part for part in parts if "://" in part]
    files = [part for part in parts if "://" not in part]
    found = expand(files) if files or not addresses else []
    sources = [source for address in addresses for source in find_sources(address)]
    manifests = [source.manifest() for source in sources]
    missing = [str(s) for s, m in zip(sources, manifests, strict=True) if m is None]
    if missing:
        raise ValueError(
            f"{len(missing)} shards are missing or have no manifest: {', '.join(missing[:20])}"
        )
    return found + [_copy(s, m) for s, m in zip(sources, manifests, strict=True) if m]


def _copy(source: Source, wanted: bytes) -> Path:
    """The shard as a file of this machine; a copy that has the `wanted` manifest already stays."""
    address = source.url.removesuffix(source.name)
    folder = cache_folder() / "shards" / hashlib.sha256(address.encode()).hexdigest()[:16]
    place = folder / source.name
    committed = manifest_path(place)
    if committed.is_file() and place.is_file():
        if committed.read_bytes() == wanted:
            return place
        committed.unlink()
    with source.local(folder) as fetched:  # with its manifest
        Manifest.read(fetched).check(fetched, verify=True)
        os.replace(fetched, place)
        os.replace(manifest_path(fetched), committed)
    _log.info("%s: copied to %s", source, place)
    return place
