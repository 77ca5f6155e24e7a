"""Samples of a benchmark: pictures, sounds and films that are read when they are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from unimm.data.media import FILMS, PICTURES, SOUNDS, decode
from unimm.data.shards import Sample as ShardSample
from unimm.data.shards import ShardReader, expand
from unimm.signals import Item
from unimm.tokenizer import modality_of


class Sample(NamedTuple):
    """A signal that is read when it is needed; `load` raises ValueError where it is damaged."""

    key: str
    modality: str
    load: Callable[[], Item]


Data: TypeAlias = "str | Path | Iterable[Sample | str | Path]"


def make_sample(key: str, item: Item) -> Sample:
    """A sample of an item that is at hand."""
    return Sample(key, modality_of(item), lambda: item)


def gather(data: Data) -> list[Sample]:
    """Samples of one place, or of several: shards, folders, and samples that are at hand.

    Raises:
        ValueError: nothing is found.
    """
    parts = [data] if isinstance(data, str | Path) else list(data)
    samples: list[Sample] = []
    for part in parts:
        samples += [part] if isinstance(part, Sample) else read_samples(part)
    return samples


def read_samples(data: str | Path) -> list[Sample]:
    """Pictures, sounds and films of shards, or of a folder without shards, in order.

    Every media file of a shard's sample is a sample of its own, named "key.extension".

    Raises:
        ValueError: nothing is found, or a shard is damaged.
    """
    folder = Path(data)
    samples = []
    if folder.is_dir() and not any(folder.glob("*.tar")):
        for path in sorted(folder.rglob("*")):
            modality = _modality(path.suffix[1:].lower())
            if modality is not None and path.is_file():
                key = path.relative_to(folder).as_posix()
                samples.append(Sample(key, modality, _file_loader(path)))
    else:
        for shard in expand(data):
            for sample in ShardReader(shard):
                for extension in sample.members:
                    modality = _modality(extension.rpartition(".")[2])
                    if modality is not None:
                        load = _member_loader(sample, extension)
                        samples.append(Sample(f"{sample.key}.{extension}", modality, load))
    if not samples:
        raise ValueError(f"{data}: holds no picture, sound or film; give shards or a folder")
    return samples


def limited(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """The first `limit` samples of every modality."""
    seen: Counter[str] = Counter()
    kept = []
    for sample in samples:
        seen[sample.modality] += 1
        if limit is None or seen[sample.modality] <= limit:
            kept.append(sample)
    return kept


def _file_loader(path: Path) -> Callable[[], Item]:
    return lambda: decode(path.suffix[1:].lower(), path.read_bytes(), str(path))


def _member_loader(sample: ShardSample, extension: str) -> Callable[[], Item]:
    return lambda: decode(extension, sample[extension], sample.where)


def _modality(extension: str) -> str | None:
    kinds = {"image": PICTURES, "audio": SOUNDS, "video": FILMS}
    return next((modality for modality, known in kinds.items() if extension in known), None)
