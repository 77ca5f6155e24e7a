"""FSDP2 and tensor parallelism under Lightning, with checkpoints that are whole or absent."""

from __future__ import annotations

import shutil
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from unimm.checkpoint import read_json, sha256
from unimm.training.average import WeightAverage
from unimm.training.checkpoints import (
    COMPLETE,
    METADATA,
    commit,
    require_space,
    sweep,
    tensor_bytes,
    verify,
)
from unimm.training.task import Task

_AVERAGE = "average."  # prefix of the averaged weights among a checkpoint's shards


class ShardedStrategy(ModelParallelStrategy):
    """Weights, gradients and optimizer states in shards over all processes.

    Lightning's strategy, with the sizes one expects (all processes data-parallel unless asked) and
    checkpoints that are committed by one rename; they load on any number of processes.

    Args:
        data_parallel_size: processes with data of their own; "auto": all over the other size.
        tensor_parallel_size: processes that compute a row together; a divisor of the key heads.
        timeout_seconds: after which a process that does not answer ends the run.

    Raises:
        ValueError: a size is neither a number nor "auto".
    """

    def __init__(
        self,
        data_parallel_size: int | str = "auto",
        tensor_parallel_size: int = 1,
        timeout_seconds: float = 1800.0,
    ) -> None:
        if isinstance(data_parallel_size, str) and data_parallel_size != "auto":
            raise ValueError(f'data_parallel_size: a number or "auto", got {data_parallel_size!r}')
        super().__init__(
            data_parallel_size=data_parallel_size,  # type: ignore[arg-type]
            tensor_parallel_size=tensor_parallel_size,
            timeout=timedelta(seconds=timeout_seconds),
        )

    def setup_environment(self) -> None:
        """Settle the sizes before Lightning does: its "auto" is one process per node."""
        if self._data_parallel_size == "auto":
            world = self.num_nodes * self.num_processes
            tensor = self._tensor_parallel_size
            assert isinstance(tensor, int)
            if world % tensor:
                raise ValueError(
                    f"trainer.strategy: tensor_parallel_size {tensor} must divide the "
                    f"{world} processes"
                )
            self._data_parallel_size = world // tensor
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write every process's shards beside the target, then rename.

        Raises:
            OSError: the disk is full; says what is needed.
        """
        target = Path(self.broadcast(str(filepath)))
        temporary = target.with_name(f".{target.name}.shards.tmp")
        average = self._average()
        if average is not None:
            checkpoint["state_dict"] |= {_AVERAGE + k: v for k, v in average.weights.items()}
        own = torch.tensor(tensor_bytes(_local(checkpoint)), device=self.root_device)
        dist.all_reduce(own)
        require_space(target, int(own))
        if self.global_rank == 0:
            sweep(target.parent)
            shutil.rmtree(temporary, ignore_errors=True)
        description = self._description()
        self.barrier()
        super().save_checkpoint(checkpoint, temporary)
        self.barrier()
        mine = temporary.glob(f"__{self.global_rank}_*")
        written = {path.name: _described(path) for path in mine}
        every: list[dict[str, Any]] = [{} for _ in range(self.world_size)]
        dist.all_gather_object(every, written)
        if self.global_rank == 0:
            files = {name: facts for part in every for name, facts in part.items()}
            files |= {name: _described(temporary / name) for name in (".metadata", METADATA)}
            commit(temporary, target, files, description)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read shards, however many processes wrote them, or a plain checkpoint.

        Raises:
            ValueError: it is damaged, or another model's; names what differs.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        if self.global_rank == 0:
            verify(path)
        self.barrier()
        meta = path / METADATA if path.is_dir() else path
        stored = torch.load(meta, map_location="meta", weights_only=True)
        task = self.lightning_module
        assert isinstance(task, Task)
        task.check_entry(stored["unimm"]["entry"], str(path))
        found = super().load_checkpoint(path, weights_only=True)
        average = self._average()
        if average is not None and path.is_dir():
            state = {"state_dict": {_AVERAGE + k: v for k, v in average.weights.items()}}
            load(state, checkpoint_id=path)
        return found

    def _average(self) -> WeightAverage | None:
        task = self.lightning_module
        return task.average if isinstance(task, Task) else None

    def _description(self) -> dict[str, Any]:
        """What those need who read a checkpoint without the processes that wrote it."""
        task = self.lightning_module
        assert isinstance(task, Task)
        exported = task.exported()
        prefix = next(f"{name}." for name, child in task.named_children() if child is exported)
        return {
            "weights": {name: list(value.shape) for name, value in exported.state_dict().items()},
            "prefix": prefix,
            "averaged": task.average is not None,
        }


def exported_weights(path: Path) -> dict[str, Tensor]:
    """What a sharded checkpoint exports, whole and on the CPU: averages where there are some.

    Names are those of the exported module, which the task holds under `COMPLETE.json`'s prefix.
    """
    complete = read_json(path / COMPLETE)
    prefix = _AVERAGE if complete["averaged"] else complete["prefix"]
    weights = {name: torch.empty(shape) for name, shape in complete["weights"].items()}
    with warnings.catch_warnings():  # of a single process, which is what is meant
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load({"state_dict": {prefix + k: v for k, v in weights.items()}}, checkpoint_id=path)
    return weights


def _local(node: Any) -> Any:
    """Nested tensors, of shards the part that this process holds."""
    if isinstance(node, dict):
        return {key: _local(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_local(value) for value in node]
    to_local = getattr(node, "to_local", None)
    return to_local() if isinstance(node, Tensor) and to_local is not None else node


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
