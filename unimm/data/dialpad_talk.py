"""Conversations of the dial-pad world, made by rule: four turns that hang together.

    show me seven     a picture of seven            say seven         its tones
    say it            its tones                     show it           a picture of seven
    now nine          the tones of nine             now nine          a picture of nine
    move it left      a film of nine moving left    move it left      a film of nine moving left

"it" is what was spoken of last, and "now" asks for what was asked last. Conversation `index` of
world `seed` is fixed by those two numbers. As a raw sample it is one `document.json` that names the
sample's own members, for the template `["{document}"]`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image

from unimm.data.dialpad import (
    DIRECTIONS,
    WORDS,
    RawSample,
    draw_film,
    draw_picture,
    draw_sound,
    encode_gif,
    encode_png,
    encode_wav,
    random_streams,
    write_drawn,
)
from unimm.signals import Audio, Video

USER, ASSISTANT = "<user>", "<assistant>"
Opening = Literal["image", "audio"]
_SHOWN_FIRST = 2 / 3  # of all conversations
_TALK = 4  # sets these streams apart from a scene's


class Turns(NamedTuple):
    """What is said in each turn, what it asks for, and what an answer may look like.

    asked: words of the four turns. targets: their modalities. answers: a digit each, and for the
    film (digit, direction). shown: an item each.
    """

    asked: tuple[str, str, str, str]
    targets: tuple[Opening, Opening, Opening, Literal["video"]]
    answers: tuple[int, int, int, tuple[int, str]]
    shown: tuple[Image.Image | Audio, Image.Image | Audio, Image.Image | Audio, Video]


def make_turns(seed: int, index: int, opening: Opening | None = None) -> Turns:
    """Conversation `index` of world `seed`; its two digits differ.

    Args:
        seed: the world, a non-negative integer.
        index: the conversation, a non-negative integer.
        opening: what the first turn asks for; None: the world chooses.
    """
    choice, *streams = random_streams([seed, index, _TALK], 5)
    digit, other = (int(n) for n in choice.choice(10, 2, replace=False))
    direction = DIRECTIONS[int(choice.integers(4))]
    drawn: Opening = "image" if choice.random() < _SHOWN_FIRST else "audio"
    first = opening or drawn
    second: Opening = "audio" if first == "image" else "image"
    draw = {"image": draw_picture, "audio": draw_sound}
    again = {"image": "show it", "audio": "say it"}
    return Turns(
        (
            f"{'show me' if first == 'image' else 'say'} {WORDS[digit]}",
            again[second],
            f"now {WORDS[other]}",
            f"move it {direction}",
        ),
        (first, second, second, "video"),
        (digit, digit, other, (other, direction)),
        (
            draw[first](digit, streams[0]),
            draw[second](digit, streams[1]),
            draw[second](other, streams[2]),
            draw_film(other, direction, streams[3]),
        ),
    )


def write_conversations(
    out: Path, count: int, seed: int, samples_per_shard: int = 1000, workers: int = 1
) -> list[Path]:
    """Write conversations 0 to count - 1 of world `seed` as raw shards `talk-000000.tar`, ...

    Args:
        out, samples_per_shard, workers: see `unimm.data.dialpad.write_raw_shards`.
        count: number of conversations.
        seed: the world.

    Returns:
        The shards, in order.

    Raises:
        ValueError: `count` or `samples_per_shard` is below 1.
    """
    return write_drawn(out, "talk", partial(_sample, seed), count, samples_per_shard, workers)


def _sample(seed: int, index: int) -> RawSample:
    turns = make_turns(seed, index)
    files: dict[str, bytes] = {}
    document: list[str] = []
    for number, (words, item) in enumerate(zip(turns.asked, turns.shown, strict=True), start=1):
        extension, content = _encoded(item)
        member = f"{number}.{extension}"
        files[member] = content
        document += [USER, words, ASSISTANT, member]
    return f"{index:08d}", {**files, "document.json": json.dumps(document).encode()}


def _encoded(item: Image.Image | Audio | Video) -> tuple[str, bytes]:
    """Extension and bytes of an item's file."""
    if isinstance(item, Audio):
        return "wav", encode_wav(item)
    return ("gif", encode_gif(item)) if isinstance(item, Video) else ("png", encode_png(item))
