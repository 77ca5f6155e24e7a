"""What a file of the library holds, in plain text: `unimm inspect`.

Knows bundles and codecs (folder, shipped name, Hub id), text models, vocabularies, safetensors,
Hugging Face model folders, training checkpoints and run folders, raw shards, token shards, and many
shards at once. Nothing that is read can run code; of language models
and checkpoints, shapes are read and no weights.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from unimm.checkpoint import (
    CODECS_FOLDER,
    GENERATION_FILE,
    INDEX_FILE,
    LM_FOLDER,
    VOCABULARY_FILE,
    find_bundle,
    read_config,
    read_json,
)
from unimm.conversion.folder import HuggingFaceFolder
from unimm.data.manifest import Manifest, manifest_path
from unimm.data.shards import Sample, ShardReader, expand
from unimm.data.tokenize import IDS_FILE, META_FILE, NPY_HEADER
from unimm.model import ModelConfig
from unimm.text import FILES as TEXT_FILES
from unimm.text import TextModel, text_file
from unimm.training.launch import CHECKPOINTS, newest_checkpoint, read_checkpoint
from unimm.vocabulary import MODALITIES, Vocabulary
from unimm_tokenizers.codec import Codec
from unimm_tokenizers.storage import CONFIG_FILE, WEIGHTS_FILE

_HF_FACTS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "torch_dtype")
MAX_ROWS = 20  # shards listed one by one; the totals count all of them
_KINDS = (
    "a bundle, a codec, a text model, a vocabulary, weights (.safetensors), a Hugging Face model, "
    "a checkpoint (.ckpt), a run folder or shards (.tar)"
)


def inspect(path: str | Path) -> str:
    """Describe what stands at a path, or behind a bundle's name.

    Raises:
        ValueError: it is damaged, or nothing that the library writes; says what was looked for.
    """
    place = Path(path)
    if place.suffix == ".ckpt":
        return _checkpoint(place)
    if place.suffix == ".tar" and place.is_file():
        return _shard(place)
    if place.name == VOCABULARY_FILE and place.is_file():
        return "\n".join(_vocabulary(Vocabulary.load(place)))
    if place.name in TEXT_FILES and place.is_file():
        return f"{_text_model(place)}\n  {place}"
    if place.suffix == ".safetensors" and place.is_file():
        return "\n".join(_tensors(place))
    if place.is_file():
        raise ValueError(f"{place}: nothing that can be inspected; name {_KINDS}")
    if place.is_dir():
        return _folder(place)
    if place.suffix == ".tar":
        return _shards(expand(str(path)), str(path))
    return _folder(find_bundle(path))


def _folder(folder: Path) -> str:
    if (folder / VOCABULARY_FILE).exists():
        return _bundle(find_bundle(folder))
    if (folder / CONFIG_FILE).exists():
        foreign = "model_type" in read_json(folder / CONFIG_FILE)
        return _foreign(folder) if foreign else _codec_page(folder)
    if (folder / CHECKPOINTS).is_dir():
        newest = newest_checkpoint(folder)
        if newest is None:
            raise ValueError(f"{folder / CHECKPOINTS}: no whole checkpoint is there")
        return _checkpoint(newest)
    if any(folder.glob("*.tar")):
        return _shards(expand(folder), str(folder))
    raise ValueError(f"{folder}: holds nothing that can be inspected; name {_KINDS}")


# Bundles


def _bundle(folder: Path) -> str:
    vocabulary = Vocabulary.from_dict(read_json(folder / VOCABULARY_FILE))
    lines = [f"bundle {folder}", "", *_vocabulary(vocabulary)]
    lines += ["", _text_model(text_file(folder))]
    codecs = sorted((folder / CODECS_FOLDER).glob(f"*/{CONFIG_FILE}"))
    for config in codecs:
        lines += ["", *_codec(config.parent)]
    if (folder / LM_FOLDER).is_dir():
        lines += ["", *_language_model(folder / LM_FOLDER)]
    else:
        lines += ["", "language model: none"]
    if (folder / GENERATION_FILE).exists():
        defaults = read_json(folder / GENERATION_FILE)
        lines += ["", "sampling defaults:" + " none" * (not defaults)]
        lines += [f"  {modality}: {_settings(values)}" for modality, values in defaults.items()]
    lines += ["", _seal(folder)]
    return "\n".join(lines)


def _vocabulary(vocabulary: Vocabulary) -> list[str]:
    shared = "".join(f"; {m} writes with the blocks of {o}" for m, o in vocabulary.share.items())
    rows = [(block.name, f"{block.size:,}", block.start, block.end - 1) for block in vocabulary]
    return [
        f"vocabulary: {len(vocabulary):,} ids, {vocabulary.padded_size:,} with padding, "
        f"fingerprint {vocabulary.fingerprint[:12]}",
        f"  audio layout {vocabulary.audio_layout}{shared}",
        *_table(("block", "size", "first", "last"), rows),
    ]


def _text_model(path: Path) -> str:
    return f"text model: {TextModel.load(path).size:,} pieces, {_size(path)}"


def _foreign(folder: Path) -> str:
    found = HuggingFaceFolder(folder)
    facts = {name: found.config[name] for name in _HF_FACTS if name in found.config}
    title = f"Hugging Face model {folder}: {len(found.files):,} tensors"
    advice = "  `unimm convert` makes a bundle of the kinds that it knows"
    return "\n".join([title, *_pairs(facts), advice])


def _tensors(path: Path) -> list[str]:
    """Every tensor of a safetensors file, by its header alone, the first ones one by one."""
    with _opened(path) as file:
        names = sorted(file.keys())
        slices = [file.get_slice(name) for name in names]
        rows = [(n, s.get_dtype(), _by(s.get_shape())) for n, s in zip(names, slices, strict=True)]
    more = [f"  and {len(rows) - MAX_ROWS} more"] if len(rows) > MAX_ROWS else []
    table = _table(("tensor", "type", "shape"), rows[:MAX_ROWS])
    return [f"weights {path}: {_weights(path)}", *table, *more]


def _codec_page(folder: Path) -> str:
    return "\n".join([f"codec {folder}", "", *_codec(folder)])


def _codec(folder: Path) -> list[str]:
    codec = Codec.from_pretrained(folder)
    bits = codec.num_codebooks * math.log2(codec.codebook_size)
    units = math.prod(codec.downsample)
    facts: dict[str, object] = {
        "modalities": ", ".join(codec.modalities),
        "codes": f"{codec.num_codebooks} x {codec.codebook_size:,} (K x codebook size)",
        "channels": codec.num_channels,
        "downsample": _by(codec.downsample),
        "receptive field": _by(codec.receptive_field),
    }
    if codec.frame_rate is not None:
        facts["sample rate"] = f"{codec.sample_rate:,} Hz"
        facts["frame rate"] = f"{codec.frame_rate:g} Hz"
        facts["bit rate"] = f"{bits * codec.frame_rate / 1000:.3g} kbit/s"
    else:
        facts["rate"] = f"{bits / units:.3g} bits per pixel"
    weights = _weights(folder / WEIGHTS_FILE)
    facts["weights"] = f"{_parameters(codec.parameters()):,} parameters, {weights}"
    return [f"codec {codec.modality}: {codec.name}", *_pairs(facts)]


def _language_model(folder: Path) -> list[str]:
    config = read_config(ModelConfig, folder)
    heads = f"{config.num_heads} heads ({config.kv_heads} for keys and values)"
    weights = _weights(folder / WEIGHTS_FILE)
    return [
        f"language model: {weights.numbers:,} parameters, {weights}",
        f"  width {config.d_model}, {config.num_layers} layers, {heads} of {config.head_dim}, "
        f"feed-forward {config.feed_forward}, {config.vocab_size:,} ids, "
        f"{'tied' if config.tied_embeddings else 'untied'} head",
    ]


class _Weights(NamedTuple):
    """Numbers in a safetensors file, their types, and its size."""

    numbers: int
    types: tuple[str, ...]
    size: str

    def __str__(self) -> str:
        return f"{self.size} ({', '.join(self.types)})"


def _weights(path: Path) -> _Weights:
    """From the header of a safetensors file alone."""
    numbers, types = 0, set()
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            part = file.get_slice(name)
            numbers += math.prod(part.get_shape())
            types.add(part.get_dtype())
    return _Weights(numbers, tuple(sorted(types)), _size(path))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what is wrong with it in one line."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path}: the file is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from None


def _seal(folder: Path) -> str:
    """`find_bundle` has compared the files with the index already."""
    if not (folder / INDEX_FILE).exists():
        return f"not sealed: there is no {INDEX_FILE}"
    files = read_json(folder / INDEX_FILE)["sha256"]
    total = sum((folder / name).stat().st_size for name in files)
    return f"sealed: {len(files)} files, {_bytes(total)}, sha256 agrees with {INDEX_FILE}"


# Checkpoints


def _checkpoint(path: Path) -> str:
    stored = read_checkpoint(path)
    facts: dict[str, object] = {
        "step": stored.get("global_step", "unknown"),
        "size": _size(path),
        "lightning": stored.get("pytorch-lightning_version", "unknown"),
        "optimizers": len(stored.get("optimizer_states", ())),
    }
    for name, value in stored.items():
        if isinstance(value, dict) and "consumed" in value:
            facts["data"] = f"{value['consumed']:,} used ({name})"
    ours = stored.get("unimm")
    if ours is None:
        return "\n".join([f"checkpoint {path} (not written by `unimm fit`)", *_pairs(facts)])
    entry, weights = ours["entry"], ours["weights"]
    kind = f"codec {entry['codec']}" if entry["kind"] == "codec" else "language model"
    facts["parameters"] = f"{_parameters(weights.values()):,} (buffers included)"
    if "vocabulary" in entry:
        facts["vocabulary"] = entry["vocabulary"][:12]
    config = [f"  {_settings(entry['config'])}"]
    return "\n".join([f"checkpoint {path}: {kind}", *_pairs(facts), "config:", *config])


# Shards


class _ShardFacts(NamedTuple):
    """What a table of shards shows of each."""

    path: Path
    kind: str
    samples: int
    bytes: int
    tokens: Mapping[str, int]
    vocabulary: str


def _manifest(shard: Path) -> Manifest | None:
    """A shard's manifest, compared with its size; raw shards may have none."""
    if not manifest_path(shard).exists():
        return None
    manifest = Manifest.read(shard)
    manifest.check(shard)
    return manifest


