"""What a file of the library holds: `unimm inspect`.

Knows bundles and codecs (folder, shipped name, Hub id), text models, vocabularies, safetensors,
Hugging Face model folders, training checkpoints and run folders, raw shards, token shards, and many
shards at once. Nothing that is read can run code; of language models, shapes are read and no
weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
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
    shipped_bundles,
    weight_files,
)
from unimm.conversion.folder import HuggingFaceFolder
from unimm.data.shards import expand
from unimm.evaluation.inspection_facts import MAX_ROWS, Said, Section, Table, digest, size
from unimm.evaluation.inspection_shards import shard_section, shards_section
from unimm.model import ModelConfig
from unimm.text import FILES as TEXT_FILES
from unimm.text import TextModel, text_file
from unimm.training.launch import CHECKPOINTS, newest_checkpoint, read_checkpoint
from unimm.vocabulary import Vocabulary
from unimm_tokenizers.codec import Codec
from unimm_tokenizers.storage import CONFIG_FILE

_HF_FACTS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "torch_dtype")
_KINDS = (
    "a bundle, a codec, a text model, a vocabulary, weights (.safetensors), a Hugging Face model, "
    "a checkpoint (.ckpt), a run folder or shards (.tar)"
)


def inspect(path: str | Path) -> Section:
    """Describe what stands at a path, or behind a bundle's name or `bundle/modality`.

    Returns:
        A section: `str()` of it is a page of text, `data()` the same as plain data.

    Raises:
        ValueError: it is damaged, or nothing that the library writes; says what was looked for.
    """
    place = Path(path)
    if place.suffix == ".ckpt":
        return _checkpoint(place)
    if place.is_file():
        return _file(place)
    if place.is_dir():
        return _folder(place)
    if place.suffix == ".tar":
        return shards_section(expand(str(path)), str(path))
    if place.parent.as_posix() in shipped_bundles():
        return _folder(find_bundle(place.parent) / CODECS_FOLDER / place.name)
    return _folder(find_bundle(path))


def _file(path: Path) -> Section:
    if path.suffix == ".tar":
        return shard_section(path)
    if path.name == VOCABULARY_FILE:
        return _vocabulary(Vocabulary.load(path), str(path))
    if path.name in TEXT_FILES:
        return _text_model(path, str(path))
    if path.suffix == ".safetensors":
        return _tensors(path)
    raise ValueError(f"{path}: nothing that can be inspected; name {_KINDS}")


def _folder(folder: Path) -> Section:
    if (folder / VOCABULARY_FILE).exists() or (folder / CODECS_FOLDER).is_dir():
        return _bundle(find_bundle(folder))
    if (folder / CONFIG_FILE).exists():
        foreign = "model_type" in read_json(folder / CONFIG_FILE)
        return _foreign(folder) if foreign else _codec(folder, str(folder))
    if (folder / CHECKPOINTS).is_dir():
        newest = newest_checkpoint(folder)
        if newest is None:
            raise ValueError(f"{folder / CHECKPOINTS}: no whole checkpoint is there")
        return _checkpoint(newest)
    if any(folder.glob("*.tar")):
        return shards_section(expand(folder), str(folder))
    raise ValueError(f"{folder}: holds nothing that can be inspected; name {_KINDS}")


# Bundles


def _bundle(folder: Path) -> Section:
    """A bundle; one that ships codecs alone has neither vocabulary nor text model."""
    whole = (folder / VOCABULARY_FILE).exists()
    codecs = sorted((folder / CODECS_FOLDER).glob(f"*/{CONFIG_FILE}"))
    lm = folder / LM_FOLDER
    defaults = read_json(folder / GENERATION_FILE) if (folder / GENERATION_FILE).exists() else {}
    return Section(
        kind="bundle",
        name=str(folder),
        facts={"seal": _seal(folder)},
        parts={
            "vocabulary": _vocabulary(Vocabulary.load(folder / VOCABULARY_FILE)) if whole else None,
            "text model": _text_model(text_file(folder)) if whole else None,
            "codecs": [_codec(config.parent, config.parent.name) for config in codecs],
            "language model": _language_model(lm) if lm.is_dir() else None,
            "sampling defaults": Section(kind="sampling defaults", facts=defaults)
            if defaults
            else None,
        },
    )


def _vocabulary(vocabulary: Vocabulary, name: str = "") -> Section:
    facts: dict[str, object] = {
        "ids": len(vocabulary),
        "with padding": vocabulary.padded_size,
        "fingerprint": digest(vocabulary.fingerprint),
        "modalities": vocabulary.modalities,
        "audio layout": vocabulary.audio_layout,
    }
    if vocabulary.share:
        said = (f"{m} writes with the blocks of {o}" for m, o in vocabulary.share.items())
        facts["shared blocks"] = Said(vocabulary.share, "; ".join(said))
    rows = [(block.name, block.size, block.start, block.end - 1) for block in vocabulary]
    blocks = Table(("block", "size", "first", "last"), rows)
    return Section(kind="vocabulary", name=name, facts=facts, tables={"blocks": blocks})


def _text_model(path: Path, name: str = "") -> Section:
    facts = {"pieces": TextModel.load(path).size, "file": path.name, "size": _size(path)}
    return Section(kind="text model", name=name, facts=facts)


def _foreign(folder: Path) -> Section:
    found = HuggingFaceFolder(folder)
    facts = {name: found.config[name] for name in _HF_FACTS if name in found.config}
    advice = "`unimm convert` makes a bundle of the kinds that it knows"
    facts = {**facts, "tensors": len(found.files)}
    return Section(kind="Hugging Face model", name=str(folder), facts=facts, advice=advice)


def _tensors(path: Path) -> Section:
    """Every tensor of a safetensors file, by its header alone."""
    with _opened(path) as file:
        names = sorted(file.keys())
        slices = [file.get_slice(name) for name in names]
        rows = [
            (name, part.get_dtype(), Said(part.get_shape(), _by(part.get_shape())))
            for name, part in zip(names, slices, strict=True)
        ]
    weights = _weights([path])
    facts = {"numbers": weights.numbers, "weights": weights.said}
    tensors = Table(("tensor", "type", "shape"), rows, MAX_ROWS)
    return Section(kind="weights", name=str(path), facts=facts, tables={"tensors": tensors})


def _codec(folder: Path, name: str) -> Section:
    codec = Codec.from_pretrained(folder)
    bits = codec.num_codebooks * math.log2(codec.codebook_size)
    facts: dict[str, object] = {
        "class": codec.name,
        "modalities": codec.modalities,
        "codebooks": codec.num_codebooks,
        "codebook size": codec.codebook_size,
        "channels": codec.num_channels,
        "downsample": Said(codec.downsample, _by(codec.downsample)),
        "receptive field": Said(codec.receptive_field, _by(codec.receptive_field)),
    }
    if codec.frame_rate is not None:
        facts["sample rate"] = _unit(codec.sample_rate, "Hz")
        facts["frame rate"] = _unit(codec.frame_rate, "Hz")
        rate = bits * codec.frame_rate
        facts["bit rate"] = Said(rate, f"{rate / 1000:.3g} kbit/s")
    elif codec.modality == "semantic":  # as many codes as a picture has regions
        facts["bits per code"] = bits
    if "image" in codec.modalities:
        facts["bits per pixel"] = _digits(bits / math.prod(codec.downsample[-2:]))
    if "video" in codec.modalities:
        facts["bits per pixel of film"] = _digits(bits / math.prod(codec.downsample))
    facts["parameters"] = _parameters(codec.parameters())
    facts["weights"] = _weights(weight_files(folder)).said
    return Section(kind="codec", name=name, facts=facts)


def _language_model(folder: Path) -> Section:
    config = read_config(ModelConfig, folder)
    weights = _weights(weight_files(folder))
    facts = {
        "parameters": weights.numbers,
        "width": config.d_model,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "heads for keys and values": config.kv_heads,
        "head width": config.head_dim,
        "feed-forward": config.feed_forward,
        "ids": config.vocab_size,
        "tied head": config.tied_embeddings,
        "weights": weights.said,
    }
    return Section(kind="language model", facts=facts)


class _Weights(NamedTuple):
    """Numbers in safetensors files, their types, and the bytes of the files."""

    numbers: int
    types: tuple[str, ...]
    bytes: int

    @property
    def said(self) -> Said:
        data = {"types": self.types, "bytes": self.bytes}
        return Said(data, f"{size(self.bytes).words} ({', '.join(self.types)})")


def _weights(paths: Iterable[Path]) -> _Weights:
    """From the headers of safetensors files alone."""
    numbers, types, count = 0, set(), 0
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                part = file.get_slice(name)
                numbers += math.prod(part.get_shape())
                types.add(part.get_dtype())
        count += path.stat().st_size
    return _Weights(numbers, tuple(sorted(types)), count)


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


def _seal(folder: Path) -> Said:
    """`find_bundle` has compared the files with the index already."""
    if not (folder / INDEX_FILE).exists():
        return Said(None, f"none: there is no {INDEX_FILE}")
    files = read_json(folder / INDEX_FILE)["sha256"]
    total = sum((folder / name).stat().st_size for name in files)
    said = f"{len(files)} files, {size(total).words}, sha256 agrees with {INDEX_FILE}"
    return Said({"files": len(files), "bytes": total}, said)


# Checkpoints


def _checkpoint(path: Path) -> Section:
    stored = read_checkpoint(path)
    facts: dict[str, object] = {
        "holds": "a model of others: not written by `unimm fit`",
        "step": stored.get("global_step"),
        "size": _size(path),
        "lightning": stored.get("pytorch-lightning_version"),
        "optimizers": len(stored.get("optimizer_states", ())),
        "samples used": {
            name: value["consumed"]
            for name, value in stored.items()
            if isinstance(value, dict) and "consumed" in value
        },
    }
    ours = stored.get("unimm")
    if ours is None:
        return Section(kind="checkpoint", name=str(path), facts=facts)
    entry, weights = ours["entry"], ours["weights"]
    facts["holds"] = f"codec {entry['codec']}" if entry["kind"] == "codec" else "language model"
    facts["parameters and buffers"] = _parameters(weights.values())
    if "vocabulary" in entry:
        facts["vocabulary"] = digest(entry["vocabulary"])
    config = Section(kind="config", facts=entry["config"])
    return Section(kind="checkpoint", name=str(path), facts=facts, parts={"config": config})


def _by(sizes: Iterable[object]) -> str:
    return " x ".join(str(part) for part in sizes) or "none"


def _digits(value: float) -> Said:
    return Said(value, f"{value:.3g}")


def _unit(value: float | None, unit: str) -> Said:
    return Said(value, f"{value:,g} {unit}")


def _parameters(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _size(path: Path) -> Said:
    return size(path.stat().st_size)
