"""A run that is asked to leave writes a checkpoint and ends with exit code 75.

Pods are taken back with SIGTERM, to one process or to all, at once or apart; SLURM warns with
SIGUSR1. A handler here sets a flag and nothing else: a handler that talks to the other processes
hangs as soon as one of them was not signalled (Lightning 2.6.6: 4 of 4 trials). The processes
compare their flags after every step with one integer.
"""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

import lightning
import torch
import torch.distributed as dist

from unimm.training.checkpoints import RunCheckpoints
from unimm.training.stops import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_log = logging.getLogger("unimm")


class Preemption(lightning.Callback):
    """Ends the run after the step in which any process was signalled.

    Args:
        checkpoints: writes the last checkpoint.
    """

    def __init__(self, checkpoints: RunCheckpoints) -> None:
        self._checkpoints = checkpoints
        self._asked = self._leaving = False
        self._group: Any = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Take the signals over from Lightning, which has set its own handlers before."""
        self._asked = self._leaving = False
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        if dist.is_initialized() and trainer.world_size > 1:
            # On the CPU: the GPUs' queue would make every process wait for its device.
            self._group = dist.new_group(backend="gloo")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any
    ) -> None:
        """Compare flags; where one is set on any process, save on all."""
        asked = torch.tensor(int(self._asked))
        if self._group is not None:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        if asked and trainer.global_step < trainer.max_steps:
            self._checkpoints.save(trainer)
            self._leaving = True

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any
    ) -> None:
        """Leave: not before the last step is in the log, which Lightning writes after its end."""
        if self._leaving:
            raise Preempted(
                f"asked to leave at step {trainer.global_step}: a checkpoint was written, run the "
                "same command again"
            )

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Give the signals back."""
        self._restore()

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