def _shard(shard: Path) -> str:
    manifest, reader = _manifest(shard), ShardReader(shard)
    kind = "raw" if manifest is None else manifest.kind
    facts: dict[str, object] = {"samples": f"{len(reader):,}", "size": _size(shard)}
    if manifest is None:
        facts["manifest"] = "none"
    else:
        manifest.check_samples(shard, len(reader))
        facts["sha256"] = manifest.sha256[:12]
        if manifest.skipped:
            first = manifest.skipped[0]
            facts["left out"] = f"{len(manifest.skipped)}, first {first['key']}: {first['reason']}"
    if manifest is not None and manifest.recipe is not None:
        recipe = manifest.recipe
        facts["vocabulary"] = recipe.vocabulary[:12]
        facts["coders"] = ", ".join(f"{name} {value[:12]}" for name, value in recipe.coders.items())
        facts["source"] = recipe.source[:12]
        facts["templates"] = recipe.templates[:12]
        facts["version"] = recipe.version
        contents = [*_tokens(manifest.tokens, manifest.samples, _items(reader)), *_lengths(reader)]
    else:
        contents = _files(reader)
    title = {"raw": "raw shard", "tokens": "token shard"}[kind]
    return "\n".join([f"{title} {shard}", *_pairs(facts), *contents])


