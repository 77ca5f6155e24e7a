"""Time and memory of a codec: seconds of a pass, latency of a stream, peak memory of a pass."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from unimm_tokenizers.codec import Codec

_MIB = 2**20
_FRAMES = 24  # of a stream whose latency is measured, after as many to warm up


class Pass(NamedTuple):
    """Codes and reconstruction on the CPU, and the seconds that either took."""

    codes: Tensor
    made: Tensor
    encode_seconds: float
    decode_seconds: float


@torch.no_grad()
def code(codec: Codec, signal: Tensor) -> Pass:
    """Send a signal (1, C, *signal) through a codec, on the codec's device."""
    device = device_of(codec)
    x = signal.to(device)
    begun = _now(device)
    codes = codec.encode(x)
    coded = _now(device)
    made = codec.decode(codes, size=tuple(signal.shape[2:]))
    done = _now(device)
    return Pass(codes.cpu(), made.float().cpu(), coded - begun, done - coded)


def device_of(codec: Codec) -> torch.device:
    """Where a codec's weights live."""
    return next((p.device for p in codec.parameters()), torch.device("cpu"))


@torch.no_grad()
def stream_latency(codec: Codec) -> float | None:
    """Milliseconds from a sample's arrival to its sound: a frame, and the median time to code it.

    None for codecs that do not stream.
    """
    if codec.modality != "audio" or not hasattr(codec, "init_state") or codec.frame_rate is None:
        return None
    device = device_of(codec)
    hop = codec.downsample[0]
    frame = torch.zeros(1, codec.num_channels, hop, device=device)
    state = codec.init_state(1)  # pyright: ignore[reportCallIssue]
    seconds = []
    for _ in range(2 * _FRAMES):
        begun = _now(device)
        codes, state = codec.encode_chunk(frame, state)  # pyright: ignore[reportCallIssue]
        _, state = codec.decode_chunk(codes, state)  # pyright: ignore[reportCallIssue]
        seconds.append(_now(device) - begun)
    return 1000 * (1 / codec.frame_rate + median(seconds[_FRAMES:]))


def peak_mib(device: torch.device, call: Callable[[], object]) -> float | None:
    """MiB that a call took beyond what was held before it; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - held) / _MIB
    process = Path("/proc/self")
    try:
        # Freed memory that malloc keeps would hide what the call takes again.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        # Linux: 5 sets the peak back to what is resident now (proc_pid_clear_refs(5)).
        (process / "clear_refs").write_text("5")
        held = _resident_peak(process)
        call()
        return (_resident_peak(process) - held) / _MIB
    except OSError:
        return None


def _resident_peak(process: Path) -> int:
    lines = (process / "status").read_text().splitlines()
    peak = next((line for line in lines if line.startswith("VmHWM:")), None)
    if peak is None:
        raise OSError("no VmHWM in /proc/self/status")
    return int(peak.split()[1]) * 1024


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
