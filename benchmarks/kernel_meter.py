"""Times and memory of a call, and results written whole or not at all."""

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20


class Meter:
    """Times and peak memory on one device."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Median of as many runs as fit in the time, three at least, after a warm-up."""
        run()
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begin < self.seconds:
            times.append(self._once(run))
        return sorted(times)[len(times) // 2]

    def _once(self, run: Callable[[], object]) -> float:
        if self.device == "cpu":
            begin = time.process_time()
            run()
            return (time.process_time() - begin) * 1e3 / torch.get_num_threads()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_mib(self, run: Callable[[], object]) -> float:
        """Memory beyond what was held before the call."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / MIB
        # Linux: 5 resets the high-water mark of the process's memory.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return max(0.0, _status("VmHWM") - before)


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}: the CPU part needs Linux")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