def _files(reader: ShardReader) -> list[str]:
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for sample in reader:
        for extension, member in sample.members.items():
            count[extension] += 1
            size[extension] += member.size
    rows = [(f".{name}", f"{count[name]:,}", _bytes(size[name])) for name in sorted(count)]
    keys = [sample.key for sample in reader.samples]
    ends = [f"  keys {keys[0]} to {keys[-1]}"] if keys else []
    return [*_table(("file", "samples", "size"), rows), *ends]


def _tokens(
    tokens: Mapping[str, int], documents: int, items: Mapping[str, int] | None = None
) -> list[str]:
    """Ids by modality; how many each item of a modality has, where the items were counted."""
    total = sum(tokens.values())
    rows: list[tuple[str, ...]] = []
    for name in MODALITIES:
        if name in tokens:
            row = (name, f"{tokens[name]:,}", f"{tokens[name] / total:.1%}")
            if items is not None:
                count = items.get(name, 0)
                # The marks around a document count as text, whether it holds words or not.
                each = f"{tokens[name] / count:,.1f}" if count else "none"
                row = (*row, f"{count:,}", each)
            rows.append(row)
    head = ("modality", "ids", "share") + (() if items is None else ("items", "ids each"))
    each = total / max(1, documents)
    return [
        *_table(head, rows),
        f"  {total:,} ids in {documents:,} documents, {each:,.1f} each",
    ]


