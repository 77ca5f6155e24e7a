"""Raw shards of every kind of source, their words, and a tokenizer made of both."""

from pathlib import Path
from typing import Any

import pytest

from unimm.checkpoint import verify
from unimm.data.shards import ShardReader, expand
from unimm.data.worlds import DEFAULT_COUNT, assemble_tokenizer, captions, make_shards
from unimm.tokenizer import UnifiedTokenizer


def test_the_world_made_by_rule(tmp_path: Path) -> None:
    assert make_shards("dialpad", tmp_path, world="dialpad", count=3, seed=4).samples == 3
    (path,) = expand(tmp_path)
    assert [sorted(sample.members) for sample in ShardReader(path)] == [
        ["gif", "json", "png", "txt", "wav"]
    ] * 3
    again = tmp_path / "again"
    make_shards("dialpad", again, world="dialpad", count=3, seed=4)
    assert (again / path.name).read_bytes() == path.read_bytes()
    make_shards("dialpad", again, world="dialpad", count=3, seed=5)
    assert (again / path.name).read_bytes() != path.read_bytes()
    assert DEFAULT_COUNT >= 1000


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_digits(shared_data: Path, tmp_path: Path, split: Any) -> None:
    made = make_shards(shared_data / "digits", tmp_path, world="digits", split=split, count=5)
    assert made.samples == 5
    (path,) = expand(tmp_path)
    samples = ShardReader(path)
    assert len(samples) == 5
    assert {"gif", "json", "png", "txt", "wav"} <= samples.samples[0].members.keys()


def test_real_digits_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        make_shards(tmp_path / "nowhere", tmp_path / "out", world="digits", count=5)
    assert not (tmp_path / "out").exists()


def test_a_plain_folder_counts_what_is_usable(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "cat.png").write_bytes(make.png(1))
    (folder / "cat.txt").write_text("a cat")
    (folder / "dog.png").write_bytes(b"no picture")
    made = make_shards(folder, tmp_path / "out")
    assert (made.samples, made.skipped[0][0]) == (1, str(folder / "dog.png"))


def test_words_are_texts_and_the_strings_of_json(make: Any) -> None:
    notes = b'{"film": "seven left", "digit": 7, "captions": ["a", "b"], "deep": {"no": "no"}}'
    listed = b'["no object"]'
    path = make.shard(
        [{"txt": b"seven", "json": notes}, {"png": make.png(1)}, {"txt": b"two", "json": listed}]
    )
    assert list(captions(path)) == ["seven", "seven left", "a", "b", "two"]


def test_words_that_can_not_be_read_are_named(make: Any) -> None:
    path = make.shard([{"txt": b"seven"}, {"txt": b"\xff\xfe"}])
    with pytest.raises(ValueError, match=r"one\.tar.*0001.*not UTF-8"):
        list(captions(path))


@pytest.mark.parametrize("layout", ["frame", "level"])
def test_a_tokenizer_of_codecs_and_words(
    tokenizer_bundle: Path, raw_shards: Path, tmp_path: Path, layout: Any
) -> None:
    folders = [tokenizer_bundle / "codecs" / name for name in ("image", "audio")]
    made = assemble_tokenizer(folders, raw_shards, tmp_path, audio_layout=layout)
    verify(tmp_path)
    assert (tmp_path / "index.json").is_file()
    read = UnifiedTokenizer.from_pretrained(tmp_path)
    assert read.vocabulary.fingerprint == made.vocabulary.fingerprint
    assert read.vocabulary.audio_layout == layout
    assert read.vocabulary.modalities == ("text", "image", "video", "audio")
    # Every word of the world is one piece or two.
    assert len(read.text.encode("seven")) <= 2


def test_a_tokenizer_of_words_alone(raw_shards: Path, tmp_path: Path) -> None:
    assert assemble_tokenizer([], raw_shards, tmp_path).vocabulary.modalities == ("text",)


def test_without_words_there_is_no_tokenizer(make: Any, tmp_path: Path) -> None:
    path = make.shard([{"png": make.png(1)}])
    with pytest.raises(ValueError, match="text"):
        assemble_tokenizer([], path, tmp_path / "tok")
    assert not (tmp_path / "tok").exists()
