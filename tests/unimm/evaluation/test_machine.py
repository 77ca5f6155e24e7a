"""What `unimm doctor` finds, and when it warns."""

from pathlib import Path

import pytest

from unimm.evaluation import machine
from unimm.evaluation.machine import Check, checks, doctor

NAMES = [
    "python",
    "torch",
    "torchaudio",
    "triton",
    "devices",
    "cores",
    "memory",
    "disk",
    "/dev/shm",
    "TMPDIR",
    "soundfile",
    "PyAV",
    "node",
]


def test_this_machine_is_described_line_by_line(tmp_path: Path) -> None:
    before = list(tmp_path.iterdir())
    lines = doctor(tmp_path).splitlines()
    assert [line[6:18].strip() for line in lines] == NAMES
    assert {line[:4].strip() for line in lines} <= {"ok", "warn"}
    assert list(tmp_path.iterdir()) == before
    found = {check.name: check for check in checks(tmp_path)}
    assert found["python"].advice == ""
    assert "not needed" in found["node"].found


def test_a_line_says_what_to_do_only_where_something_is_wrong() -> None:
    assert str(Check("memory", "8 GB")) == "ok    memory        8 GB"
    assert str(Check("memory", "1 GB", "buy")) == "warn  memory        1 GB; buy"


@pytest.mark.parametrize(
    ("good", "bad", "advice"),
    [
        (
            machine.check_python((3, 12), "3.12.1"),
            machine.check_python((3, 13), "3.13.0"),
            "use Python 3.11 or 3.12",
        ),
        (
            machine.check_torch("2.11.0+cpu", None),
            machine.check_torch("2.12.0", "13.0"),
            "torch>=2.11,<2.12",
        ),
        (
            machine.check_torchaudio("2.11.0", "2.11.1+cu130"),
            machine.check_torchaudio("2.10.0", "2.11.0"),
            "does not fit torch 2.11.0",
        ),
        (
            machine.check_torchaudio("2.11.0", "2.11.0"),
            machine.check_torchaudio(None, "2.11.0"),
            "install torchaudio 2.11",
        ),
        (
            machine.check_triton(None, "Darwin"),
            machine.check_triton(None, "Linux"),
            "install triton",
        ),
        (machine.check_cores(2, 64), machine.check_cores(1, 64), "num_workers 0"),
        (machine.check_memory(8 * 10**9), machine.check_memory(2 * 10**9), "lower batch_size"),
        (
            machine.check_disk(10**11, Path("/runs")),
            machine.check_disk(10**9, Path("/runs")),
            "another disk",
        ),
        (
            machine.check_shared_memory(8 * 10**9),
            machine.check_shared_memory(64 * 2**20),
            "--shm-size",
        ),
        (
            machine.check_soundfile("0.14.0", "1.2.2"),
            machine.check_soundfile("0.11.0", "1.0.31"),
            "reads no MP3",
        ),
        (machine.check_film("18.1.0"), machine.check_film(None), "pip install 'unimm[video]'"),
    ],
)
def test_each_check_warns_when_it_should(good: Check, bad: Check, advice: str) -> None:
    assert good.advice == ""
    assert advice in bad.advice
    assert good.name == bad.name


def test_devices_are_named_with_their_memory() -> None:
    assert machine.check_devices([("H200", 139 * 10**9)]).found == "H200 (139 GB)"
    assert machine.check_devices([]).found.startswith("CPU only")


def test_a_system_without_shared_memory_is_fine() -> None:
    assert machine.check_shared_memory(None) == Check("/dev/shm", "none on this system")


def test_another_file_system_for_temporary_files_is_told(tmp_path: Path) -> None:
    assert machine.check_temporary(tmp_path, tmp_path / "..").advice == ""
    other = machine.check_temporary(Path("/proc"), tmp_path)
    assert "another file system" in other.found
    assert "set TMPDIR" in other.advice