def _meta(sample: Sample) -> dict[str, Any]:
    try:
        meta = json.loads(sample[META_FILE])
        return {"items": list(meta["items"]), "template": str(meta["template"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{sample.where}: {META_FILE} is damaged ({error})") from None


def _items(reader: ShardReader) -> Counter[str]:
    """Items of a token shard's documents by modality."""
    return Counter(str(item[0]) for sample in reader for item in _meta(sample)["items"])


def _lengths(reader: ShardReader) -> list[str]:
    """Ids in a document, by template."""
    lengths: dict[str, list[int]] = {}
    for sample in reader:
        if IDS_FILE not in sample:
            raise ValueError(f"{sample.where}: has only {sample.listed}; make the shard again")
        size = sample.members[IDS_FILE].size - NPY_HEADER
        lengths.setdefault(_meta(sample)["template"], []).append(size)
    width = 4 if b"<u4" in reader.samples[0][IDS_FILE][:NPY_HEADER] else 2  # bytes of an id
    rows = [
        (name, f"{len(sizes):,}", *(f"{n // width:,}" for n in _extremes(sizes)))
        for name, sizes in sorted(lengths.items())
    ]
    return _table(("template", "documents", "shortest", "median", "longest"), rows)


def _extremes(values: Sequence[int]) -> tuple[int, int, int]:
    ordered = sorted(values)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def _shards(paths: Sequence[Path], where: str) -> str:
    facts = [_facts(path) for path in paths]
    rows = [
        (f.path.name, f.kind, f"{f.samples:,}", _bytes(f.bytes), f"{sum(f.tokens.values()):,}")
        for f in facts[:MAX_ROWS]
    ]
    lines = [
        f"{len(facts)} shards of {where}: {sum(f.samples for f in facts):,} samples, "
        f"{_bytes(sum(f.bytes for f in facts))}",
        *_table(("shard", "kind", "samples", "size", "ids"), rows),
    ]
    if len(facts) > MAX_ROWS:
        lines.append(f"  and {len(facts) - MAX_ROWS} more")
    tokenized = [f for f in facts if f.vocabulary]
    if tokenized:
        total: Counter[str] = Counter()
        for f in tokenized:
            total.update(f.tokens)
        lines += _tokens(total, sum(f.samples for f in tokenized))
        made = sorted({f.vocabulary[:12] for f in tokenized})
        several = "" if len(made) == 1 else " (they can't be trained on together)"
        lines.append(f"  vocabulary {', '.join(made)}{several}")
    return "\n".join(lines)


def _facts(shard: Path) -> _ShardFacts:
    manifest = _manifest(shard)
    if manifest is None:
        samples = len(ShardReader(shard))
        return _ShardFacts(shard, "raw", samples, shard.stat().st_size, {}, "")
    made = manifest.recipe.vocabulary if manifest.recipe else ""
    return _ShardFacts(
        shard, manifest.kind, manifest.samples, manifest.bytes, manifest.tokens, made
    )


# Text


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Columns two spaces apart: the first to the left, the others to the right."""
    cells = [tuple(head), *(tuple(str(value) for value in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return [
        "  "
        + "  ".join(
            value.rjust(width) if column else value.ljust(width)
            for column, (value, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def _pairs(facts: Mapping[str, object]) -> list[str]:
    width = max(len(name) for name in facts)
    return [f"  {name.ljust(width)}  {value}" for name, value in facts.items()]


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in values.items())


def _plain(value: object) -> str:
    return _by(value) if isinstance(value, list | tuple) else str(value)


def _by(sizes: Iterable[object]) -> str:
    return " x ".join(str(size) for size in sizes) or "none"


def _parameters(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _size(path: Path) -> str:
    return _bytes(path.stat().st_size)


def _bytes(count: int) -> str:
    """A size in decimal units, three digits."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
