"""Conversations of the dial-pad world, made by rule: four turns that hang together.

    show me seven     a picture of seven
    say it            its tones
    now nine          the same again for another digit: the tones of nine
    move it left      a film of nine that moves left

"it" is what was spoken of last, and "now" asks for what was asked last. Conversation `index` of
world `seed` is fixed by those two numbers. As a raw sample it is one `document.json` that names the
sample's own members, for the template `["{document}"]`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unimm.data.dialpad import WORDS, Scene, make_scene, scene_files, write_shards

USER, ASSISTANT = "<user>", "<assistant>"


class Turns(NamedTuple):
    """What is said in each turn, what it asks for, and two scenes that show it.

    asked: words of the four turns. targets: their modalities. answers: a digit each, and for the
    film (digit, direction).
    """

    asked: tuple[str, str, str, str]
    targets: tuple[str, str, str, str]
    answers: tuple[int, int, int, tuple[int, str]]
    first: Scene
    second: Scene


def make_turns(seed: int, index: int) -> Turns:
    """Conversation `index` of world `seed`; its two digits differ."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index, 4])))
    digit, other = (int(n) for n in rng.choice(10, 2, replace=False))
    first, second = make_scene(seed, 2 * index, digit), make_scene(seed, 2 * index + 1, other)
    direction = second.direction
    return Turns(
        (f"show me {WORDS[digit]}", "say it", f"now {WORDS[other]}", f"move it {direction}"),
        ("image", "audio", "audio", "video"),
        (digit, digit, other, (other, direction)),
        first,
        second,
    )


def write_conversations(
    out: Path, count: int, seed: int, samples_per_shard: int = 1000
) -> list[Path]:
    """Write conversations 0 to count - 1 of world `seed` as raw shards `talk-000000.tar`, ...

    Returns:
        The shards, in order.

    Raises:
        ValueError: `count` or `samples_per_shard` is below 1.
    """
    return write_shards(out, "talk", _samples(count, seed), samples_per_shard)


def _samples(count: int, seed: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for index in range(count):
        turns = make_turns(seed, index)
        first, second = scene_files(turns.first), scene_files(turns.second)
        members = {
            "a.png": first["png"],
            "a.wav": first["wav"],
            "b.wav": second["wav"],
            "b.gif": second["gif"],
        }
        document = [
            part
            for words, member in zip(turns.asked, members, strict=True)
            for part in (USER, words, ASSISTANT, member)
        ]
        yield f"{index:08d}", {**members, "document.json": json.dumps(document).encode()}
