"""What watches a run: spikes, speed, expected losses, samples in the log."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from unimm.model import ModelConfig, UnifiedLM, size_of
from unimm.training import ExpectedLosses, SpikeRewind, Throughput
from unimm.training.launch import launch
from unimm.training.samples import ShowSamples
from unimm.training.spikes import before
from unimm.training.stops import NonFinite
from unimm.training.throughput import PEAKS, peak_of

WriteRecipe = Callable[..., Path]
SAVING = {"class_path": "unimm.training.RunCheckpoints", "init_args": {"every": 4, "keep": 9}}


def spikes(**options: Any) -> dict[str, Any]:
    given = {"window": 4, "patience": 2, **options}
    return {"class_path": "unimm.training.SpikeRewind", "init_args": given}


def leap(*steps: int) -> dict[str, Any]:
    return {"class_path": "faults.Leap", "init_args": {"steps": list(steps)}}


# Spikes


def test_a_spike_takes_the_weights_back_and_not_the_data(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe, losses: Any
) -> None:
    changes = {"trainer.max_steps": 16, "trainer.val_check_interval": 100}
    callbacks = [leap(10), SAVING, spikes()]
    cli = launch(
        ["-c", str(write_recipe(language_recipe, **changes, **{"trainer.callbacks": callbacks}))]
    )
    found = losses(Path(language_recipe["trainer"]["default_root_dir"]))
    values = {step: float(loss) for step, loss in found.items()}
    assert list(values) == list(range(1, 17))
    assert min(values[11], values[12]) > 1.2 * values[10]
    assert values[13] < values[8] + 0.1  # the weights of step 8 again
    watcher = next(c for c in cli.trainer.callbacks if isinstance(c, SpikeRewind))  # type: ignore[attr-defined]
    assert watcher.rewinds == 1
    assert cli.datamodule.consumed == 16 * 4


def test_a_spike_that_comes_back_ends_the_run(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    changes = {"trainer.max_steps": 30, "trainer.val_check_interval": 100}
    callbacks = [leap(10), SAVING, spikes(limit=0)]
    recipe = write_recipe(language_recipe, **changes, **{"trainer.callbacks": callbacks})
    with pytest.raises(NonFinite, match=r"step 12: the loss leapt to .* rewound 0 times"):
        launch(["-c", str(recipe)])


def test_a_spike_before_any_checkpoint_ends_the_run(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    callbacks = [leap(10), spikes()]
    changes = {"trainer.max_steps": 16, "trainer.val_check_interval": 100}
    recipe = write_recipe(language_recipe, **changes, **{"trainer.callbacks": callbacks})
    with pytest.raises(NonFinite, match="no checkpoint before it is whole"):
        launch(["-c", str(recipe)])


def test_noise_is_no_spike() -> None:
    watcher = SpikeRewind(window=50)
    chance = np.random.default_rng(0)
    for step in range(2000):
        loss = 4 - step / 1000 + chance.normal(0, 0.05)
        assert not watcher._is_above(loss)
        watcher._losses.append(loss)
    assert watcher._is_above(3.0)


def test_what_a_watcher_has_seen_is_kept() -> None:
    one, two = SpikeRewind(window=3), SpikeRewind(window=3)
    one._losses.extend([1.0, 2.0, 3.0])
    one.rewinds = 2
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert list(two._losses) == [1.0, 2.0, 3.0]
    assert two.rewinds == 2


def test_a_damaged_checkpoint_is_not_gone_back_to(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (3, 6, 9):
        torch.save({"global_step": step}, folder / f"step={step}.ckpt")
    (folder / "step=6.ckpt").write_bytes(b"cut")
    assert before(tmp_path, 9) == folder / "step=3.ckpt"
    assert before(tmp_path, 10) == folder / "step=9.ckpt"
    assert before(tmp_path, 3) is None


@pytest.mark.parametrize("options", [{"deviations": 0}, {"window": 0}, {"limit": -1}])
def test_impossible_spikes_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="spikes: deviations, window and patience"):
        SpikeRewind(**options)  # type: ignore[arg-type]


# Speed


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10G", 70.0),
    ],
)
def test_a_device_is_found_by_its_name(name: str, tflops: float) -> None:
    assert peak_of(name) == tflops * 1e12


def test_longer_names_stand_before_shorter_ones() -> None:
    names = list(PEAKS)
    for number, name in enumerate(names):
        assert not any(re.search(rf"\b{other}\b", name) for other in names[:number])
    assert peak_of("Some GPU of 2040") is peak_of("NVIDIA T400") is None


def test_speed_is_logged_and_is_that_of_the_clock(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that moves half a second per look: 2 steps of 4 rows of 128 ids between two."""
    clock = iter(range(1000))
    monkeypatch.setattr("unimm.training.throughput._now", lambda _: next(clock) / 2)
    watcher = {
        "class_path": "unimm.training.Throughput",
        "init_args": {"every": 2, "peak_tflops": 1},
    }
    changes = {"trainer.max_steps": 10, "trainer.callbacks": [watcher]}
    cli = launch(["-c", str(write_recipe(language_recipe, **changes))])
    rate = float(cli.trainer.callback_metrics["throughput/ids_per_second"])
    assert rate == 2 * 4 * 128 / 0.5
    lm: UnifiedLM = cli.model.lm
    expected = rate * size_of(lm.config).flops_per_token(128) / 1e12
    assert float(cli.trainer.callback_metrics["throughput/mfu"]) == pytest.approx(expected)


