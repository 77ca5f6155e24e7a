import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from unimm.cli import main
from unimm.data.engines import KILLED, Part, device_of
from unimm.data.manifest import Manifest
from unimm.data.progress import Tally
from unimm.data.templates import Template
from unimm.data.tokenize import Progress
from unimm.data.tokenize_many import RunConfig, tokenize_shards
from unimm.tokenizer import UnifiedTokenizer

TEMPLATES = [Template(["{txt}", "{png}"])]


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}, (1, 3)),
        # a batch script that runs once, in a job of four tasks
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),
        # torchrun's numbers go before those of the srun that started it
        (
            {"RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
            (5, 8),
        ),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "10"}, (7, 10)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "14",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_ARRAY_TASK_COUNT": "5",
                "RANK": "1",
                "WORLD_SIZE": "3",
            },
            (7, 15),
        ),
    ],
)
def test_parts_come_from_the_launcher(environment: dict[str, str], part: tuple[int, int]) -> None:
    assert Part.of(environment) == Part(*part)


def test_a_rank_outside_its_world_is_refused() -> None:
    with pytest.raises(ValueError, match="RANK=4 of WORLD_SIZE=4: out of range"):
        Part.of({"RANK": "4", "WORLD_SIZE": "4"})


def test_ranks_share_the_shards_and_make_the_same_bytes(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make.raw(5, 2)
    tokenize_shards(raw, tmp_path / "one", tokenizer, TEMPLATES, progress=False)
    made = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        summary = tokenize_shards(raw, tmp_path / "three", tokenizer, TEMPLATES, progress=False)
        made.append(summary.written)
        assert f"{summary.others} shards are other processes' own" in str(summary)
        assert summary.others == 5 - len(summary.written)
    assert made == [
        ["raw-000.tar", "raw-003.tar"],
        ["raw-001.tar", "raw-004.tar"],
        ["raw-002.tar"],
    ]
    one, three = (
        {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}
        for out in ("one", "three")
    )
    assert one == three


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [device_of("cuda", n) for n in range(6)] == [f"cuda:{n % 4}" for n in range(6)]
    assert device_of("cuda:2", 5) == "cuda:2"
    assert device_of("cpu", 5) == "cpu"


@pytest.mark.slow
def test_a_killed_process_is_an_outcome(make: Any, bundle: Path, tmp_path: Path) -> None:
    raw, out = make.raw(4, 200), tmp_path / "out"
    killed: list[int] = []

    def kill() -> None:
        """The first child process, once it has begun a shard."""
        while not killed:
            begun = [path.name for path in out.glob(".raw-*.tmp")] if out.exists() else []
            for name in begun:
                killed.append(int(name.split(".")[-2]))
                os.kill(killed[-1], signal.SIGKILL)
                return
            time.sleep(0.01)

    threading.Thread(target=kill, daemon=True).start()
    run = RunConfig(workers=2)
    first = tokenize_shards(raw, out, bundle, TEMPLATES, run=run, progress=False)
    assert set(first.failed.values()) == {KILLED}
    again = tokenize_shards(raw, out, bundle, TEMPLATES, progress=False)
    assert again.failed == {}
    assert len(again.written) + len(again.kept) == 4
    assert not list((out / "failed").iterdir())
    for path in out.glob("*.tar"):
        Manifest.read(path).check(path, verify=True)


def test_the_bar_tells_rates_and_failures() -> None:
    tally = Tally(4, started=100.0)
    tally.part("a", Progress(5, 10, 5, {"text": 50}))
    assert tally.completed == 0.5
    tally.part("b", Progress(10, 20, 10, {"image": 200}))
    tally.end("a", Progress(40, 40, 40, {"text": 100}))  # four documents of each sample
    tally.part("a", Progress(9, 10, 9, {"text": 90}))  # comes late: not counted twice
    tally.end("c", None)
    assert tally.completed == 2.5
    assert tally.note(110.0) == "2 samples/s, 10 text/s, 20 image/s, 1 failed"


def test_a_run_that_can_not_be_is_refused() -> None:
    with pytest.raises(ValueError, match="workers must be 1 or more"):
        RunConfig(workers=0)
    with pytest.raises(ValueError, match="max_failed must be 0 or more"):
        RunConfig(max_failed=-1)


def test_the_command_takes_the_options_of_a_run(
    make: Any, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make.raw(4, 2)
    for number in (1, 2):
        os.truncate(raw / f"raw-00{number}.tar", 700)
    given = ["tokenize", str(raw), "--tokenizer", str(bundle), "--out", str(tmp_path / "out")]
    options = ["--max-failed", "0", "--batch-size", "1", "--decoders", "0", "--max-skipped", "0.5"]
    assert main([*given, *options]) == 1
    printed = capsys.readouterr()
    assert "1 shards written, 0 kept, 1 failed" in printed.out
    assert "2 shards left open: too many failed" in printed.out
    assert "unimm: error: raw-001.tar: " in printed.err
    assert main([*given, "--max-failed", "-1"]) == 1
    assert "max_failed must be 0 or more" in capsys.readouterr().err
    assert main(["tokenize", "pipe:cat a.tar", *given[2:]]) == 1
    assert "commands are not run unless they are allowed" in capsys.readouterr().err
