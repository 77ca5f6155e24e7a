"""Token shards on an object store: fetched once, held against their manifests, read as files."""

import json
import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from unimm.data import sources
from unimm.data.copies import CACHE, local_shards
from unimm.data.loader import TokenRows
from unimm.data.manifest import manifest_path
from unimm.data.module import TokenDataModule
from unimm.data.templates import Template
from unimm.data.tokenize_many import tokenize_shards
from unimm.tokenizer import UnifiedTokenizer

FILES = fsspec.filesystem("memory")


@pytest.fixture
def made(make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path) -> Path:
    """Two token shards in a folder."""
    templates = [Template(["{txt}", "{png}"])]
    tokenize_shards(make.raw(2, 10), tmp_path / "made", tokenizer, templates, progress=False)
    return tmp_path / "made"


@pytest.fixture
def store(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The same shards at an address of fsspec's own store in memory; copies go below `tmp_path`."""
    monkeypatch.setattr(sources, "SCHEMES", (*sources.SCHEMES, "memory"))
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    folder = f"/{uuid.uuid4().hex}"
    for path in made.glob("raw-*"):
        FILES.pipe_file(f"{folder}/{path.name}", path.read_bytes())
    yield f"memory:/{folder}"
    FILES.rm(folder, recursive=True)


@pytest.fixture
def copied(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """How many shards were copied since the last question."""
    caplog.set_level(logging.INFO, "unimm")

    def count() -> int:
        found = sum("copied to" in record.message for record in caplog.records)
        caplog.clear()
        return found

    return count


def test_rows_are_those_of_the_files(store: str, made: Path, tokenizer: UnifiedTokenizer) -> None:
    near = TokenRows(made, tokenizer.vocabulary, 96)
    far = TokenRows(f"{store}/raw-{{000..001}}.tar", tokenizer.vocabulary, 96)
    assert len(far) == len(near)
    every = range(len(near))
    assert all(torch.equal(a, b) for a, b in zip(near.batch(every), far.batch(every), strict=True))


def test_a_shard_is_fetched_once_and_again_when_it_changes(
    store: str, made: Path, copied: Callable[[], int]
) -> None:
    first = local_shards(f"{store}/")
    assert (len(first), copied()) == (2, 2)
    assert (local_shards(f"{store}/"), copied()) == (first, 0)
    manifest = json.loads(manifest_path(made / "raw-000.tar").read_text())
    FILES.pipe_file(f"{store}/raw-000.tar.json", json.dumps(manifest | {"device": "x"}).encode())
    assert (local_shards(f"{store}/"), copied()) == (first, 1)


def test_half_a_copy_is_made_again(store: str, copied: Callable[[], int]) -> None:
    (path, _) = local_shards(f"{store}/")
    copied()
    manifest_path(path).unlink()  # what a killed process leaves
    path.write_bytes(b"half")
    assert local_shards(f"{store}/")[0].stat().st_size > 4
    assert copied() == 1


def test_files_and_addresses_stand_side_by_side(store: str, made: Path) -> None:
    found = local_shards(f"{store}/raw-001.tar, {made}/raw-000.tar")
    assert [path.name for path in found] == ["raw-000.tar", "raw-001.tar"]
    assert found[0].parent == made


def test_damaged_and_missing_shards_are_named(store: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 shards are missing .*/raw-002\.tar, .*/raw-003\.tar"):
        local_shards(f"{store}/raw-{{001..003}}.tar")
    FILES.pipe_file(f"{store}/raw-000.tar", FILES.cat_file(f"{store}/raw-001.tar"))
    with pytest.raises(ValueError, match=r"raw-000\.tar.*differ|raw-000\.tar: the shard has"):
        local_shards(f"{store}/raw-000.tar")
    assert not list((tmp_path / "cache").rglob("raw-00*"))


def test_training_reads_from_a_store(
    store: str, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = TokenDataModule(str(tmp_path / "tokenizer"), {f"{store}/": 1.0}, row_length=96)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.ids.shape == (8, 96)
