"""What a shard holds and what it was made from: `<shard>.json` beside the shard.

The manifest is written last and is the commit: a token shard without one does not exist. Raw
shards may have one. Two token shards are equal in meaning when their `recipe`s are equal: source
bytes, vocabulary, codec weights, templates and library version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from unimm.checkpoint import read_json, sha256, write_json
from unimm.data.shards import ShardReader, sample_check
from unimm.vocabulary import Vocabulary
from unimm_tokenizers.codec import config_from_dict

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the bytes of a token shard, as hex digests of sha256.

    source: bytes of the raw shard. vocabulary: its fingerprint. coders: text model and codecs by
    modality. templates: templates, draws per sample and seed. version: of the library.
    """

    source: str
    vocabulary: str
    coders: Mapping[str, str]
    templates: str
    version: str

    def difference(self, other: Recipe) -> str:
        """The first field in which two recipes differ, with both values; "" when they agree."""
        for name, mine in asdict(self).items():
            theirs = asdict(other)[name]
            if mine != theirs:
                if isinstance(mine, Mapping):
                    part = next(k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k))
                    name, mine, theirs = f"{name} {part}", mine.get(part), theirs.get(part)
                return f"{name} {_short(mine)} instead of {_short(theirs)}"
        return ""


def _short(value: object) -> str:
    return str(value)[:12]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One shard.

    Args:
        shard: file name of the tar.
        samples: number of samples in it.
        bytes: its size.
        sha256: hex digest of the tar.
        kind: "tokens" or "raw".
        tokens: ids per modality, markers counted to their item (token shards).
        recipe: what the shard was made from (token shards).
        skipped: source samples left out, as `{"key": ..., "reason": ...}`.
        checks: CRC-32 of every sample (raw shards), to find the damaged one by its key.
        origin: where a remote raw shard came from and what its server said of its version.
        device: what the codecs ran on; ids are the same on one kind of device only.
        format: version of this file's layout.
    """

    shard: str
    samples: int
    bytes: int
    sha256: str
    kind: Literal["tokens", "raw"] = "raw"
    tokens: Mapping[str, int] = field(default_factory=dict)
    recipe: Recipe | None = None
    skipped: tuple[Mapping[str, str], ...] = ()
    checks: tuple[str, ...] = ()
    origin: str = ""
    device: str = ""
    format: int = FORMAT

    def write(self, folder: str | Path) -> None:
        """Commit: write the manifest beside its shard in `folder`."""
        write_json(manifest_path(Path(folder) / self.shard), asdict(self))

    @classmethod
    def read(cls, shard: str | Path) -> Manifest:
        """The manifest of a shard.

        Raises:
            ValueError: it is missing or damaged.
        """
        path = manifest_path(shard)
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(
                f"{path}: not a shard manifest of format {FORMAT}; make the shard again"
            )
        if isinstance(data.get("recipe"), dict):
            data["recipe"] = config_from_dict(Recipe, data["recipe"], str(path))
        return config_from_dict(cls, data, str(path))

    def check(self, shard: str | Path, *, verify: bool = False) -> None:
        """Compare a shard with its manifest: size always, every byte where `verify` is set.

        Raises:
            ValueError: the shard is not the one that was committed.
        """
        shard = Path(shard)
        if not shard.is_file():
            raise ValueError(f"{shard}: the shard is missing, its manifest is there; make it again")
        size = shard.stat().st_size
        if size != self.bytes:
            where = self._damaged_sample(shard) if verify else shard
            raise ValueError(
                f"{where}: the shard has {size} bytes, its manifest says {self.bytes}; "
                f"make it again"
            )
        if verify and sha256(shard) != self.sha256:
            where = self._damaged_sample(shard)
            raise ValueError(f"{where}: its bytes differ from its manifest; make it again")

    def _damaged_sample(self, shard: Path) -> str:
        """The first sample whose check differs, or the shard where that can't be told.

        Raises:
            ValueError: the tar itself is damaged.
        """
        samples = ShardReader(shard).samples
        if len(samples) == len(self.checks):
            for sample, check in zip(samples, self.checks, strict=True):
                if sample_check({name: sample[name] for name in sample.members}) != check:
                    return sample.where
        return str(shard)

    def check_samples(self, shard: str | Path, samples: int) -> None:
        """Compare the number of samples that were found in a shard.

        Raises:
            ValueError: it is another one.
        """
        if samples != self.samples:
            raise ValueError(
                f"{shard}: holds {samples} samples, its manifest says {self.samples}; make it again"
            )


def manifest_path(shard: str | Path) -> Path:
    """`x.tar` -> `x.tar.json`; no other tool's file has this name."""
    shard = Path(shard)
    return shard.with_name(f"{shard.name}.json")


def read_token_manifest(shard: str | Path, vocabulary: Vocabulary) -> Manifest:
    """The manifest of a token shard that was made with `vocabulary`.

    Raises:
        ValueError: there is no manifest, it is a raw shard's, the shard is not the committed one,
            or it was made with another vocabulary.
    """
    if not manifest_path(shard).exists():
        raise ValueError(f"{shard}: no token shard: it has no manifest; tokenize it first")
    manifest = Manifest.read(shard)
    if manifest.kind != "tokens" or manifest.recipe is None:
        raise ValueError(f"{shard}: a raw shard, not a token shard; tokenize it first")
    vocabulary.require(manifest.recipe.vocabulary, str(shard))
    manifest.check(shard)
    return manifest


def digest(data: Any) -> str:
    """sha256 (hex) of plain data in a canonical form."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