def test_impossible_speeds_are_refused() -> None:
    with pytest.raises(ValueError, match="every must be 1 or more"):
        Throughput(every=0)


# Expected losses


@pytest.mark.parametrize(("shift", "told"), [(0.0, None), (0.2, "step 5: the loss is")])
def test_a_run_is_compared_with_what_is_expected(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe, losses: Any, tmp_path: Path,
    shift: float, told: str | None,
) -> None:  # fmt: skip
    run = Path(language_recipe["trainer"]["default_root_dir"])
    launch(["-c", str(write_recipe(language_recipe))])
    found = losses(run)
    held = {"losses": {"1": float(found[1]), "5": float(found[5]) + shift}, "tolerance": 0.01}
    (tmp_path / "expected.json").write_text(json.dumps(held))
    watcher = {
        "class_path": "unimm.training.ExpectedLosses",
        "init_args": {"path": str(tmp_path / "expected.json")},
    }
    changes = {"trainer.callbacks": [watcher], "trainer.default_root_dir": str(tmp_path / "again")}
    recipe = write_recipe(language_recipe, **changes)
    if told is None:
        launch(["-c", str(recipe)])
        return
    with pytest.raises(ValueError, match=told):
        launch(["-c", str(recipe)])


@pytest.mark.parametrize("text", ["{}", "[]", '{"losses": {"a": 1}, "tolerance": 1}', "{"])
def test_a_file_of_something_else_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "expected.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"expected\.json"):
        ExpectedLosses(str(path))


# Samples


def test_samples_reach_the_logger(tmp_path: Path) -> None:
    folder = tmp_path / "samples" / "step=3" / "image"
    folder.mkdir(parents=True)
    picture = Image.new("L", (8, 6), 77)
    picture.save(folder / "1.png")
    picture.save(folder / "2.gif", save_all=True, append_images=[Image.new("L", (8, 6), 200)])
    soundfile.write(folder / "3.wav", np.zeros((800, 2)), 8000)
    (folder / "4.txt").write_text("seven")
    logger = TensorBoardLogger(tmp_path, name="logs", version="x")
    trainer: Any = SimpleNamespace(
        default_root_dir=str(tmp_path), global_step=3, is_global_zero=True, loggers=[logger]
    )
    ShowSamples().on_validation_end(trainer, None)  # type: ignore[arg-type]
    logger.experiment.flush()
    (events,) = (tmp_path / "logs/x").glob("events*")
    written = events.read_bytes()
    for tag in ("samples/image/1", "samples/image/2", "samples/image/3", "samples/image/4"):
        assert tag.encode() in written
    assert b"seven" in written


def test_a_small_shape_is_counted_for_speed() -> None:
    config = ModelConfig(vocab_size=64, d_model=32, num_layers=1, num_heads=2)
    lm = UnifiedLM(config)
    expected = 6 * lm.num_parameters + 12 * 32 * 128
    assert size_of(config).flops_per_token(128) == expected
