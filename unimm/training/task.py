"""What both tasks share: manual optimization on a schedule that depends on the step alone.

A step is a pure function of the weights, the step's number and the data: random numbers (dropout)
are seeded by run, step and data-parallel rank, so a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from unimm.training.average import WeightAverage
from unimm.training.optim import (
    OptimizerConfig,
    clip_gradients,
    describe,
    set_learning_rate,
)
from unimm.training.stops import NonFinite

MAX_SKIPPED = 3  # steps in a row whose gradient may be NaN or infinite
_log = logging.getLogger("unimm")


class Task(lightning.LightningModule):
    """A Lightning task that steps its own optimizers.

    Args:
        optimizer: how parameters move.
        average: decay of a moving average of the weights, which is then what is exported; None
            keeps none.
    """

    def __init__(self, optimizer: OptimizerConfig, average: float | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimizer_config = optimizer
        self.average_decay = average
        self.average: WeightAverage | None = None
        self._skipped = 0
        self._run_seed = 0

    @abstractmethod
    def bundle_entry(self) -> dict[str, Any]:
        """What `unimm export` needs to rebuild the model: kind, class, config; plain data."""

    @abstractmethod
    def exported(self) -> nn.Module:
        """The module whose weights are exported."""

    @property
    def replica(self) -> tuple[int, int]:
        """Which of how many processes with data of their own this is: (rank, number)."""
        given = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return given["rank"], given["num_replicas"]

    def check_strategy(self, trainer: lightning.Trainer) -> None:
        """Refuse a trainer that cannot hold the model, before anything is set up.

        Raises:
            ValueError: says which strategy can.
        """

    def configure_model(self) -> None:
        """Begin the average, once the weights are where they stay."""
        if self.average_decay is not None and self.average is None:
            self.average = WeightAverage(self.exported(), self.average_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the exported module's own description and weights beside Lightning's state.

        Shards are the strategy's to write: `weights` is then None.
        """
        weights: Mapping[str, Tensor] | None = None
        if not isinstance(self.exported(), FSDPModule):
            weights = self.exported().state_dict()
            if self.average is not None:
                weights = {**weights, **self.average.weights}
        checkpoint["unimm"] = {"entry": self.bundle_entry(), "weights": weights}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, naming what differs."""
        if "state_dict" not in checkpoint:
            return  # the strategy has read the shards, and compared the configs before
        stored, own = checkpoint["state_dict"], self.state_dict()
        differing = [
            f"{name} is {_shape(stored.get(name))} there and {_shape(own.get(name))} here"
            for name in dict.fromkeys([*own, *stored])
            if _shape(stored.get(name)) != _shape(own.get(name))
        ]
        if differing:
            raise ValueError(
                f"{self.trainer.ckpt_path}: a checkpoint of another model: {differing[0]}, "
                f"{len(differing)} differ in all; name another default_root_dir"
            )
        if self.average is not None:
            self.average.load(checkpoint["unimm"]["weights"])

    def check_entry(self, stored: Mapping[str, Any], where: str) -> None:
        """Refuse a checkpoint whose description names another model.

        Raises:
            ValueError: names every key that differs, with both values.
        """
        own = self.bundle_entry()
        mine, theirs = ({**entry, **entry["config"]} for entry in (own, stored))
        differing = [
            f"{key} is {theirs.get(key)} there and {mine.get(key)} here"
            for key in dict.fromkeys([*mine, *theirs])
            if key != "config" and mine.get(key) != theirs.get(key)
        ]
        if differing:
            raise ValueError(
                f"{where}: a checkpoint of another model: {', '.join(differing)}; name another "
                "default_root_dir"
            )

    def on_fit_start(self) -> None:
        """Print what moves how."""
        self._run_seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        optimizers = [wrapped.optimizer for wrapped in self._wrapped()]
        rank_zero_info(f"parameter groups:\n{describe(optimizers)}")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed this step's random numbers."""
        rank, _ = self.replica
        torch.manual_seed((self._run_seed << 40) + (self.global_step << 16) + rank)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log under the number of steps done; Lightning's own count is one ahead after a resume."""
        self.log("step", float(self.global_step))

    def on_validation_epoch_end(self) -> None:
        """See `on_train_batch_end`."""
        self.log("step", float(self.global_step))

    def descend(
        self, loss: Tensor, parameters: Iterable[nn.Parameter], first: int = 0, count: int = 1
    ) -> Tensor:
        """One step of optimizers first .. first + count - 1; returns the gradient norm."""
        self.begin_step(first, count)
        self.manual_backward(loss)
        return self.finish_step(parameters, first, count)

    def begin_step(self, first: int = 0, count: int = 1) -> None:
        """Forget the gradients of these optimizers' parameters."""
        for optimizer in self._wrapped()[first : first + count]:
            optimizer.zero_grad()

    @contextmanager
    def gradients_kept(self) -> Iterator[None]:
        """Backward passes in here only add up; the first one behind it is shared by all ranks."""
        sharded = [m for m in self.modules() if isinstance(m, FSDPModule)]
        for module in sharded:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            if isinstance(self.trainer.strategy, ParallelStrategy):
                with self.trainer.strategy.block_backward_sync():
                    yield
            else:
                yield
        finally:
            for module in sharded:
                module.set_requires_gradient_sync(True, recurse=False)

    def finish_step(
        self, parameters: Iterable[nn.Parameter], first: int = 0, count: int = 1
    ) -> Tensor:
        """Clip and step; a gradient that is not finite changes nothing, on every process.

        Lightning counts a step for every optimizer that steps through it: only the first of all
        does, so that `max_steps` and `global_step` count batches.

        Returns:
            The gradient's norm before clipping.

        Raises:
            NonFinite: it was not finite three steps in a row.
        """
        chosen = self._wrapped()[first : first + count]
        factor = self.optimizer_config.factor(self.global_step, self.trainer.max_steps)
        norm = clip_gradients(list(parameters), self.optimizer_config.clip)
        finite = bool(norm.isfinite())
        for number, optimizer in enumerate(chosen, start=first):
            inner = optimizer.optimizer
            set_learning_rate(inner, factor)
            if not finite:
                for group in inner.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
            if number == 0:
                optimizer.step()
            else:
                inner.step()
        self._count_skipped(finite)
        if first == 0 and self.average is not None and finite:
            self.average.update(self.exported().named_parameters(), self.global_step)
        return norm

    def _count_skipped(self, finite: bool) -> None:
        self._skipped = 0 if finite else self._skipped + 1
        if not finite:
            _log.warning("step %d skipped: its gradient is not finite", self.global_step)
        if self._skipped >= MAX_SKIPPED:
            raise NonFinite(
                f"step {self.global_step}: the gradient was not finite {MAX_SKIPPED} steps in a "
                "row; the weights are those before: lower the learning rate, or look at the data"
            )

    def _wrapped(self) -> list[LightningOptimizer]:
        found: Any = self.optimizers(use_pl_optimizer=True)
        return found if isinstance(found, list) else [found]


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
