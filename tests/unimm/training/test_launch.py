"""Recipes: what is refused, where a run is kept, and how it goes on."""

import csv
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unimm import load_codec
from unimm.training.launch import AtomicCheckpointIO, launch, newest_checkpoint, read_checkpoint

WriteRecipe = Callable[..., Path]
WRONG = [
    ("trainer.max_step", 3, "unknown key 'trainer.max_step' (did you mean 'max_steps'?)"),
    ("modle", {"a": 1}, "unknown key 'modle.a' (did you mean 'model'?)"),
    ("model.init_args.optimiser", {"warmup": 1}, "(did you mean 'optimizer'?)"),
    (
        "model.init_args.optimizer.learning_rat",
        1e-3,
        "unknown key 'learning_rat' (did you mean 'learning_rate'?)",
    ),
    ("model.init_args.codec.init_args.config.chanels", 8, "(did you mean 'channels'?)"),
    ("data.init_args.config.sise", 32, "unknown key 'sise' (did you mean 'size'?)"),
    ("data.init_args.batchsize", 8, "(did you mean 'batch_size'?)"),
    (
        "model.init_args.optimizer.learning_rate",
        "fast",
        "model.optimizer.learning_rate: Expected a <class 'float'>. Got value: fast",
    ),
    ("model.class_path", "unimm.training.CodecTas", "has no attribute 'CodecTas'"),
    ("model.init_args.codec", None, "model: the following arguments are required: codec"),
    ("model.init_args.codec.init_args.config.time_downsample", 3, "time_downsample must be 1, 2"),
    ("data.init_args.batch_size", 0, "batch_size must be at least 1"),
    ("data.init_args.config.modality", "imag", "data.config.modality: Expected a typing.Literal"),
    ("trainer.max_steps", None, "trainer.max_steps: give the number of steps"),
    (
        "trainer.callbacks",
        [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}],
        "Trainer was configured with `enable_checkpointing=False`",
    ),
]


