"""Checkpoints: rotated, swept, and never begun where they do not fit."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unimm.checkpoint import sha256
from unimm.training.checkpoints import (
    COMPLETE,
    METADATA,
    AtomicCheckpointIO,
    RunCheckpoints,
    commit,
    newest_checkpoint,
    read_checkpoint,
    sweep,
    tensor_bytes,
)
from unimm.training.launch import launch

WriteRecipe = Callable[..., Path]
Usage = namedtuple("Usage", "total used free")


def test_old_checkpoints_go_and_the_last_stay(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    saving = {"class_path": "unimm.training.RunCheckpoints", "init_args": {"every": 2, "keep": 2}}
    changes = {"trainer.callbacks": [saving], "trainer.max_steps": 9}
    launch(["-c", str(write_recipe(language_recipe, **changes))])
    folder = Path(language_recipe["trainer"]["default_root_dir"], "checkpoints")
    assert {path.name for path in folder.iterdir()} == {"step=6.ckpt", "step=8.ckpt", "final.ckpt"}


def test_a_run_names_its_own_interval_or_gets_a_tenth(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    cli = launch(["-c", str(write_recipe(language_recipe))])
    (saving,) = [c for c in cli.trainer.callbacks if isinstance(c, RunCheckpoints)]  # type: ignore[attr-defined]
    assert (saving.every, saving.keep) == (None, 2)
    with pytest.raises(ValueError, match="every and keep must be 1 or more"):
        RunCheckpoints(every=0)


def test_a_full_disk_is_named_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"w": torch.ones(1000), "global_step": 1}, path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 3999, 3999))
    with pytest.raises(OSError, match=r"last\.ckpt: the disk is full: .* needs 4e-06 GB and 4e-06"):
        AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(1000), "global_step": 2}, path)
    assert read_checkpoint(path)["global_step"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing")],
)
def test_a_disk_that_fills_up_meanwhile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"w": torch.ones(1000), "global_step": 1}, path)

    def fail(checkpoint: object, temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="the last good checkpoint stays"):
        AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(1000)}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert read_checkpoint(path)["global_step"] == 1


def test_shared_memory_is_counted_once() -> None:
    weight = torch.zeros(100)
    assert tensor_bytes({"a": weight, "b": [weight[10:], (weight,)], "c": 3}) == 400
    assert tensor_bytes({"a": weight, "b": torch.zeros(2, dtype=torch.int64)}) == 416


def test_what_dead_writers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".step=1.ckpt.999999999.tmp").write_bytes(b"dead")
    (tmp_path / ".step=2.ckpt.shards.tmp").mkdir()
    (tmp_path / ".step=2.ckpt.shards.tmp" / "x").write_bytes(b"dead")
    alive = tmp_path / ".step=3.ckpt.1.tmp"
    alive.write_bytes(b"being written")
    kept = tmp_path / "step=1.ckpt"
    kept.write_bytes(b"kept")
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([alive, kept])


def test_the_newest_is_the_one_of_most_steps(tmp_path: Path) -> None:
    """Copies and mounts change the times of files."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (30, 4, 20):
        torch.save({"global_step": step}, folder / f"step={step}.ckpt")
    assert newest_checkpoint(tmp_path) == folder / "step=30.ckpt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded checkpoint as far as reading it goes."""
    made = tmp_path / ".step=5.ckpt.shards.tmp"
    made.mkdir()
    torch.save({"global_step": 5, "unimm": {"entry": {}, "weights": None}}, made / METADATA)
    (made / "__0_0.distcp").write_bytes(b"shards" * 100)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in made.iterdir()}
    target = tmp_path / "checkpoints" / "step=5.ckpt"
    target.parent.mkdir()
    commit(made, target, files, {"weights": {"w": [3, 4]}})
    return target


def test_a_folder_of_shards_is_read_by_shape(folder: Path) -> None:
    stored = read_checkpoint(folder)
    assert stored["global_step"] == 5
    assert stored["unimm"]["weights"]["w"].shape == (3, 4)
    assert newest_checkpoint(folder.parents[1]) == folder
    assert json.loads((folder / COMPLETE).read_text())["format"] == 1
    with pytest.raises(ValueError, match="a sharded checkpoint: go on with the strategy"):
        AtomicCheckpointIO().load_checkpoint(folder)


@pytest.mark.parametrize("damage", ["no commit", "missing", "cut", "changed"])
def test_a_damaged_folder_is_passed_over_and_named(folder: Path, damage: str) -> None:
    shards = folder / "__0_0.distcp"
    if damage == "no commit":
        (folder / COMPLETE).unlink()
    elif damage == "missing":
        shards.unlink()
    elif damage == "cut":
        shards.write_bytes(b"shards")
    else:
        shards.write_bytes(b"Shards" * 100)
    with pytest.raises(ValueError, match=r"step=5\.ckpt: damaged"):
        read_checkpoint(folder)
    assert newest_checkpoint(folder.parents[1]) is None
