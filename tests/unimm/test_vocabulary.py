"""Ids never move: blocks, fingerprints, growth, the JSON form."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimm.vocabulary import (
    DIGIT_SIZE,
    MARKERS,
    MODALITIES,
    SPECIAL_SIZE,
    AudioLayout,
    Vocabulary,
)

CODECS = {"image": [1024], "audio": [256, 256], "semantic": [64]}
SHARE = {"video": "image"}
PLAIN = "0ea7d364878740d493da76ad96dc2363d9c02740f3825fb29ed6287510a72fd8"
FULL = "b2432012079334c70184d03410f66b72ac885d83002888328b2d2fe9695b051f"


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocabulary:
    order = draw(st.permutations(MODALITIES[1:]))
    chosen = order[: draw(st.integers(0, len(order)))]
    sizes = st.lists(st.integers(1, 300), min_size=1, max_size=4)
    codecs = {modality: draw(sizes) for modality in chosen}
    share = {}
    if "image" in codecs and "video" not in codecs and draw(st.booleans()):
        share = {"video": "image"}
    layout: AudioLayout = draw(st.sampled_from(get_args(AudioLayout)))
    return Vocabulary(draw(st.integers(1, 2000)), codecs, share=share, audio_layout=layout)


@given(vocabularies())
def test_blocks_cover_the_ids_without_gap_or_overlap(vocabulary: Vocabulary) -> None:
    blocks = list(vocabulary)
    assert [block.name for block in blocks[:3]] == ["special", "digit", "text"]
    assert [block.size for block in blocks[:2]] == [SPECIAL_SIZE, DIGIT_SIZE]
    assert blocks[0].start == 0
    assert [block.end for block in blocks[:-1]] == [block.start for block in blocks[1:]]
    assert blocks[-1].end == len(vocabulary)
    for block in blocks:
        assert vocabulary[block.name] == block
        assert vocabulary.block_of(block.start) == vocabulary.block_of(block.end - 1) == block


@given(vocabularies())
def test_padded_size_is_the_next_whole_tile(vocabulary: Vocabulary) -> None:
    assert vocabulary.padded_size % 128 == 0
    assert 0 <= vocabulary.padded_size - len(vocabulary) < 128


@given(vocabularies())
def test_json_round_trip(vocabulary: Vocabulary) -> None:
    again = Vocabulary.from_dict(json.loads(vocabulary.to_json()))
    assert again == vocabulary
    assert hash(again) == hash(vocabulary)
    assert again.fingerprint == vocabulary.fingerprint
    assert repr(again) == repr(vocabulary)
    assert again.audio_layout == vocabulary.audio_layout
    assert again.modalities == vocabulary.modalities


@given(vocabularies(), st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_extended_keeps_every_id(vocabulary: Vocabulary, sizes: list[int]) -> None:
    missing = [m for m in MODALITIES[1:] if m not in vocabulary.modalities]
    for modality in missing:
        grown = vocabulary.extended({modality: sizes})
        assert list(grown)[: len(list(vocabulary))] == list(vocabulary)
        assert grown.audio_layout == vocabulary.audio_layout
        assert grown.share == vocabulary.share
        assert [block.size for block in grown.levels(modality)] == sizes
        assert grown.levels(modality)[0].start == len(vocabulary)
        assert grown.fingerprint != vocabulary.fingerprint
    for modality in set(vocabulary.modalities) - {"text"}:
        with pytest.raises(ValueError, match=modality):
            vocabulary.extended({modality: sizes})


def test_modalities_and_levels() -> None:
    vocabulary = Vocabulary(300, CODECS, share=SHARE)
    assert vocabulary.modalities == ("text", "image", "video", "audio", "semantic")
    assert vocabulary.levels("video") == vocabulary.levels("image") == [vocabulary["image.0"]]
    assert [block.name for block in vocabulary.levels("audio")] == ["audio.0", "audio.1"]
    assert vocabulary["image.0"].start == SPECIAL_SIZE + DIGIT_SIZE + 300
    assert [vocabulary.marker(name) for name in MARKERS] == list(range(len(MARKERS)))
    with pytest.raises(ValueError, match=r"no 'audio' tokens; it has text, image"):
        Vocabulary(300, {"image": [8]}).levels("audio")
    with pytest.raises(KeyError, match=r"no block 'image.1'; blocks are special, digit, text"):
        vocabulary["image.1"]


@pytest.mark.parametrize("token", [-1, 32 + 256 + 300, 10**9])
def test_an_id_outside_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match=rf"id {token} lies outside the vocabulary \(0 to 587\)"):
        Vocabulary(300).block_of(token)


def test_fingerprint_is_that_of_the_format() -> None:
    """Token shards and checkpoints out there carry these; a change here orphans them all."""
    assert Vocabulary(300).fingerprint == PLAIN
    assert Vocabulary(300, CODECS, share=SHARE, audio_layout="level").fingerprint == FULL


def test_fingerprint_tells_vocabularies_apart() -> None:
    different = [
        Vocabulary(300, CODECS, share=SHARE),
        Vocabulary(301, CODECS, share=SHARE),
        Vocabulary(300, CODECS),
        Vocabulary(300, CODECS, share=SHARE, audio_layout="level"),
        Vocabulary(300, {**CODECS, "image": [1025]}, share=SHARE),
        Vocabulary(300, dict(reversed(CODECS.items())), share=SHARE),
        Vocabulary(300, {**CODECS, "audio": [256, 256, 256]}, share=SHARE),
    ]
    assert len({vocabulary.fingerprint for vocabulary in different}) == len(different)
    assert len(set(different)) == len(different)
    assert different[0] != "a vocabulary"


def test_require_names_both_fingerprints() -> None:
    one, other = Vocabulary(300), Vocabulary(301)
    one.require(one.fingerprint, "shard.tar")
    message = f"shard.tar was made with vocabulary {other.fingerprint[:12]}.*{one.fingerprint[:12]}"
    with pytest.raises(ValueError, match=message):
        one.require(other.fingerprint, "shard.tar")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vocabulary(0), "'text': size must be a whole number above 0, got 0"),
        (lambda: Vocabulary(3.5), "'text': size must be a whole number"),  # type: ignore[arg-type]
        (lambda: Vocabulary(9, {"image": [8, 0]}), "'image.1': size"),
        (lambda: Vocabulary(9, {"image": []}), "'image' has no codec level"),
        (lambda: Vocabulary(9, {"smell": [8]}), "modality 'smell' is unknown"),
        (lambda: Vocabulary(9, {"text": [8]}), "modality 'text' is unknown"),
        (lambda: Vocabulary(9, share={"video": "image"}), "'video' can't share"),
        (
            lambda: Vocabulary(9, {"image": [8], "video": [8]}, share={"video": "image"}),
            "'video' can't share",
        ),
        (
            lambda: Vocabulary(9, audio_layout="rows"),  # type: ignore[arg-type]
            "expected 'frame' or 'level', got 'rows'",
        ),
    ],
)
def test_what_is_no_vocabulary_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def _edited(path: str, value: object) -> dict[str, Any]:
    """The plain data of a vocabulary with one entry replaced, or left out for `...`."""
    data: Any = copy.deepcopy(Vocabulary(300, CODECS, share=SHARE).to_dict())
    *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    place = data
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


@pytest.mark.parametrize(
    "data",
    [
        _edited("format", 2),
        _edited("format", ...),
        _edited("blocks", ...),
        _edited("blocks", 3),
        _edited("share", ...),
        _edited("audio_layout", ...),
        _edited("blocks/0/size", 31),
        _edited("blocks/3/start", 589),
        _edited("blocks/3/size", "1024"),
        _edited("blocks/2/name", ...),
        _edited("blocks/2", ...),
        _edited("blocks/4/name", "audio.1"),
        _edited("blocks/4/name", "smell.0"),
        [],
        None,
    ],
)
def test_damaged_json_is_refused(data: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocabulary|modality|block"):
        Vocabulary.from_dict(data)
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Vocabulary.load(path)


def test_load_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Vocabulary.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Vocabulary.load(path)
    path.write_text(Vocabulary(300, CODECS).to_json())
    assert Vocabulary.load(path) == Vocabulary(300, CODECS)


def test_a_fixed_grid_is_part_of_the_vocabulary() -> None:
    plain = Vocabulary(300, {"image": [512]})
    fixed = Vocabulary(300, {"image": [512]}, grids={"image": [4, 4]})
    assert fixed.fingerprint != plain.fingerprint
    assert Vocabulary.from_dict(fixed.to_dict()) == fixed
    assert fixed.extended({"audio": [64]}).grids == {"image": [4, 4]}
    assert "grids" not in plain.to_dict()  # older vocabularies keep their fingerprint


@pytest.mark.parametrize(
    "grids", [{"image": [4]}, {"image": [4, 0]}, {"audio": [4, 4]}, {"x": [1]}]
)
def test_grids_that_cannot_be(grids: dict[str, list[int]]) -> None:
    with pytest.raises(ValueError, match="grid"):
        Vocabulary(300, {"image": [512], "audio": [64]}, grids=grids)
