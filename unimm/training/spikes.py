"""Loss spikes: back to the weights before, on with the data after.

Chowdhery et al. (PaLM, arXiv 2204.02311, section 5.1) went back to a checkpoint about 100 steps
before a spike and left out the batches around it: the same batches from other weights made no
spike. Here weights and optimizer states go back, the step and the data do not, so what lay between
checkpoint and spike is left out and a run keeps its length.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from pathlib import Path
from typing import Any

import lightning

from unimm.training.checkpoints import CHECKPOINTS, read_checkpoint
from unimm.training.stops import NonFinite
from unimm.training.task import Task

_log = logging.getLogger("unimm")


class SpikeRewind(lightning.Callback):
    """Goes back to an older checkpoint where the loss leaps and stays up.

    A spike is `patience` steps in a row whose loss lies more than `deviations` standard deviations,
    and a twentieth, above the mean of the last `window` steps before them.

    Args:
        deviations: how far up.
        window: steps whose mean is compared with; nothing is a spike before it is full.
        patience: steps in a row.
        limit: rewinds of a run, after which the next spike ends it with exit code 76.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self, deviations: float = 6.0, window: int = 100, patience: int = 3, limit: int = 3
    ) -> None:
        if deviations <= 0 or min(window, patience) < 1 or limit < 0:
            raise ValueError("spikes: deviations, window and patience must be above 0, limit 0 up")
        self.deviations = deviations
        self.patience = patience
        self.limit = limit
        self._losses: deque[float] = deque(maxlen=window)
        self._above = 0
        self.rewinds = 0

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: a resumed run sees the same spikes."""
        return {"losses": list(self._losses), "above": self._above, "rewinds": self.rewinds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self._losses.extend(state_dict["losses"])
        self._above, self.rewinds = state_dict["above"], state_dict["rewinds"]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any
    ) -> None:
        """Compare the step's loss, which is the same on all processes."""
        loss = float(trainer.callback_metrics["train/loss"])
        if not math.isfinite(loss):
            return  # skipped by the task
        if not self._is_above(loss):
            self._above = 0
            self._losses.append(loss)
            return
        self._above += 1
        if self._above >= self.patience:
            self._rewind(trainer, pl_module, loss)

    def _is_above(self, loss: float) -> bool:
        if len(self._losses) < (self._losses.maxlen or 0):
            return False
        mean = sum(self._losses) / len(self._losses)
        variance = sum((value - mean) ** 2 for value in self._losses) / len(self._losses)
        return loss > mean + self.deviations * math.sqrt(variance) + 0.05 * abs(mean)

    def _rewind(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: float
    ) -> None:
        step, spike = trainer.global_step, trainer.global_step - self._above
        chosen = before(trainer.default_root_dir, spike)
        chosen = trainer.strategy.broadcast(None if chosen is None else str(chosen))
        if chosen is None or self.rewinds >= self.limit:
            reason = (
                "no checkpoint before it is whole"
                if chosen is None
                else (f"the run was rewound {self.rewinds} times already")
            )
            raise NonFinite(f"step {step}: the loss leapt to {loss:.4g}, and {reason}")
        stored = trainer.strategy.load_checkpoint(chosen, weights_only=True)
        assert isinstance(pl_module, Task)
        if "state_dict" in stored:  # shards are read straight into their places
            trainer.strategy.load_model_state_dict(stored)
            trainer.strategy.load_optimizer_state_dict(stored)
            pl_module.on_load_checkpoint(stored)
        self.rewinds += 1
        self._above = 0
        _log.warning(
            "step %d: the loss leapt to %.4g: weights and optimizers are those of %s again; the "
            "data goes on", step, loss, Path(chosen).name,
        )  # fmt: skip


def before(run: str | Path, step: int) -> Path | None:
    """The newest whole checkpoint of a run folder that was written before a step."""
    found = []
    for path in Path(run, CHECKPOINTS).glob("step=*.ckpt"):
        number = path.stem.removeprefix("step=")
        if number.isdigit() and int(number) < step:
            found.append((int(number), path))
    for _, path in sorted(found, reverse=True):
        try:
            read_checkpoint(path)
        except ValueError as error:
            _log.warning("passed over: %s", error)
        else:
            return path
    return None
