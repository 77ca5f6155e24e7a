"""How fast a run is: ids per second and the share of the device's peak (MFU)."""

from __future__ import annotations

import re
import time
from typing import Any

import lightning
import torch

from unimm.data.batch import Batch
from unimm.model import size_of
from unimm.model.presets import Size
from unimm.training.language import LanguageTask

# Dense bfloat16 TFLOP/s of NVIDIA's datasheets, without sparsity; the first name that stands as
# a word in a device's own name counts, so longer names stand before shorter ones.
PEAKS: dict[str, float] = {
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "B100": 1750.0,
    "H200": 989.4,
    "GH200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "T4": 65.0,
    "V100": 125.0,
}


def peak_of(device: str) -> float | None:
    """Peak of a device by its name, in operations per second; None where the table has none."""
    found = (peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device))
    return next((peak * 1e12 for peak in found), None)


class Throughput(lightning.Callback):
    """Logs `throughput/ids_per_second`, of all processes together, and `throughput/mfu`.

    Time is taken between CUDA events, read when the next ones are recorded, so the device never
    waits for it; on a CPU it is wall time. Padding counts: it is computed like anything else.
    Operations are counted as `unimm.model.presets.Size.flops_per_token` does, recomputation left
    out.

    Args:
        every: steps that one figure is the mean of.
        peak_tflops: of one device, dense, in the precision of the run; None: from the table.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, every: int = 50, peak_tflops: float | None = None) -> None:
        if every < 1 or (peak_tflops is not None and peak_tflops <= 0):
            raise ValueError("throughput: every must be 1 or more, peak_tflops above 0")
        self.every = every
        self.peak = None if peak_tflops is None else peak_tflops * 1e12
        self._marks: list[tuple[int, Any]] = []
        self._ids = 0
        self._size: Size | None = None

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Look the device up, and count the model."""
        self._marks, self._ids = [], 0
        if isinstance(pl_module, LanguageTask):
            self._size = size_of(pl_module.lm.config)
        if self.peak is None and pl_module.device.type == "cuda":
            self.peak = peak_of(torch.cuda.get_device_name(pl_module.device))

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count, and log where a figure is due."""
        if not isinstance(batch, Batch) or not isinstance(pl_module, LanguageTask):
            return
        _, replicas = pl_module.replica
        self._ids += batch.ids.numel() * replicas
        if trainer.global_step % self.every:
            return
        self._marks.append((self._ids, _now(pl_module.device)))
        if len(self._marks) < 3:  # the first interval holds compilation
            return
        (before, start), (after, end) = self._marks[-3:-1]
        self._marks = self._marks[-2:]
        rate = (after - before) / _between(start, end)
        pl_module.log("throughput/ids_per_second", rate)
        if self.peak is not None:
            assert self._size is not None
            operations = rate * self._size.flops_per_token(batch.ids.shape[1])
            pl_module.log("throughput/mfu", operations / (self.peak * trainer.world_size))


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(start: Any, end: Any) -> float:
    """Seconds; the end was recorded a whole interval ago."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3
