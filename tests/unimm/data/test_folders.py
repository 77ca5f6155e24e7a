import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from unimm.data.folders import make_raw_shards
from unimm.data.manifest import Manifest
from unimm.data.shards import ShardReader, expand
from unimm.data.tables import kind_of


def samples_of(out: Path) -> list[dict[str, bytes]]:
    return [{e: s[e] for e in s.members} for path in expand(out) for s in ShardReader(path)]


@pytest.fixture
def folder(tmp_path: Path, make: Any) -> Path:
    """Three pictures with captions in subfolders, a sound, a film and a note."""
    root = tmp_path / "my.media"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    for number, name in enumerate(("b/one.2020", "b/two", "zero")):
        (root / f"{name}.png").write_bytes(make.png(number))
        (root / f"{name}.txt").write_text(f"{name}\n")
    (root / "tone.WAV").write_bytes(make.wav(0))
    (root / "film.gif").write_bytes(make.gif(0))
    (root / "README.md").write_text("not a sample")
    (root / ".git" / "x.txt").write_text("hidden")
    return root


def test_a_folder_becomes_samples(folder: Path, tmp_path: Path, make: Any) -> None:
    summary = make_raw_shards(folder, tmp_path / "out", samples_per_shard=2)
    assert [path.name for path in summary.shards] == [f"my-{number:06d}.tar" for number in range(3)]
    assert (summary.samples, summary.duplicates, summary.ignored) == (5, 0, 1)
    assert samples_of(tmp_path / "out") == [
        {"png": make.png(0), "txt": b"b/one.2020"},
        {"png": make.png(1), "txt": b"b/two"},
        {"gif": make.gif(0)},
        {"wav": make.wav(0)},
        {"png": make.png(2), "txt": b"zero"},
    ]
    for path in summary.shards:
        manifest = Manifest.read(path)
        manifest.check(path, verify=True)
        manifest.check_samples(path, len(ShardReader(path)))


def test_the_same_folder_makes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        make_raw_shards(folder, tmp_path / out)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_equal_samples_are_kept_once(folder: Path, tmp_path: Path) -> None:
    for extension in ("png", "txt"):
        (folder / f"copy.{extension}").write_bytes((folder / f"zero.{extension}").read_bytes())
    (folder / "other.png").write_bytes((folder / "zero.png").read_bytes())
    summary = make_raw_shards(folder, tmp_path / "out")
    assert (summary.samples, summary.duplicates) == (6, 1)


def test_damaged_files_are_left_out_and_named(folder: Path, tmp_path: Path, caplog: Any) -> None:
    os.truncate(folder / "zero.png", 60)
    (folder / "b" / "two.txt").write_text("\n")
    summary = make_raw_shards(folder, tmp_path / "out")
    assert summary.samples == 3
    assert [name for name, _ in summary.skipped] == [
        str(folder / "b" / "two.txt"),
        str(folder / "zero.png"),
    ]
    assert "the text is empty" in caplog.text
    assert "2 unusable samples" in str(summary)


