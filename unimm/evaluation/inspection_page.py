"""A page of what a shard holds, decoded: `unimm inspect SHARD --html PAGE`.

Of a raw shard: its files, and beside each what a tokenizer makes of it and back. Of a token shard:
its documents, decoded from their ids, and beside them the raw samples that they were made from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unimm.data.manifest import manifest_path, read_token_manifest
from unimm.data.media import FILMS, PICTURES, SOUNDS, MediaError, decode
from unimm.data.shards import Sample, ShardReader
from unimm.data.tokenize import IDS_FILE, META_FILE, ids_dtype, read_ids
from unimm.evaluation.report import Report
from unimm.evaluation.report_parts import Card, Part
from unimm.signals import Audio, Item, Semantic, Video
from unimm.tokenizer import UnifiedTokenizer, modality_of

SHOWN = 24
SHOWN_TEXT = 400  # characters of a text
_SHOWN_SUFFIXES = ("txt", *PICTURES, *SOUNDS, *FILMS)


def write_shard_page(
    shard: str | Path,
    page: str | Path,
    tokenizer: UnifiedTokenizer | None = None,
    *,
    raw: str | Path | None = None,
    samples: int = SHOWN,
) -> Path:
    """Write a page of samples, evenly spread over a shard.

    Args:
        shard: a raw shard or a token shard.
        page: the HTML file.
        tokenizer: codes and decodes; a token shard needs the one that it was made with.
        raw: the raw shard that a token shard was made from, to show beside it.
        samples: how many are shown, at most.

    Raises:
        ValueError: the shard is damaged, or of another vocabulary than the tokenizer; or a token
            shard comes without a tokenizer.
    """
    shard = Path(shard)
    reader = ShardReader(shard)
    step = max(1, len(reader) / max(1, samples))
    chosen = [reader.samples[int(i * step)] for i in range(min(samples, len(reader)))]
    out = Report(f"{shard.name}", f"{len(chosen)} of {len(reader):,} samples, evenly spread.")
    if IDS_FILE not in chosen[0]:
        out.section("Files", "As they are" + ", and from their codes." * (tokenizer is not None))
        out.gallery("", [_raw_card(sample, tokenizer) for sample in chosen])
    elif tokenizer is None:
        raise ValueError(f"{shard}: a token shard needs the tokenizer that it was made with")
    else:
        if manifest_path(shard).exists():
            read_token_manifest(shard, tokenizer.vocabulary)
        sources = {} if raw is None else {sample.key: sample for sample in ShardReader(raw)}
        out.section("Documents", "Decoded from their ids" + ", beside the raw files." * bool(raw))
        out.gallery("", [_document_card(sample, tokenizer, sources) for sample in chosen])
    return out.write(page)


def _raw_card(sample: Sample, tokenizer: UnifiedTokenizer | None) -> Card:
    parts: list[Part] = []
    notes = [sample.key]
    for extension, item in _files(sample, notes):
        parts.append(Part(f".{extension}", _shortened(item)))
        if tokenizer is None or isinstance(item, str):
            continue
        kind = modality_of(item)
        if kind in tokenizer.codecs:
            segments = tokenizer.encode_items([item])
            (made,) = tokenizer.decode_segments(segments)
            parts.append(Part(f"{segments[0].codes.numel():,} codes", _cropped(made, item)))
    return Card(parts, "; ".join(notes))


def _files(sample: Sample, notes: list[str]) -> Iterator[tuple[str, Item]]:
    """The text and media of a sample; what can't be decoded becomes a note."""
    for extension in sample.members:
        if extension.rpartition(".")[2] not in _SHOWN_SUFFIXES:
            continue
        try:
            yield extension, decode(extension, sample[extension], sample.where)
        except MediaError as error:
            notes.append(error.reason)


def _document_card(sample: Sample, tokenizer: UnifiedTokenizer, sources: dict[str, Sample]) -> Card:
    try:
        ids = read_ids(sample[IDS_FILE], ids_dtype(tokenizer.vocabulary))
        meta = json.loads(sample[META_FILE])
        template, source = str(meta["template"]), str(meta["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{sample.where}: damaged token sample ({error})") from None
    notes = [f"{sample.key}: {len(ids):,} ids, {template}"]
    parts = [
        Part("from ids", _shortened(item))
        for item in tokenizer.decode(torch.from_numpy(ids.astype(np.int64)))
    ]
    if source in sources:
        raw = [Part(f"raw .{name}", _shortened(i)) for name, i in _files(sources[source], notes)]
        parts = [*raw, *parts]
    return Card(parts, "; ".join(notes))


def _shortened(item: Item) -> Item:
    if isinstance(item, str) and len(item) > SHOWN_TEXT:
        return f"{item[:SHOWN_TEXT]}..."
    return item


def _cropped(made: Item, original: Item) -> Item:
    """Codes are whole blocks: cut what a codec wrote back to the original's size."""
    if isinstance(made, Semantic):
        made = made.image
    if isinstance(made, Image.Image) and isinstance(original, Image.Image):
        return made.crop((0, 0, *original.size))
    if isinstance(made, Video) and isinstance(original, Video):
        _, height, width, _ = original.frames.shape
        return Video(made.frames[:, :height, :width].contiguous(), made.fps)
    if isinstance(made, Audio) and isinstance(original, Audio):
        length = round(original.seconds * made.sample_rate)
        return Audio(made.samples[:, :length], made.sample_rate)
    return made
