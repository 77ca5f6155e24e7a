"""`unimm fit` and `unimm validate`: LightningCLI over typed YAML recipes.

A recipe names a task, a data module and trainer settings; each recipe file is whole by itself. Run
again, a recipe resumes from the newest checkpoint of its folder that can be read.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import inspect
import itertools
import logging
import re
import warnings
import zipfile
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightning
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from unimm.checkpoint import did_you_mean, replacing
from unimm.training.task import Task

CHECKPOINTS = "checkpoints"
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
_UNKNOWN = re.compile(
    r"accept option '([^']+)'|Option '([^']+)' is not accepted|unrecognized arguments: --([\w.]+)"
)
_KEY = re.compile(r'Parser key "([^"]+)":')
# Lines that jsonargparse puts around what is wrong.
_FRAME = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Problem with given class_path",
    "Expected a <class 'NoneType'>",
    "Given value",
    "Subclass types expect one of",
    "a class path",
    "a dict with",
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and then renames it.

    Lightning's own writer goes through TMPDIR: on another file system a killed run leaves a
    truncated checkpoint (4 of 8 trials).
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write one checkpoint."""
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one checkpoint, compared with its checksums; never more than weights and data."""
        return read_checkpoint(path, "cpu")


class FinalCheckpoint(lightning.Callback):
    """Keeps the state at the very end, wherever the checkpoint interval fell."""

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Write `final.ckpt`."""
        trainer.save_checkpoint(Path(trainer.default_root_dir, CHECKPOINTS, "final.ckpt"))


class _CLI(LightningCLI):
    """LightningCLI with a run folder: checkpoints, logs and resumption in one place."""

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Add logs, checkpoints and the atomic writer to what the recipe asks for."""
        settings = self._get(self.config, "trainer")
        run = Path(settings.get("default_root_dir") or "runs/unnamed")
        kwargs.setdefault("default_root_dir", str(run))
        if settings.get("logger") is None:
            kwargs["logger"] = [
                CSVLogger(run, name=LOGS, version=""),
                TensorBoardLogger(run, name=LOGS, version="tensorboard"),
            ]
        kwargs["enable_checkpointing"] = False  # ours are added below
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == "fit" and trainer.max_steps < 1:
            raise ValueError("trainer.max_steps: give the number of steps; the schedule needs it")
        trainer.callbacks.extend(  # pyright: ignore[reportAttributeAccessIssue]
            [
                ModelCheckpoint(
                    dirpath=run / CHECKPOINTS,
                    filename="{step}",
                    monitor="step",
                    mode="max",
                    save_top_k=2,
                    every_n_train_steps=max(100, trainer.max_steps // 10),
                ),
                FinalCheckpoint(),
            ]
        )
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Continue from the newest checkpoint of the run's folder that can be read."""
        settings = self.config_init["fit"]
        if settings.get("ckpt_path") is None:
            found = newest_checkpoint(self.trainer.default_root_dir)
            settings["ckpt_path"] = None if found is None else str(found)
        start = settings["ckpt_path"]
        step = 0 if start is None else read_checkpoint(start)["global_step"]
        for logger in self.trainer.loggers:
            if isinstance(logger, CSVLogger):
                _keep_log(logger, step)


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


def newest_checkpoint(run: str | Path) -> Path | None:
    """The newest whole checkpoint of a run folder; damaged ones are passed over, with a warning."""
    found = sorted(
        Path(run, CHECKPOINTS).glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    for path in found:
        try:
            read_checkpoint(path)
        except ValueError as error:
            _log.warning("passed over: %s", error)
        else:
            return path
    return None


def read_checkpoint(path: str | Path, device: str = "meta") -> dict[str, Any]:
    """What a checkpoint holds, its tensors on `device`; "meta" reads shapes alone.

    Raises:
        ValueError: it is missing, damaged, or holds more than tensors and plain data.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        # torch.load does not compare checksums: a changed byte would become a changed weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: damaged or cut, or no checkpoint ({error})") from None
    if damaged is not None:
        raise ValueError(f"{path}: damaged: the bytes of {damaged} differ from their checksum")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # the reader's errors have no common class below this one
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: no checkpoint that can be read safely ({reason})") from None


def launch(arguments: Sequence[str], *, subcommand: str = "fit") -> LightningCLI:
    """Run a recipe.

    Args:
        arguments: `-c recipe.yaml` and dotted overrides.
        subcommand: "fit" or "validate".

    Raises:
        ValueError: the recipe has an unknown or ill-typed key; names it.
    """
    args: ArgsType = [subcommand, *arguments]
    with warnings.catch_warnings():
        for message, category in _EXPECTED:
            warnings.filterwarnings("ignore", message, category)
        try:
            return _CLI(
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
            if isinstance(error, ValueError) and _FRAME[0] not in str(error):
                raise
            raise ValueError(_explained(str(error), arguments)) from None


def _explained(message: str, arguments: Sequence[str]) -> str:
    """The complaint about a recipe in one line, with a hint for a misspelled key."""
    recipes = [value for flag, value in itertools.pairwise(arguments) if flag in ("-c", "--config")]
    where = ", ".join(recipes) or "recipe"
    unknown = _UNKNOWN.search(message)
    if unknown is None:
        path = ".".join(_KEY.findall(message))
        lines = [_KEY.split(line)[-1].strip(" -") for line in message.splitlines()]
        told = " ".join(line for line in lines if line and not line.startswith(_FRAME))
        return f"{where}: {path}: {told}"[:500] if path else f"{where}: {told}"[:500]
    key = next(group for group in unknown.groups() if group)
    known = sorted(_known_keys(recipes))
    misspelled = next((part for part in key.split(".") if part not in known), key)
    hint = did_you_mean(misspelled, known)
    return f"{where}: unknown key {key!r}{hint}"


def _known_keys(recipes: Sequence[str]) -> set[str]:
    """Every key that the classes named in the recipes, or Lightning's trainer, would take."""
    keys = {"model", "data", "trainer", "seed_everything", "ckpt_path", "class_path", "init_args"}
    keys |= set(inspect.signature(lightning.Trainer.__init__).parameters)
    for recipe in recipes:
        for path in _class_paths(yaml.safe_load(Path(recipe).read_text())):
            keys |= _parameters(path)
    return keys - {"self"}


def _class_paths(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("class_path"), str):
            yield node["class_path"]
        for value in node.values():
            yield from _class_paths(value)
    elif isinstance(node, list):
        for value in node:
            yield from _class_paths(value)


def _parameters(class_path: str) -> set[str]:
    """Parameters of a class, and the fields of the config dataclasses among them."""
    module, _, name = class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None) if module else None
    if found is None:
        return set()
    keys = set(inspect.signature(found.__init__).parameters)
    try:
        hints = get_type_hints(found.__init__)
    except NameError:  # a class of another package that imports its types for checkers alone
        return keys
    for hint in hints.values():
        for part in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(part):
                keys |= {field.name for field in dataclasses.fields(part)}
    return keys