def test_a_shorter_run_removes_the_rest_of_a_longer_one(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_raw_shards(folder, out, samples_per_shard=1)
    (out / "other-000009.tar").touch()
    make_raw_shards(folder, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "my-000000.tar",
        "my-000000.tar.json",
        "other-000009.tar",
    ]


def test_shards_may_stand_in_the_folder_itself(folder: Path) -> None:
    first = make_raw_shards(folder, folder / "shards")
    again = make_raw_shards(folder, folder / "shards")
    assert first.samples == again.samples == 5


ROWS: list[dict[str, Any]] = [
    {"file": "zero.png", "caption": "a zero", "width": 16},
    {"file": "tone.wav", "caption": "a tone", "width": 0},
]


@pytest.fixture
def media(tmp_path: Path, make: Any) -> Path:
    (tmp_path / "zero.png").write_bytes(make.png(0))
    (tmp_path / "tone.wav").write_bytes(make.wav(0))
    return tmp_path


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_table_becomes_samples(media: Path, kind: str, make: Any) -> None:
    table = media / f"table.{kind}"
    if kind == "jsonl":
        table.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    else:
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file", "caption", "width"])
            writer.writeheader()
            writer.writerows(ROWS)
    make_raw_shards(table, media / "out")
    first, second = samples_of(media / "out")
    width = 16 if kind == "jsonl" else "16"
    assert first["png"] == make.png(0)
    assert first["txt"] == b"a zero"
    assert json.loads(first["json"]) == {"caption": "a zero", "width": width}
    assert second["wav"] == make.wav(0)


def test_two_pictures_of_a_row_are_named_by_their_fields(media: Path) -> None:
    (media / "t.jsonl").write_text('{"left": "zero.png", "right": "zero.png"}\n')
    make_raw_shards(media / "t.jsonl", media / "out")
    assert list(samples_of(media / "out")[0]) == ["png", "right.png"]


def test_a_file_that_a_row_names_in_vain_is_named(media: Path) -> None:
    (media / "t.jsonl").write_text('{"file": "no.png"}\n{"file": "zero.png"}\n')
    summary = make_raw_shards(media / "t.jsonl", media / "out")
    assert summary.samples == 1
    assert summary.skipped == [(str(media / "no.png"), "the file is missing")]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("t.jsonl", '{"a": 1}\n{"a"', "row 2 is not valid JSON"),
        ("t.jsonl", "[1]\n", "row 1 is no JSON object"),
        ("t.csv", "a,b\n1\n", "row 1 has not as many fields as the header"),
        ("t.csv", "a,b\n1,2,3\n", "row 1 has not as many fields as the header"),
        ("t.csv", "a,b\n1,caf\xe9\n", "not a table in UTF-8"),
        ("t.jsonl", '{"a": "caf\xe9"}', "not a table in UTF-8"),
        ("t.jsonl", "", "holds no usable sample"),
        ("t.xlsx", "x", r"give a folder, a \.jsonl, a \.csv or a \.parquet file"),
    ],
)
def test_damaged_tables(media: Path, name: str, text: str, reason: str) -> None:
    (media / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{media / name}: {reason}"):
        make_raw_shards(media / name, media / "out")


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        make_raw_shards(tmp_path / "no", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no usable sample"):
        make_raw_shards(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="samples_per_shard must be 1 or more"):
        make_raw_shards(tmp_path, tmp_path / "out", samples_per_shard=0)


def test_two_files_of_one_name_and_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "zero.PNG").write_bytes((folder / "zero.png").read_bytes())
    with pytest.raises(ValueError, match=r"a second \.png of this name"):
        make_raw_shards(folder, tmp_path / "out")


# Parquet


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    table = pytest.importorskip("pyarrow", reason="Parquet tables need pyarrow")
    from_rows = table.Table.from_pylist(rows)
    pytest.importorskip("pyarrow.parquet").write_table(from_rows, path)
    return path


def test_a_parquet_table_holds_files_or_names_them(media: Path, make: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": make.png(3), "path": None}, "file": None, "captions": ["a", "b"]},
        {"image": {"bytes": None, "path": "zero.png"}, "file": None, "captions": ["c"]},
        {"image": None, "file": make.wav(0), "captions": []},
        {"image": None, "file": make.gif(0), "captions": []},
    ]
    summary = make_raw_shards(parquet(media / "t.parquet", rows), media / "out")
    assert (summary.samples, summary.skipped) == (4, [])
    first, second, third, fourth = samples_of(media / "out")
    assert first["png"] == make.png(3)
    assert json.loads(first["json"])["captions"] == ["a", "b"]
    assert second["png"] == make.png(0)
    assert third["wav"] == make.wav(0)
    assert fourth["gif"] == make.gif(0)


def test_a_damaged_parquet_table_and_unknown_bytes_are_named(media: Path) -> None:
    path = parquet(media / "t.parquet", [{"file": b"\x80\x04pickle"}, {"text": "seven"}])
    summary = make_raw_shards(path, media / "out")
    assert [name for name, _ in summary.skipped] == [f"{path}: row 1"]
    assert "no decoder for .bytes" in summary.skipped[0][1]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"t\.parquet: damaged table after row 0"):
        make_raw_shards(path, media / "out")


@pytest.mark.parametrize("extension", ["png", "wav", "gif", "jpg", "webp", "flac", "ogg", "mp3"])
def test_media_are_known_by_their_first_bytes(make: Any, extension: str) -> None:
    if extension in ("png", "jpg", "webp"):
        data = make.png(0, form={"jpg": "JPEG"}.get(extension, extension.upper()))
    elif extension in ("wav", "gif"):
        data = make.wav(0) if extension == "wav" else make.gif(0)
    else:
        stream = io.BytesIO()
        noise = np.random.default_rng(0).normal(0, 0.1, 8000)
        soundfile.write(stream, noise, 8000, format=extension.upper())
        data = stream.getvalue()
    assert kind_of(data) == extension
    assert kind_of(b"\x80\x04") is kind_of(b"RIFF....AVI ") is None
