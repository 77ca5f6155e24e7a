"""Checkpoints of a run: written whole or not at all, checked when read, the old ones dropped.

A checkpoint is a file (`step=N.ckpt`), or a folder of that name with the shards of every process.
A folder is complete when it holds `COMPLETE.json`, the sizes and hashes of all others, written
last. Sharded checkpoints are pickles, to be trusted like the code that wrote them; what is shared
is a bundle (`unimm export`).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from unimm.checkpoint import read_json, replacing, sha256

CHECKPOINTS = "checkpoints"
FINAL = "final.ckpt"
COMPLETE = "COMPLETE.json"
METADATA = "meta.pt"  # Lightning's name for what is no shard
_log = logging.getLogger("unimm")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and then renames it.

    Lightning's own writer goes through TMPDIR: on another file system a killed run leaves a
    truncated checkpoint (4 of 8 trials).
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write one checkpoint.

        Raises:
            OSError: the disk is full; says what is needed. What stood there before stays.
        """
        needed = tensor_bytes(checkpoint)
        sweep(Path(path).parent)
        require_space(path, needed)
        try:
            with replacing(path) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:
            # torch's zip writer turns a full disk into a RuntimeError of its own.
            if getattr(error, "errno", None) == errno.ENOSPC or "PytorchStreamWriter" in str(error):
                raise _full(path, needed) from error
            raise

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one checkpoint, compared with its checksums; never more than weights and data.

        Raises:
            ValueError: it is damaged, or a folder of shards.
        """
        if Path(path).is_dir():
            raise ValueError(
                f"{path}: a sharded checkpoint: go on with the strategy that wrote it "
                "(trainer.strategy.class_path: unimm.training.ShardedStrategy), on any number of "
                "processes, or export it"
            )
        return read_checkpoint(path, "cpu")


def tensor_bytes(checkpoint: Any) -> int:
    """Bytes of the tensors in nested dictionaries and lists; shared memory counts once."""
    storages: dict[int, int] = {}

    def visit(node: Any) -> None:
        if isinstance(node, Tensor):
            storage = node.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(node, Mapping):
            for value in node.values():
                visit(value)
        elif isinstance(node, list | tuple):
            for value in node:
                visit(value)

    visit(checkpoint)
    return sum(storages.values())


def require_space(path: str | Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OSError: names the bytes that are needed and free.
    """
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < needed:
        raise _full(path, needed)


def _full(path: str | Path, needed: int) -> OSError:
    free = shutil.disk_usage(Path(path).parent).free
    return OSError(
        errno.ENOSPC,
        f"{path}: the disk is full: the checkpoint needs {needed / 1e9:.3g} GB and "
        f"{free / 1e9:.3g} GB are free; the last good checkpoint stays: free space, then run again",
    )


def sweep(folder: Path) -> None:
    """Remove what a killed process left of a checkpoint that it was writing."""
    for path in folder.glob(".*.ckpt.*tmp"):
        owner = path.name.split(".")[-2]
        if owner.isdigit() and Path("/proc", owner).exists() and int(owner) != os.getpid():
            continue  # another process is writing it now
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def newest_checkpoint(run: str | Path) -> Path | None:
    """The newest whole checkpoint of a run folder; damaged ones are passed over, with a warning.

    The newest is the one of most steps, and of several the one written last: copies and mounts
    change the times of files.
    """
    found: list[tuple[int, float, Path]] = []
    for path in Path(run, CHECKPOINTS).glob("*.ckpt"):
        try:
            step = int(_load(path, "meta")["global_step"])
        except (ValueError, KeyError) as error:
            _log.warning("passed over: %s", error)
        else:
            found.append((step, path.stat().st_mtime, path))
    for _, _, path in sorted(found, reverse=True):
        try:
            verify(path)
        except ValueError as error:
            _log.warning("passed over: %s", error)
        else:
            return path
    return None


