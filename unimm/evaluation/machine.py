"""What this machine can do, and what would stop or slow a run: `unimm doctor`.

Nothing is changed, downloaded or started. Every check is a pure function of what was found, and
says "ok", or "warn" with advice.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch

GB = 10**9
MIN_MEMORY = 4 * GB  # the digits recipe stays below 3 GB
MIN_DISK = 5 * GB  # shards, checkpoints and a bundle of the digits recipe take below 1 GB
MIN_SHARED = GB  # a container's default of 64 MiB is what stops loader workers
_CGROUP = Path("/sys/fs/cgroup")


class Check(NamedTuple):
    """One line: what was looked at, what was found, and advice where something is wrong."""

    name: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        state = "warn" if self.advice else "ok"
        advice = f"; {self.advice}" if self.advice else ""
        return f"{state:<4}  {self.name:<12}  {self.found}{advice}"


def doctor(folder: str | Path = ".") -> str:
    """Look at this machine; one line per check.

    Args:
        folder: where runs would be written.
    """
    return "\n".join(str(check) for check in checks(Path(folder).resolve()))


def checks(folder: Path) -> list[Check]:
    """All checks, in the order in which they are shown."""
    return [
        check_python(sys.version_info[:2], platform.python_version()),
        check_torch(torch.__version__, torch.version.cuda),
        check_torchaudio(_version("torchaudio"), torch.__version__),
        check_triton(_version("triton"), platform.system()),
        check_devices(_gpus()),
        check_cores(_cores(), os.cpu_count() or 1),
        check_memory(_memory()),
        check_disk(shutil.disk_usage(folder).free, folder),
        check_shared_memory(_shared_memory()),
        check_temporary(Path(tempfile.gettempdir()), folder),
        check_soundfile(soundfile.__version__, soundfile.__libsndfile_version__),
        check_film(_version("av")),
        Check("node", "not needed: pages and reports are plain HTML"),
    ]


def check_python(version: tuple[int, ...], full: str) -> Check:
    """3.11 and 3.12 are what the library is tested with."""
    fits = (3, 11) <= version < (3, 13)
    return Check("python", full, "" if fits else "use Python 3.11 or 3.12, which are tested")


def check_torch(version: str, cuda: str | None) -> Check:
    """The version, and what it was built for."""
    built = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    fits = version.startswith("2.11.")
    return Check("torch", f"{version}, {built}", "" if fits else "install torch>=2.11,<2.12")


def check_torchaudio(version: str | None, torch_version: str) -> Check:
    """torch and torchaudio move in lock-step."""
    wanted = ".".join(torch_version.split(".")[:2])
    if version is None:
        return Check("torchaudio", "missing", f"install torchaudio {wanted}")
    fits = version.startswith(f"{wanted}.")
    advice = "" if fits else f"it does not fit torch {torch_version}: install torchaudio {wanted}"
    return Check("torchaudio", version, advice)


def check_triton(version: str | None, system: str) -> Check:
    """Triton runs on Linux alone; elsewhere the torch reference of every kernel does the work."""
    if version is not None:
        return Check("triton", version)
    if system != "Linux":
        return Check("triton", f"none for {system}: kernels run their torch reference")
    return Check("triton", "missing", "GPUs would run the slow reference: install triton>=3.6,<3.7")


def check_devices(gpus: list[tuple[str, int]]) -> Check:
    """GPUs as (name, bytes of memory)."""
    if not gpus:
        return Check("devices", "CPU only: kernels run their torch reference")
    return Check("devices", ", ".join(f"{name} ({_gb(memory)})" for name, memory in gpus))


def check_cores(usable: int, present: int) -> Check:
    """Cores that this process may use, of those that the machine has."""
    of = "" if usable == present else f" of {present}"
    if usable > 1:
        return Check("cores", f"{usable}{of}")
    return Check("cores", f"{usable}{of}", "training and loading share it: use num_workers 0")


def check_memory(size: int) -> Check:
    """Bytes that this process may use."""
    few = size < MIN_MEMORY
    return Check("memory", _gb(size), "lower batch_size and num_workers" if few else "")


def check_disk(free: int, folder: Path) -> Check:
    """Bytes free where runs are written."""
    few = free < MIN_DISK
    advice = "shards and checkpoints may not fit: write to another disk with --out" if few else ""
    return Check("disk", f"{_gb(free)} free in {folder}", advice)


def check_shared_memory(size: int | None) -> Check:
    """Loader workers hand batches over through /dev/shm; None: this system has no such folder."""
    if size is None:
        return Check("/dev/shm", "none on this system")
    few = size < MIN_SHARED
    advice = "start the container with a larger one (--shm-size 8g), or use num_workers 0"
    return Check("/dev/shm", _gb(size), advice if few else "")


def check_temporary(temporary: Path, folder: Path) -> Check:
    """Moving a file between file systems is a copy, and a killed copy leaves half a file."""
    if temporary.stat().st_dev == folder.stat().st_dev:
        return Check("TMPDIR", f"{temporary}, on the file system of {folder}")
    return Check(
        "TMPDIR",
        f"{temporary} is on another file system than {folder}",
        "unimm writes beside its targets; for other tools set TMPDIR to a folder on that disk",
    )


def check_soundfile(version: str, library: str) -> Check:
    """MP3 needs libsndfile 1.1."""
    parts = tuple(int(part) for part in library.split(".")[:2])
    advice = "" if parts >= (1, 1) else "it reads no MP3: install soundfile>=0.13"
    return Check("soundfile", f"{version}, libsndfile {library}", advice)


def check_film(version: str | None) -> Check:
    """PyAV reads films; GIFs need nothing."""
    if version is not None:
        return Check("PyAV", version)
    return Check("PyAV", "missing", "needed for .mp4 and .webm alone: pip install 'unimm[video]'")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[tuple[str, int]]:
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(found.name, found.total_memory) for found in properties]


def _cores() -> int:
    """Cores of this process: its affinity, and a container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _CGROUP / "cpu.max"
    if quota.is_file():
        share, period = quota.read_text().split()
        if share != "max":
            usable = min(usable, max(1, int(share) // int(period)))
    return usable


def _memory() -> int:
    """Bytes of the machine, or of the container where that is less."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in (_CGROUP / "memory.max", _CGROUP / "memory" / "memory.limit_in_bytes"):
        if limit.is_file() and limit.read_text().strip() != "max":
            size = min(size, int(limit.read_text()))
    return size


def _shared_memory() -> int | None:
    place = Path("/dev/shm")
    return shutil.disk_usage(place).total if place.is_dir() else None


def _gb(count: int) -> str:
    return f"{count / GB:.3g} GB"
