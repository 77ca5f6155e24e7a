"""A run that is killed, asked to leave, poisoned or out of disk: what it had is kept."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unimm.training.checkpoints import newest_checkpoint, read_checkpoint

WriteRecipe = Callable[..., Path]
Losses = Callable[[Path], dict[int, str]]
STEPS = 9
SHARDED = {"class_path": "unimm.training.ShardedStrategy", "init_args": {}}


@pytest.fixture
def make(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe, tmp_path: Path
) -> Callable[..., list[str]]:
    """Arguments of a run with dropout, a checkpoint every third step, and some fault."""

    def arguments(
        folder: str,
        world: int = 1,
        workers: int = 0,
        fault: Any = None,
        strategy: Any = "ddp",
        steps: int = STEPS,
    ) -> list[str]:
        saving = {
            "class_path": "unimm.training.RunCheckpoints",
            "init_args": {"every": 3, "keep": 2},
        }
        recipe = write_recipe(
            language_recipe,
            **{
                "model.init_args.model.dropout": 0.2,
                "data.init_args.batch_size": 4 // world,
                "data.init_args.num_workers": workers,
                "trainer.default_root_dir": str(tmp_path / folder),
                "trainer.devices": world,
                "trainer.strategy": strategy if world > 1 else "auto",
                "trainer.max_steps": steps,
                "trainer.val_check_interval": 100 * STEPS,
                "trainer.callbacks": [saving, *([fault] if fault else [])],
            },
        )
        return ["fit", "-c", str(recipe)]

    return arguments


def fault(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": f"faults.{name}", "init_args": options}


def final(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoints/final.ckpt", "cpu")["state_dict"]


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def killed_and_resumed(
    make: Callable[..., list[str]], ranks: Any, run: str, step: int, world: int, workers: int
) -> None:
    """Kill every process after a step, then give the same command again."""
    dying = make(run, world, workers, fault("Kill", step=step, ranks=list(range(world))))
    codes = ranks.run(world, *dying)
    # A process that is still in the step when another one dies may end with a lost connection.
    assert -signal.SIGKILL in codes, ranks.log()
    assert 0 not in codes, ranks.log()
    assert ranks.run(world, *make(run, world, workers)) == [0] * world, ranks.log()


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0)])
def test_a_killed_run_goes_on_bit_by_bit(
    make: Callable[..., list[str]], ranks: Any, losses: Losses, tmp_path: Path, world: int,
    workers: int,
) -> None:  # fmt: skip
    assert ranks.run(world, *make("whole", world, workers)) == [0] * world, ranks.log()
    killed_and_resumed(make, ranks, "killed", 5, world, workers)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert same(final(tmp_path / "killed"), final(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_at_any_step_goes_on_bit_by_bit(
    make: Callable[..., list[str]], ranks: Any, losses: Losses, tmp_path: Path, world: int,
    workers: int,
) -> None:  # fmt: skip
    assert ranks.run(world, *make("whole", world, workers)) == [0] * world, ranks.log()
    for step in range(1, STEPS):
        killed_and_resumed(make, ranks, f"at-{step}", step, world, workers)
        # A step of the run that died is in no log before its next checkpoint or hundredth row.
        kept = losses(tmp_path / f"at-{step}")
        assert kept == losses(tmp_path / "whole")
        assert same(final(tmp_path / f"at-{step}"), final(tmp_path / "whole"))


SCENARIOS = {
    "both at once": {"ranks": [0, 1], "number": int(signal.SIGTERM)},
    "the first alone": {"ranks": [0], "number": int(signal.SIGTERM)},
    "the second alone": {"ranks": [1], "number": int(signal.SIGTERM)},
    "the first first": {"ranks": [0, 1], "number": int(signal.SIGTERM), "apart": 0.3},
    "the second first": {"ranks": [1, 0], "number": int(signal.SIGTERM), "apart": 0.3},
    "SLURM's warning": {"ranks": [1], "number": int(signal.SIGUSR1)},
}


def preempted(
    make: Callable[..., list[str]], ranks: Any, run: Path, scenario: str, strategy: Any
) -> None:
    """Exit code 75 within two steps, with a checkpoint of the step that it names."""
    given = make(run.name, 2, 0, fault("Signal", step=4, **SCENARIOS[scenario]), strategy)
    assert ranks.run(2, *given) == [75, 75], ranks.log()
    assert "asked to leave at step" in ranks.log()
    path = newest_checkpoint(run)
    assert path is not None
    assert read_checkpoint(path)["global_step"] in (4, 5)


@pytest.mark.parametrize("scenario", ["the second alone", "the first first"])
def test_a_preempted_run_leaves_a_checkpoint(
    make: Callable[..., list[str]], ranks: Any, tmp_path: Path, scenario: str
) -> None:
    preempted(make, ranks, tmp_path / "run", scenario, "ddp")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy", ["ddp", SHARDED], ids=["ddp", "sharded"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_whoever_is_signalled_no_process_hangs(
    make: Callable[..., list[str]], ranks: Any, tmp_path: Path, scenario: str, strategy: Any
) -> None:
    for attempt in range(2):  # 6 scenarios x 2 strategies x 2: 24 runs
        preempted(make, ranks, tmp_path / f"run-{attempt}", scenario, strategy)


def test_a_preempted_run_goes_on_as_if_nothing_had_been(
    make: Callable[..., list[str]], ranks: Any, losses: Losses, tmp_path: Path
) -> None:
    assert ranks.run(1, *make("whole")) == [0], ranks.log()
    asked = fault("Signal", step=4, ranks=[0], number=int(signal.SIGTERM))
    assert ranks.run(1, *make("asked", fault=asked)) == [75], ranks.log()
    assert ranks.run(1, *make("asked")) == [0], ranks.log()
    assert losses(tmp_path / "asked") == losses(tmp_path / "whole")
    assert same(final(tmp_path / "asked"), final(tmp_path / "whole"))


@pytest.mark.parametrize("strategy", ["ddp", SHARDED], ids=["ddp", "sharded"])
def test_a_poisoned_step_is_skipped_by_all(
    make: Callable[..., list[str]], ranks: Any, losses: Losses, tmp_path: Path, strategy: Any
) -> None:
    given = make("run", 2, 0, fault("Poison", steps=[2, 5, 6], rank=1), strategy)
    assert ranks.run(2, *given) == [0, 0], ranks.log()
    found = losses(tmp_path / "run")
    assert [step for step, loss in found.items() if loss == "nan"] == [2, 5, 6]
    assert ranks.log(0).count("skipped: its gradient is not finite") == 3
    assert ranks.log(1).count("skipped: its gradient is not finite") == 3
    if strategy == "ddp":
        assert all(weight.isfinite().all() for weight in final(tmp_path / "run").values())


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_stays_poisoned_no_longer_than_three_steps(
    make: Callable[..., list[str]], ranks: Any, tmp_path: Path, world: int
) -> None:
    given = make("run", world, 0, fault("Poison", steps=[4, 5, 6, 7, 8], rank=world - 1))
    assert ranks.run(world, *given) == [76] * world, ranks.log()
    assert "step 6: the gradient was not finite 3 steps in a row" in ranks.log()
    path = newest_checkpoint(tmp_path / "run")
    assert path is not None
    stored = read_checkpoint(path, "cpu")
    assert stored["global_step"] == 3
    assert all(weight.isfinite().all() for weight in stored["state_dict"].values())


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_checkpoint_that_is_being_written_is_never_read_half(
    tmp_path: Path, ranks: Any, kills: int
) -> None:
    """SIGKILL of a process that writes without end, its TMPDIR on another file system."""
    other = Path("/dev/shm")
    temporary = str(other if other.is_dir() else tmp_path)
    path = tmp_path / "checkpoints" / "step=1.ckpt"
    chance = random.Random(0)
    for _ in range(kills):
        with ranks.writing(str(path), temporary) as writer:
            time.sleep(chance.uniform(0, 0.1))
            writer.kill()
            writer.join()
        assert read_checkpoint(path, "cpu")["w"].shape == (3_000_000,)
        left = [file for file in path.parent.iterdir() if file != path]
        assert len(left) <= 1, "what a killed writer leaves is swept by the next one"
