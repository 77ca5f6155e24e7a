"""`unimm fit` and `unimm validate`: LightningCLI over typed YAML recipes.

A recipe names a task, a data module and trainer settings; each recipe file is whole by itself. Run
again, a recipe resumes from the newest checkpoint of its folder that is whole.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import ArgsType, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from unimm.memory import keep_freed_memory
from unimm.training.checkpoints import (
    CHECKPOINTS,
    AtomicCheckpointIO,
    RunCheckpoints,
    newest_checkpoint,
    read_checkpoint,
    sweep,
)
from unimm.training.mistakes import FRAME, explained
from unimm.training.preemption import Preemption
from unimm.training.samples import ShowSamples
from unimm.training.task import Task
from unimm.training.throughput import Throughput

__all__ = ["CHECKPOINTS", "LOGS", "AtomicCheckpointIO", "launch", "newest_checkpoint",
           "read_checkpoint"]  # fmt: skip

LOGS = "logs"
_log = logging.getLogger("unimm")
# What Lightning 2.6 warns of on every run here, and what is meant so: passes over validation data
# have a length and share no sample between workers; a resumed run's folder is not empty; its logs
# are kept by `_keep_log`; the command line is ours. The last two are Lightning's own use of names
# that others deprecated.
_EXPECTED = (
    (r"Your `IterableDataset` has `__len__` defined", UserWarning),
    (r"Checkpoint directory .* exists and is not empty", UserWarning),
    (r"Experiment logs directory .* exists and is not empty", UserWarning),
    (r"The '.*' does not have many workers", UserWarning),
    (r"You defined a `validation_step` but have no `val_dataloader`", UserWarning),
    (r"LightningCLI's args parameter is intended", UserWarning),
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
    (r"(?s).*(deprecated in v4|JsonargparseDeprecationWarning)", DeprecationWarning),
)


class _CLI(LightningCLI):
    """LightningCLI with a run folder: checkpoints, logs and resumption in one place.

    Args:
        wandb: project of Weights & Biases to log to, beside the folder; None: none.
        given: see LightningCLI.
    """

    def __init__(self, wandb: str | None, **given: Any) -> None:
        self._wandb = wandb
        super().__init__(**given)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Add logs, checkpoints and what watches a run to what the recipe asks for."""
        settings = self._get(self.config, "trainer")
        run = Path(settings.get("default_root_dir") or "runs/unnamed")
        kwargs.setdefault("default_root_dir", str(run))
        if settings.get("logger") is None:
            kwargs["logger"] = [
                CSVLogger(run, name=LOGS, version=""),
                TensorBoardLogger(run, name=LOGS, version="tensorboard"),
                *([] if self._wandb is None else [_wandb_logger(run, self._wandb)]),
            ]
        kwargs["enable_checkpointing"] = False  # ours are added below
        if settings.get("plugins") is None and SLURMEnvironment.detect():
            # Its own requeueing saves inside a signal handler; exit code 75 does it here.
            kwargs["plugins"] = [SLURMEnvironment(auto_requeue=False)]
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == "fit" and trainer.max_steps < 1:
            raise ValueError("trainer.max_steps: give the number of steps; the schedule needs it")
        _complete(trainer)
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Continue from the newest whole checkpoint of the run's folder."""
        settings = self.config_init["fit"]
        assert isinstance(self.model, Task)
        self.model.check_strategy(self.trainer)
        sweep(Path(self.trainer.default_root_dir, CHECKPOINTS))
        if settings.get("ckpt_path") is None:
            found = newest_checkpoint(self.trainer.default_root_dir)
            settings["ckpt_path"] = None if found is None else str(found)
        start = settings["ckpt_path"]
        step = 0 if start is None else read_checkpoint(start)["global_step"]
        for logger in self.trainer.loggers:
            if isinstance(logger, CSVLogger) and rank_zero_only.rank == 0:
                _keep_log(logger, step)


def _wandb_logger(run: Path, project: str) -> Logger:
    """The same run of Weights & Biases whenever the folder's run goes on."""
    try:
        return WandbLogger(
            run.name,
            run,
            id=hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12],
            project=project,
            resume="allow",
        )
    except ModuleNotFoundError:
        raise ValueError("--wandb: wandb is not installed: pip install 'unimm[wandb]'") from None


def _complete(trainer: lightning.Trainer) -> None:
    """Add the callbacks that every run has; those that the recipe names itself stay as they are."""
    callbacks: list[lightning.Callback] = trainer.callbacks  # pyright: ignore
    named = {type(callback) for callback in callbacks}
    if Throughput not in named:
        callbacks.append(Throughput(every=max(1, trainer.log_every_n_steps)))  # pyright: ignore
    checkpoints = next((c for c in callbacks if isinstance(c, RunCheckpoints)), RunCheckpoints())
    # Last: what they save and show holds what all others did in the step.
    callbacks[:] = [c for c in callbacks if c is not checkpoints]
    callbacks += [ShowSamples(), checkpoints, Preemption(checkpoints)]


def _keep_log(logger: CSVLogger, step: int) -> None:
    """Let a CSV log go on after `step`: Lightning would begin it anew.

    Rows of steps that were lost with a killed run are left out; they are trained again.
    """
    path = Path(logger.log_dir, "metrics.csv")
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
    logger.experiment.metrics.extend(rows)
    logger.experiment.save()


def launch(
    arguments: Sequence[str], *, subcommand: str = "fit", wandb: str | None = None
) -> LightningCLI:
    """Run a recipe.

    Args:
        arguments: `-c recipe.yaml` and dotted overrides.
        subcommand: "fit" or "validate".
        wandb: project of Weights & Biases to log to, too, where the recipe names no logger.

    Raises:
        ValueError: the recipe has an unknown or ill-typed key, or asks for what this machine does
            not have; names it.
        RunStopped: the run ended early, with an exit code of its own.
    """
    keep_freed_memory()
    args: ArgsType = [subcommand, *arguments]
    with warnings.catch_warnings():
        for message, category in _EXPECTED:
            warnings.filterwarnings("ignore", message, category)
        try:
            return _CLI(
                wandb,
                model_class=Task,
                datamodule_class=lightning.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={"exit_on_error": False},
                trainer_defaults={"max_epochs": -1, "logger": None},
                args=args,
            )
        except (ArgumentError, MisconfigurationException, ValueError) as error:
            # Errors of data and files say themselves what is wrong and where.
            if isinstance(error, ValueError) and FRAME[0] not in str(error):
                raise
            raise ValueError(_advised(explained(str(error), arguments))) from None


def _advised(message: str) -> str:
    """What a complaint about devices leaves out: what this machine has."""
    if "accelerator" not in message.lower() and "gpu" not in message.lower():
        return message
    found = torch.cuda.device_count()
    have = f"{found} GPUs" if found else "no GPU"
    return f"{message}; this machine has {have}: set trainer.accelerator and trainer.devices"