def steps(run: Path) -> list[int]:
    """Steps whose training loss is in a run's CSV log."""
    with (run / "logs/metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint that is no training's."""
    path = tmp_path_factory.mktemp("whole") / "whole.ckpt"
    torch.save({"global_step": 7, "state_dict": {"w": torch.arange(5000.0)}}, path)
    return path


@pytest.mark.parametrize(("key", "value", "told"), WRONG)
def test_a_wrong_recipe_is_one_line_that_names_it(
    image_recipe: dict[str, Any],
    write_recipe: WriteRecipe,
    key: str,
    value: object,
    told: str,
) -> None:
    recipe = write_recipe(image_recipe, **{key: value})
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        launch(["-c", str(recipe)])
    message = str(caught.value)
    assert "\n" not in message
    assert str(recipe) in message or message.startswith("trainer.max_steps")
    assert not Path(image_recipe["trainer"]["default_root_dir"], "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--trainer.max_stepp", "3"], "'trainer.max_stepp' (did you mean 'max_steps'?)"),
        (["--model.init_args.optimizer.warmp", "3"], "'warmp' (did you mean 'warmup'?)"),
        (["--nothing.like.it", "3"], "unknown key 'nothing.like.it'"),
        (["-c", "nowhere.yaml"], "nowhere.yaml: config: File does not exist"),
    ],
)
def test_a_wrong_override_is_named(
    image_recipe: dict[str, Any], write_recipe: WriteRecipe, arguments: list[str], told: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        launch(["-c", str(write_recipe(image_recipe)), *arguments])


def test_a_recipe_that_is_not_yaml_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text("model: [1")
    with pytest.raises(ValueError, match=r"broken\.yaml: Problems parsing config"):
        launch(["-c", str(recipe)])


def test_missing_shards_are_all_listed_before_any_step(
    image_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    changes = {"data.init_args.shards": "/nowhere/raw-{000..002}.tar"}
    with pytest.raises(ValueError, match=r"3 missing shards: .*000.tar, .*001.tar, .*002.tar"):
        launch(["-c", str(write_recipe(image_recipe, **changes))])


def test_a_run_goes_on_at_the_right_step(
    image_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    run = Path(image_recipe["trainer"]["default_root_dir"])
    recipe = str(write_recipe(image_recipe))
    assert launch(["-c", recipe]).trainer.global_step == 6
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    first = read_checkpoint(run / "checkpoints/final.ckpt")
    assert first["global_step"] == 6
    assert first["SignalDataModule"]["consumed"] == 6
    assert (run / "logs/config.yaml").is_file()

    with (run / "logs/metrics.csv").open("a") as file:
        file.write("9" + "," * 40 + "\n")  # of a run that was killed before it could keep it
    assert launch(["-c", recipe, "--trainer.max_steps", "12"]).trainer.global_step == 12
    assert steps(run) == list(range(1, 13))
    second = read_checkpoint(run / "checkpoints/final.ckpt")
    assert second["global_step"] == 12
    assert second["SignalDataModule"]["consumed"] == 12

    assert launch(["-c", recipe, "--trainer.max_steps", "12"]).trainer.global_step == 12
    assert steps(run) == list(range(1, 13))


def test_a_trained_codec_is_trained_further(
    audio_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    codec = {"class_path": "unimm.load_codec", "init_args": {"name_or_path": "dialpad/audio"}}
    steady = {"learning_rate": 0.0, "decay": 0.0}
    recipe = write_recipe(
        audio_recipe,
        **{
            "model.init_args.codec": codec,
            "model.init_args.optimizer": steady,
            "trainer.max_steps": 1,
        },
    )
    trained = launch(["-c", str(recipe)]).model.codec
    before = load_codec("dialpad/audio")
    assert trained.config == before.config
    for name, parameter in before.named_parameters():
        assert torch.equal(trained.get_parameter(name), parameter)


def test_a_resumed_run_equals_one_that_was_not_stopped(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe = str(write_recipe(language_recipe))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for run, ends in ((whole, [8]), (stopped, [3, 8])):
        for end in ends:
            changes = {"default_root_dir": run, "max_steps": end, "val_check_interval": 100}
            flags = [f"--trainer.{name}={value}" for name, value in changes.items()]
            launch(["-c", recipe, *flags])
    one, two = (
        read_checkpoint(run / "checkpoints/final.ckpt", "cpu")["state_dict"]
        for run in (whole, stopped)
    )
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_a_checkpoint_of_another_model_is_refused(
    image_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    launch(["-c", str(write_recipe(image_recipe, **{"trainer.max_steps": 1}))])
    wider = {"model.init_args.codec.init_args.config.channels": 16}
    expected = (
        r"final.ckpt: a checkpoint of another model: codec.encoder.1.weight is \(8, 48, 3, 3\) "
        r"there and \(16, 48, 3, 3\) here, \d+ differ in all"
    )
    with pytest.raises(ValueError, match=expected):
        launch(["-c", str(write_recipe(image_recipe, **wider))])


def test_validate_reads_a_checkpoint_and_trains_nothing(
    image_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    recipe = str(write_recipe(image_recipe, **{"trainer.max_steps": 1}))
    launch(["-c", recipe])
    path = Path(image_recipe["trainer"]["default_root_dir"], "checkpoints/final.ckpt")
    before = path.read_bytes()
    cli = launch(["-c", recipe, "--ckpt_path", str(path)], subcommand="validate")
    assert cli.trainer.callback_metrics["val/image/psnr"] > 0
    assert cli.trainer.global_step == 0
    assert path.read_bytes() == before


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "a changed byte":
        data[len(data) // 2] ^= 1
    elif kind == "cut":
        del data[len(data) // 2 :]
    elif kind == "empty":
        data.clear()
    else:
        data[:] = b"\x80\x04no checkpoint"
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["a changed byte", "cut", "empty", "something else"])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    tmp_path: Path, checkpoint: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for number, name in enumerate(("older", "newer", "newest")):
        shutil.copy(checkpoint, folder / f"{name}.ckpt")
        times = (1e9 + number, 1e9 + number)
        os.utime(folder / f"{name}.ckpt", times)
    assert newest_checkpoint(tmp_path) == folder / "newest.ckpt"
    damage(folder / "newest.ckpt", kind)
    os.utime(folder / "newest.ckpt", (2e9, 2e9))
    with caplog.at_level(logging.WARNING, "unimm"):
        assert newest_checkpoint(tmp_path) == folder / "newer.ckpt"
    assert "newest.ckpt" in caplog.text
    with pytest.raises(ValueError, match=r"newest\.ckpt: damaged"):
        read_checkpoint(folder / "newest.ckpt")


def test_without_a_whole_checkpoint_there_is_none(tmp_path: Path, checkpoint: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    shutil.copy(checkpoint, folder / "final.ckpt")
    damage(folder / "final.ckpt", "cut")
    assert newest_checkpoint(tmp_path) is None


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "code.ckpt"
    torch.save({"global_step": 1, "callback": print}, path)
    with pytest.raises(ValueError, match=r"code.ckpt: no checkpoint that can be read safely"):
        read_checkpoint(path)


def test_checkpoints_are_whole_or_absent(tmp_path: Path, checkpoint: Path) -> None:
    path = tmp_path / "run" / "step=1.ckpt"
    writer = AtomicCheckpointIO()
    with pytest.raises(AttributeError):
        writer.save_checkpoint({"w": torch.zeros(3), "broken": lambda: 0}, path)
    assert list(path.parent.iterdir()) == []
    stored = read_checkpoint(checkpoint, "cpu")
    writer.save_checkpoint(stored, path)
    assert [file.name for file in path.parent.iterdir()] == ["step=1.ckpt"]
    assert torch.equal(writer.load_checkpoint(path)["state_dict"]["w"], stored["state_dict"]["w"])
