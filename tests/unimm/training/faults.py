"""What goes wrong in a run, as callbacks that a recipe can name; and a process of a run.

Imported by name in processes of their own, so it stands beside the tests and is none of them.
"""

import itertools
import multiprocessing
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import lightning
import torch

from unimm import cli
from unimm.training.checkpoints import AtomicCheckpointIO


def process(environment: dict[str, str], arguments: list[str], log: str) -> None:
    """One process of a run: `unimm ARGUMENTS` in an environment, its output in a file."""
    # As in a process that a shell starts; the forkserver's way would outlive a killed run.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment)
    torch.set_num_threads(1)
    with Path(log).open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.exit(cli.main(["--debug", *arguments]))


def write(path: str, temporary: str, written: Any) -> None:
    """Writes one checkpoint after the other and tells of each, with TMPDIR set, without end."""
    os.environ["TMPDIR"] = temporary
    writer, weights = AtomicCheckpointIO(), torch.randn(3_000_000)
    for step in itertools.count():
        writer.save_checkpoint({"w": weights, "global_step": step}, path)
        written.send(step)


class At(lightning.Callback, ABC):
    """Something happens to some processes after a step is done."""

    def __init__(self, step: int, ranks: list[int]) -> None:
        self.step = step
        self.ranks = ranks

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank in self.ranks:
            self.happen(trainer)

    @abstractmethod
    def happen(self, trainer: lightning.Trainer) -> None: ...


class Kill(At):
    """SIGKILL."""

    def happen(self, trainer: lightning.Trainer) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Signal(At):
    """A signal, to the ranks one after the other, `apart` seconds between."""

    def __init__(self, step: int, ranks: list[int], number: int, apart: float = 0.0) -> None:
        super().__init__(step, ranks)
        self.number = number
        self.apart = apart

    def happen(self, trainer: lightning.Trainer) -> None:
        time.sleep(self.apart * self.ranks.index(trainer.global_rank))
        os.kill(os.getpid(), self.number)


class Poison(lightning.Callback):
    """NaN in the activations of one process, in some steps."""

    def __init__(self, steps: list[int], rank: int) -> None:
        self.steps = steps
        self.rank = rank

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        def poison(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            hit = trainer.global_step + 1 in self.steps and trainer.global_rank == self.rank
            return output * float("nan") if hit and module.training else output

        module.lm.embedding.register_forward_hook(poison)


class Leap(lightning.Callback):
    """The head's weights leap after some steps, so that the loss does."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    @torch.no_grad()
    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step in self.steps:
            for parameter in module.lm.parameters():
                parameter.mul_(-3.0)
