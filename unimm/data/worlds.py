"""Steps around the shards: making raw ones, and assembling a tokenizer from codecs and words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from unimm.checkpoint import seal
from unimm.data import dialpad, digits
from unimm.data.folders import make_raw_shards
from unimm.data.media import decode
from unimm.data.shards import ShardReader, expand
from unimm.text import TextModel
from unimm.tokenizer import UnifiedTokenizer
from unimm.vocabulary import AudioLayout
from unimm_tokenizers import Codec

World = Literal["dialpad", "digits"]
Split = Literal["train", "val"]
DEFAULT_COUNT = 1000


def make_shards(
    source: str | Path,
    out: str | Path,
    *,
    world: World | None = None,
    split: Split = "train",
    count: int | None = None,
    seed: int = 0,
) -> int:
    """Write raw shards; returns the number of samples.

    Args:
        source: the data: a folder, a JSONL file, or "dialpad" for the world that is made by rule.
        out: folder of the shards.
        world: "dialpad", "digits" (MNIST and FSDD files in a folder), or None for a plain folder.
        split: of the digits.
        count: samples to make of a world.
        seed: of a world.

    Raises:
        ValueError: the source is missing or does not hold what the world needs.
    """
    if world is None:
        return make_raw_shards(Path(source), Path(out)).samples
    wanted = DEFAULT_COUNT if count is None else count
    if world == "dialpad":
        # Drawing costs 3 ms a scene; below a thousand, starting processes costs more.
        workers = (os.cpu_count() or 1) if wanted > 1000 else 1
        dialpad.write_raw_shards(Path(out), wanted, seed, workers=workers)
    else:
        digits.write_raw_shards(Path(source), Path(out), split, wanted, seed)
    return wanted


def captions(shards: str | Path) -> Iterator[str]:
    """The words of raw shards: every .txt, and the text fields of every .json."""
    for path in expand(shards):
        for sample in ShardReader(path):
            if "txt" in sample:
                yield str(decode("txt", sample["txt"], sample.where))
            if "json" in sample:
                fields = decode("json", sample["json"], sample.where)
                if isinstance(fields, dict):
                    yield from (value for value in fields.values() if isinstance(value, str))


def assemble_tokenizer(
    codecs: Sequence[str | Path],
    shards: str | Path,
    out: str | Path,
    *,
    text_size: int = 512,
    audio_layout: AudioLayout = "frame",
) -> UnifiedTokenizer:
    """Write a tokenizer bundle from trained codecs and a text model of the shards' words.

    Args:
        codecs: codec folders, in the order of their blocks.
        shards: raw shards whose words train the text model.
        out: the bundle folder.
        text_size: upper bound of text pieces.
        audio_layout: "frame" or "level".
    """
    text = TextModel.train(captions(shards), text_size)
    loaded = [Codec.from_pretrained(folder) for folder in codecs]
    tokenizer = UnifiedTokenizer(text, loaded, audio_layout=audio_layout)
    tokenizer.save_pretrained(out)
    seal(out)
    return tokenizer
