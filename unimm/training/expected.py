"""Whether a run learns as it did where its recipe was made: `expected.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_info

from unimm.checkpoint import read_json


class ExpectedLosses(lightning.Callback):
    """Compares the training loss at some steps with a file, and ends the run where it differs.

    The file holds `{"losses": {"1": 6.2, "100": 3.1}, "tolerance": 0.03}`, the tolerance relative;
    what else it holds, such as measured speeds, is for people.

    Args:
        path: the file.

    Raises:
        ValueError: it is missing or holds something else.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        held = read_json(path)
        try:
            self.losses = {int(step): float(loss) for step, loss in held["losses"].items()}
            self.tolerance = float(held["tolerance"])
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(
                f'{path}: expected {{"losses": {{"step": loss}}, "tolerance": ...}} ({error!r})'
            ) from None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any
    ) -> None:
        """Compare.

        Raises:
            ValueError: the loss differs by more than the tolerance.
        """
        expected = self.losses.get(trainer.global_step)
        if expected is None:
            return
        found = float(trainer.callback_metrics["train/loss"])
        if not abs(found - expected) <= self.tolerance * abs(expected):
            raise ValueError(
                f"{self.path}: step {trainer.global_step}: the loss is {found:.5g}, expected "
                f"{expected:.5g} within {self.tolerance:.1%}: data, config or code differ"
            )
        rank_zero_info(f"step {trainer.global_step}: loss {found:.5g}, as expected")
