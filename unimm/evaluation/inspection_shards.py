"""What raw shards and token shards hold, for `unimm inspect`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unimm.data.manifest import Manifest, manifest_path
from unimm.data.shards import Sample, ShardReader
from unimm.data.tokenize import IDS_FILE, META_FILE, NPY_HEADER
from unimm.evaluation.inspection_facts import MAX_ROWS, SHORT, Said, Section, Table, digest, size
from unimm.vocabulary import MODALITIES


class _ShardFacts(NamedTuple):
    """What a table of shards shows of each."""

    path: Path
    kind: str
    samples: int
    bytes: int
    tokens: Mapping[str, int]
    vocabulary: str


def shard_section(shard: Path) -> Section:
    """One shard, every sample looked at.

    Raises:
        ValueError: it is damaged, or differs from its manifest; names shard and sample.
    """
    manifest, reader = _manifest(shard), ShardReader(shard)
    facts: dict[str, Any] = {"samples": len(reader), "size": size(shard.stat().st_size)}
    if manifest is None:
        facts["manifest"] = None
    else:
        manifest.check_samples(shard, len(reader))
        facts["sha256"] = digest(manifest.sha256)
        if manifest.skipped:
            first = manifest.skipped[0]
            said = f"{len(manifest.skipped)}, first {first['key']}: {first['reason']}"
            facts["left out"] = Said(manifest.skipped, said)
    if manifest is None or manifest.recipe is None:
        keys = [sample.key for sample in reader.samples]
        if keys:
            facts["keys"] = Said([keys[0], keys[-1]], f"{keys[0]} to {keys[-1]}")
        tables = {"files": _files(reader)}
        return Section(kind="raw shard", name=str(shard), facts=facts, tables=tables)
    recipe = manifest.recipe
    facts |= {
        "vocabulary": digest(recipe.vocabulary),
        "coders": {name: digest(value) for name, value in recipe.coders.items()},
        "source": digest(recipe.source),
        "templates": digest(recipe.templates),
        "version": recipe.version,
        **_totals(manifest.tokens, manifest.samples),
    }
    tables = {
        "modalities": _modalities(manifest.tokens, _items(reader)),
        "documents of templates": _lengths(reader),
    }
    return Section(kind="token shard", name=str(shard), facts=facts, tables=tables)


def shards_section(paths: Sequence[Path], where: str) -> Section:
    """Many shards, by their manifests where they have any.

    Raises:
        ValueError: one is damaged, or differs from its manifest.
    """
    found = [_facts(path) for path in paths]
    rows = [(f.path.name, f.kind, f.samples, size(f.bytes), sum(f.tokens.values())) for f in found]
    facts: dict[str, Any] = {
        "shards": len(found),
        "samples": sum(f.samples for f in found),
        "size": size(sum(f.bytes for f in found)),
    }
    tables = {"files": Table(("shard", "kind", "samples", "size", "ids"), rows, MAX_ROWS)}
    tokenized = [f for f in found if f.vocabulary]
    if tokenized:
        total: Counter[str] = Counter()
        for f in tokenized:
            total.update(f.tokens)
        made = sorted({f.vocabulary for f in tokenized})
        several = " (they can't be trained on together)" if len(made) > 1 else ""
        facts["vocabulary"] = Said(made, ", ".join(name[:SHORT] for name in made) + several)
        facts |= _totals(total, sum(f.samples for f in tokenized))
        tables["modalities"] = _modalities(total)
    return Section(kind="shards", name=where, facts=facts, tables=tables)


def _manifest(shard: Path) -> Manifest | None:
    """A shard's manifest, compared with its size; raw shards may have none."""
    if not manifest_path(shard).exists():
        return None
    manifest = Manifest.read(shard)
    manifest.check(shard)
    return manifest


def _facts(shard: Path) -> _ShardFacts:
    manifest = _manifest(shard)
    if manifest is None:
        samples = len(ShardReader(shard))
        return _ShardFacts(shard, "raw", samples, shard.stat().st_size, {}, "")
    made = manifest.recipe.vocabulary if manifest.recipe else ""
    return _ShardFacts(
        shard, manifest.kind, manifest.samples, manifest.bytes, manifest.tokens, made
    )


def _files(reader: ShardReader) -> Table:
    count: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for sample in reader:
        for extension, member in sample.members.items():
            count[extension] += 1
            total[extension] += member.size
    rows = [(f".{name}", count[name], size(total[name])) for name in sorted(count)]
    return Table(("file", "samples", "size"), rows)


def _totals(tokens: Mapping[str, int], documents: int) -> dict[str, Any]:
    total = sum(tokens.values())
    each = total / max(1, documents)
    return {"documents": documents, "ids": total, "ids each": Said(each, f"{each:,.1f}")}


def _modalities(tokens: Mapping[str, int], items: Mapping[str, int] | None = None) -> Table:
    """Ids by modality; how many each item of a modality has, where the items were counted."""
    total = sum(tokens.values())
    rows: list[tuple[Any, ...]] = []
    for name in MODALITIES:
        if name in tokens:
            share = tokens[name] / total
            row = (name, tokens[name], Said(share, f"{share:.1%}"))
            if items is not None:
                count = items.get(name, 0)
                # The marks around a document count as text, whether it holds words or not.
                each = tokens[name] / count if count else None
                row = (*row, count, None if each is None else Said(each, f"{each:,.1f}"))
            rows.append(row)
    columns = ("modality", "ids", "share") + (() if items is None else ("items", "ids each"))
    return Table(columns, rows)


def _meta(sample: Sample) -> dict[str, Any]:
    try:
        meta = json.loads(sample[META_FILE])
        return {"items": list(meta["items"]), "template": str(meta["template"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{sample.where}: {META_FILE} is damaged ({error})") from None


def _items(reader: ShardReader) -> Counter[str]:
    """Items of a token shard's documents by modality."""
    return Counter(str(item[0]) for sample in reader for item in _meta(sample)["items"])


def _lengths(reader: ShardReader) -> Table:
    """Ids in a document, by template."""
    lengths: dict[str, list[int]] = {}
    for sample in reader:
        if IDS_FILE not in sample:
            raise ValueError(f"{sample.where}: has only {sample.listed}; make the shard again")
        stored = sample.members[IDS_FILE].size - NPY_HEADER
        lengths.setdefault(_meta(sample)["template"], []).append(stored)
    width = 4 if b"<u4" in reader.samples[0][IDS_FILE][:NPY_HEADER] else 2  # bytes of an id
    rows = [
        (name, len(sizes), *(n // width for n in _extremes(sizes)))
        for name, sizes in sorted(lengths.items())
    ]
    return Table(("template", "documents", "shortest", "median", "longest"), rows)


def _extremes(values: Sequence[int]) -> tuple[int, int, int]:
    ordered = sorted(values)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]
