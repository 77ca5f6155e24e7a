"""`unimm fit` and `unimm validate`: LightningCLI over typed YAML recipes.

A recipe names a task, a data module and trainer settings; each recipe file is whole by itself. Run
again, a recipe resumes from the newest checkpoint of its folder that can be read.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from unimm.checkpoint import did_you_mean, replacing
from unimm.training.task import Task

CHECKPOINTS = "checkpoints"
LOGS = "logs"
_UNKNOWN = re.compile(r"accept option '([^']+)'|Option '([^']+)' is not accepted")


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


class FinalCheckpoint(lightning.Callback):
    """Keeps the state at the very end, wherever the checkpoint interval fell."""

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
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
        trainer.callbacks.extend([
            ModelCheckpoint(
                dirpath=run / CHECKPOINTS,
                filename="{step}",
                monitor="step",
                mode="max",
                save_top_k=2,
                every_n_train_steps=max(100, trainer.max_steps // 10),
            ),
            FinalCheckpoint(),
        ])
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Continue from the newest checkpoint of the run's folder that can be read."""
        if self.config_init["fit"].get("ckpt_path") is None:
            found = newest_checkpoint(self.trainer.default_root_dir)
            self.config_init["fit"]["ckpt_path"] = None if found is None else str(found)


def newest_checkpoint(run: str | Path) -> Path | None:
    """The newest readable checkpoint of a run folder; damaged ones are passed over."""
    found = sorted(
        Path(run, CHECKPOINTS).glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    return next((path for path in found if _readable(path)), None)


def _readable(path: Path) -> bool:
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError):
        return False
    return True


def launch(arguments: Sequence[str], *, subcommand: str = "fit") -> LightningCLI:
    """Run a recipe.

    Args:
        arguments: `-c recipe.yaml` and dotted overrides.
        subcommand: "fit" or "validate".

    Raises:
        ValueError: the recipe has an unknown or ill-typed key; names it.
    """
    args: ArgsType = [subcommand, *arguments]
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
    except ArgumentError as error:
        raise ValueError(_explained(str(error), arguments)) from None


def _explained(message: str, arguments: Sequence[str]) -> str:
    """The parser's complaint in one line, with a hint for a misspelled key."""
    recipes = [
        value
        for flag, value in zip(arguments, arguments[1:], strict=False)
        if flag in ("-c", "--config")
    ]
    where = ", ".join(recipes) or "recipe"
    unknown = _UNKNOWN.search(message)
    if unknown is None:
        lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
        return f"{where}: {' '.join(lines)[:500] or 'the recipe is not valid'}"
    key = next(group for group in unknown.groups() if group)
    hint = did_you_mean(key.rpartition(".")[2], sorted(_known_keys(recipes)))
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
    for hint in get_type_hints(found.__init__).values():
        for part in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(part):
                keys |= {field.name for field in dataclasses.fields(part)}
    return keys
