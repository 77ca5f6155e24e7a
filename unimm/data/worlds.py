"""Steps around the shards: making raw ones, and assembling a tokenizer from codecs and words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from unimm.checkpoint import seal
from unimm.data import dialpad, dialpad_talk, digits
from unimm.data.folders import RawSummary, make_raw_shards
from unimm.data.media import decode
from unimm.data.shards import ShardReader, expand
from unimm.text import TextModel
from unimm.tokenizer import UnifiedTokenizer
from unimm.vocabulary import AudioLayout
from unimm_tokenizers import Codec

World = Literal["dialpad", "digits"]
Split = Literal["train", "val"]
Made = Literal["dialpad", "dialpad-talk", "digits"]
MADE_BY_RULE = ("dialpad", "dialpad-talk")  # their names are sources
DEFAULT_COUNT = 1000


def make_shards(
    source: str | Path,
    out: str | Path,
    *,
    world: Made | None = None,
    split: Split = "train",
    count: int | None = None,
    seed: int = 0,
) -> RawSummary:
    """Write raw shards.

    Args:
        source: a folder, a JSONL, CSV or Parquet file; not read where a world is made by rule.
        out: folder of the shards.
        world: "dialpad", "dialpad-talk" (its conversations), "digits" (MNIST and FSDD files in a
            folder), or None for a plain folder.
        split: of the digits.
        count: samples to make of a world.
        seed: of a world.

    Raises:
        ValueError: the source is missing or does not hold what the world needs.
    """
    if world is None:
        return make_raw_shards(Path(source), Path(out))
    wanted = DEFAULT_COUNT if count is None else count
    # Drawing costs 3 ms a scene; below a thousand, starting processes costs more.
    workers = (os.cpu_count() or 1) if wanted > 1000 else 1
    if world == "dialpad":
        made = dialpad.write_raw_shards(Path(out), wanted, seed, workers=workers)
    elif world == "dialpad-talk":
        made = dialpad_talk.write_conversations(Path(out), wanted, seed, workers=workers)
    else:
        made = digits.write_raw_shards(Path(source), Path(out), split, wanted, seed)
    return RawSummary(shards=made, samples=wanted)


def captions(shards: str | Path) -> Iterator[str]:
    """The words of raw shards: every .txt, and the texts of every .json, alone or in a list."""
    for path in expand(shards):
        for sample in ShardReader(path):
            if "txt" in sample:
                yield str(decode("txt", sample["txt"], sample.where))
            if "json" in sample:
                fields = decode("json", sample["json"], sample.where)
                for value in fields.values() if isinstance(fields, dict) else ():
                    entries = value if isinstance(value, list) else [value]
                    yield from (entry for entry in entries if isinstance(entry, str))


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
