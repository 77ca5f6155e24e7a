"""Pictures, sounds, films and texts that a run writes, shown by its logger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import soundfile
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageSequence


class ShowSamples(lightning.Callback):
    """Gives TensorBoard what other callbacks wrote into `<run>/samples/step=N`.

    Stands behind them in the list of callbacks: `unimm fit` adds it at the end.
    """

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Show the samples of this step."""
        folder = Path(trainer.default_root_dir, "samples", f"step={trainer.global_step}")
        if not trainer.is_global_zero or not folder.is_dir():
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for path in sorted(folder.rglob("*")):
                    tag = f"samples/{path.relative_to(folder).with_suffix('').as_posix()}"
                    _show(logger.experiment, tag, path, trainer.global_step)


def _show(writer: Any, tag: str, path: Path, step: int) -> None:
    """Add one file, by its kind; other kinds are not for loggers."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            writer.add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")
    elif path.suffix == ".gif":
        with Image.open(path) as film:
            frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(film)]
        # Side by side: TensorBoard's films need a package that nothing else here does.
        writer.add_image(tag, np.concatenate(frames, axis=1), step, dataformats="HWC")
    elif path.suffix == ".wav":
        sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
        writer.add_audio(tag, torch.from_numpy(sound.mean(1)), step, sample_rate=rate)
    elif path.suffix == ".txt":
        writer.add_text(tag, path.read_text(encoding="utf-8"), step)