def read_checkpoint(path: str | Path, device: str = "meta") -> dict[str, Any]:
    """What a checkpoint holds, its tensors on `device`; "meta" reads shapes alone.

    Of a sharded checkpoint the weights in `["unimm"]["weights"]` are there by shape alone.

    Raises:
        ValueError: it is missing, damaged, or holds more than tensors and plain data.
    """
    verify(path)
    stored = _load(Path(path), device)
    if Path(path).is_dir():
        shapes = read_json(Path(path, COMPLETE))["weights"]
        stored["unimm"]["weights"] = {
            name: torch.empty(shape, device="meta") for name, shape in shapes.items()
        }
    return stored


def verify(path: str | Path) -> None:
    """Compare a checkpoint with its checksums.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = Path(path)
    if path.is_dir():
        _verify_folder(path)
        return
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        # torch.load does not compare checksums: a changed byte would become a changed weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: damaged or cut, or no checkpoint ({error})") from None
    if damaged is not None:
        raise ValueError(f"{path}: damaged: the bytes of {damaged} differ from their checksum")


def _verify_folder(path: Path) -> None:
    if not (path / COMPLETE).is_file():
        raise ValueError(f"{path}: damaged: no {COMPLETE}, so it was not written to the end")
    for name, expected in read_json(path / COMPLETE)["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != expected["bytes"]:
            raise ValueError(f"{path}: damaged: {name} is missing or cut")
        if sha256(file) != expected["sha256"]:
            raise ValueError(f"{path}: damaged: the bytes of {name} differ from their checksum")


def _load(path: Path, device: str) -> dict[str, Any]:
    file = path / METADATA if path.is_dir() else path
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # the reader's errors have no common class below this one
        kind = (
            "damaged" if not zipfile.is_zipfile(file) else "no checkpoint that can be read safely"
        )
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: {kind} ({reason})") from None


def commit(
    folder: Path, target: Path, files: Mapping[str, Any], description: Mapping[str, Any]
) -> None:
    """Make a folder of shards the checkpoint `target`: `COMPLETE.json`, then one rename."""
    with replacing(folder / COMPLETE) as temporary:
        temporary.write_text(json.dumps({"format": 1, "files": files, **description}))
    if target.is_dir():
        shutil.rmtree(target)
    elif target.exists():
        target.unlink()
    os.replace(folder, target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunCheckpoints(lightning.Callback):
    """Writes `checkpoints/step=N.ckpt` now and then, keeps the last few, and `final.ckpt`.

    Args:
        every: steps between two; None: a tenth of the run, 100 at least.
        keep: how many of them stay.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(self, every: int | None = None, keep: int = 2) -> None:
        if (every is not None and every < 1) or keep < 1:
            raise ValueError(f"checkpoints: every and keep must be 1 or more, got {every}, {keep}")
        self.every = every
        self.keep = keep
        self._last = -1
        self._unlogged = False

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any
    ) -> None:
        """Keep the log as far as the checkpoint goes: Lightning logs a step after its callbacks."""
        if self._unlogged:
            self._unlogged = False
            for logger in trainer.loggers:
                if isinstance(logger, CSVLogger):
                    logger.save()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any
    ) -> None:
        """Write one where it is due."""
        every = self.every or max(100, trainer.max_steps // 10)
        if trainer.global_step % every == 0:
            self.save(trainer)

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Write the last one."""
        self.save(trainer, FINAL)

    def save(self, trainer: lightning.Trainer, name: str | None = None) -> None:
        """Write one of this trainer now, on all processes together; once per step.

        Args:
            trainer: whose state is written.
            name: of the file; None: `step=N.ckpt`.
        """
        if name is None and self._last == trainer.global_step:
            return
        self._last = trainer.global_step
        folder = Path(trainer.default_root_dir, CHECKPOINTS)
        path = folder / (name or f"step={trainer.global_step}.ckpt")
        trainer.save_checkpoint(path, weights_only=False)  # else it remarks on it each time
        self._unlogged = trainer.is_global_zero
        if trainer.is_global_zero:
            self._rotate(folder)

    def _rotate(self, folder: Path) -> None:
        numbered = [path for path in folder.glob("step=*.ckpt") if path.stem[5:].isdigit()]
        for path in sorted(numbered, key=lambda path: int(path.stem[5:]))[: -self.keep]:
            if path.is_dir():
                # First what makes it whole: half a checkpoint is never taken for one.
                (path / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(path)
            else:
                path.unlink()
