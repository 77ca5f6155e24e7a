"""What both tasks share: manual optimization on a schedule that depends on the step alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from unimm.training.optim import OptimizerConfig, set_learning_rate


class Task(lightning.LightningModule):
    """A Lightning task that steps its own optimizers.

    Args:
        optimizer: how parameters move.
    """

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimizer_config = optimizer

    @abstractmethod
    def bundle_entry(self) -> dict[str, Any]:
        """What `unimm export` needs to rebuild the model: kind, class, config; plain data."""

    @abstractmethod
    def exported(self) -> nn.Module:
        """The module whose weights are exported."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the exported module's own description and weights beside Lightning's state."""
        checkpoint["unimm"] = {
            "entry": self.bundle_entry(),
            "weights": self.exported().state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, naming what differs."""
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

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log under the number of steps done; Lightning's own count is one ahead after a resume."""
        self.log("step", float(self.global_step))

    def on_validation_epoch_end(self) -> None:
        """See `on_train_batch_end`."""
        self.log("step", float(self.global_step))

    def descend(
        self, loss: Tensor, parameters: Iterable[nn.Parameter], first: int = 0, count: int = 1
    ) -> Tensor:
        """One step of optimizers first .. first + count - 1; returns the gradient norm.

        Lightning counts a step for every optimizer that steps through it: only the first of all
        does, so that `max_steps` and `global_step` count batches.
        """
        wrapped = self.optimizers(use_pl_optimizer=True)
        every = wrapped if isinstance(wrapped, list) else [wrapped]
        chosen = every[first : first + count]
        factor = self.optimizer_config.factor(self.global_step, self.trainer.max_steps)
        for optimizer in chosen:
            optimizer.zero_grad()
        self.manual_backward(loss)
        clip = self.optimizer_config.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(list(parameters), clip, error_if_nonfinite=False)
        for number, optimizer in enumerate(chosen, start=first):
            inner = optimizer.optimizer
            set_learning_rate(inner, factor)
            if not bool(norm.isfinite()):
                for group in inner.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
            if number == 0:
                optimizer.step()
            else:
                inner.step()
        return norm


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
