"""A codec is really trained: what moves, what is logged, what is written while it runs."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from unimm.training import CodecTask, OptimizerConfig
from unimm.training.adversary import Adversary
from unimm.training.launch import launch
from unimm_tokenizers.discriminators import PatchDiscriminator
from unimm_tokenizers.losses import PictureObjective
from unimm_tokenizers.vision import VisionCodec, VisionConfig

WriteRecipe = Callable[..., Path]
SMALL = {"num_channels": 3, "channels": 4}
ADVERSARY = {
    "discriminators": [
        {"class_path": f"unimm_tokenizers.discriminators.{name}", "init_args": SMALL}
        for name in ("PatchDiscriminator", "MotionDiscriminator")
    ],
}


def metrics(run: Path) -> list[dict[str, float]]:
    """Rows of a run's CSV log, without the empty fields."""
    with (run / "logs/metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def tiny_codec() -> VisionCodec:
    config = VisionConfig(
        channels=8, multipliers=(1, 2), patch=4, latent_channels=8, fsq_levels=(4, 4)
    )
    return VisionCodec(config)


def whole(batches: list[dict[str, Tensor]]) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def train(task: CodecTask, batches: list[dict[str, Tensor]], folder: Path) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=len(batches),
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(task, whole(batches), whole(batches[:1]))
    return trainer


def pictures(number: int = 4) -> Tensor:
    return torch.rand(number, 3, 32, 32) * 2 - 1


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_pictures_and_films_are_learned_by_turns(
    image_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    recipe = write_recipe(
        image_recipe, **{"trainer.max_steps": 40, "trainer.val_check_interval": 40}
    )
    cli = launch(["-c", str(recipe)])
    assert cli.trainer.global_step == 40
    rows = metrics(Path(image_recipe["trainer"]["default_root_dir"]))
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 40
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    # Lightning repeats the last value of what a step does not log: films come every fourth step.
    films = [row.get("train/video/l1") for row in rows[:40]]
    assert films[:3] == [None, None, None]
    assert [films[i] != films[i - 1] for i in range(4, 40)] == [i % 4 == 3 for i in range(4, 40)]
    last = rows[-1]
    assert last["step"] == 40
    assert last["val/image/psnr"] > 5
    assert 0 < last["val/image/usage"] <= 1


def test_sounds_are_learned_and_reconstructions_are_written(
    audio_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    shown = [{"class_path": "unimm.training.WriteReconstructions", "init_args": {"count": 2}}]
    launch(["-c", str(write_recipe(audio_recipe, **{"trainer.callbacks": shown}))])
    run = Path(audio_recipe["trainer"]["default_root_dir"])
    rows = metrics(run)
    assert {"train/audio/l1", "train/audio/perplexity", "train/gradient_norm"} <= rows[0].keys()
    assert rows[-1].keys() >= {"val/audio/l1", "val/audio/psnr", "val/audio/usage"}
    written = sorted(path.name for path in (run / "samples/step=6").iterdir())
    names = [f"{n}-{kind}.wav" for n in (0, 1) for kind in ("original", "reconstruction")]
    assert written == names
    for name in names:
        samples, rate = soundfile.read(run / "samples/step=6" / name)
        assert (rate, samples.shape) == (8000, (3200,))


def test_a_teacher_and_feature_matching_are_named_in_a_recipe(
    audio_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    teacher = {"class_path": "torch.nn.AvgPool1d", "init_args": {"kernel_size": 80}}
    scorer = {"class_path": "unimm_tokenizers.discriminators.PatchDiscriminator"}
    changes = {
        "model.init_args.distillation": {
            "class_path": "unimm_tokenizers.losses.SemanticDistillation",
            "init_args": {"teacher": teacher, "teacher_channels": 1, "latent_channels": 64},
        },
        "model.init_args.adversary": {
            "discriminators": [{**scorer, "init_args": {"num_channels": 1, "channels": 4}}],
            "matching": 2.0,
        },
    }
    launch(["-c", str(write_recipe(audio_recipe, **changes))])
    rows = metrics(Path(audio_recipe["trainer"]["default_root_dir"]))
    assert {"train/audio/distillation", "train/adversarial"} <= rows[0].keys()
    assert rows[0]["train/audio/distillation"] > 0


def test_reconstructed_pictures_stand_below_the_originals(
    image_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    shown = [{"class_path": "unimm.training.WriteReconstructions", "init_args": {"count": 3}}]
    changes = {
        "trainer.callbacks": shown,
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
    }
    launch(["-c", str(write_recipe(image_recipe, **changes))])
    folder = Path(image_recipe["trainer"]["default_root_dir"], "samples/step=1")
    with Image.open(folder / "image.png") as sheet:
        assert sheet.size == (3 * 32, 2 * 32)


def test_an_adversary_trains_beside_and_steps_count_batches(
    image_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    changes = {
        "model.init_args.adversary": {**ADVERSARY, "start": 3, "r1": 1.0, "r1_every": 2},
        "model.init_args.optimizer.matrices": "muon",
    }
    cli = launch(["-c", str(write_recipe(image_recipe, **changes))])
    assert cli.trainer.global_step == 6
    rows = [
        row
        for row in metrics(Path(image_recipe["trainer"]["default_root_dir"]))
        if "train/loss" in row
    ]
    assert all("train/discriminator/hinge" in row for row in rows)
    assert all("train/discriminator/lecam" in row for row in rows)
    assert next(row["step"] for row in rows if "train/discriminator/r1" in row) == 1
    assert [row["step"] for row in rows if "train/adversarial" in row] == [4, 5, 6]


def test_codec_and_adversary_both_move(tmp_path: Path) -> None:
    task = CodecTask(
        tiny_codec(), PictureObjective(), adversary=Adversary([PatchDiscriminator(3, channels=4)])
    )
    before = {name: value.detach().clone() for name, value in task.named_parameters()}
    train(task, [{"image": pictures()} for _ in range(3)], tmp_path)
    assert not [n for n, value in task.named_parameters() if torch.equal(value, before[n])]


def test_the_average_is_validated_and_exported(tmp_path: Path) -> None:
    """The codec trains on with its own weights, and what is written is the average."""
    seen: list[Tensor] = []

    class Looking(CodecTask):
        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            seen.append(next(self.codec.parameters()).detach().clone())
            super().validation_step(batch, batch_idx)

    task = Looking(tiny_codec(), PictureObjective(), average=0.9)
    trainer = train(task, [{"image": pictures()} for _ in range(4)], tmp_path)
    assert task.average is not None
    name, own = next(iter(task.codec.named_parameters()))
    average = task.average.weights[name]
    assert not torch.equal(own, average)
    assert torch.equal(seen[-1], average)
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)
    assert torch.equal(stored["unimm"]["weights"][name], average)
    assert torch.equal(stored["state_dict"][f"codec.{name}"], own)


def test_codes_are_counted_over_the_whole_validation(tmp_path: Path) -> None:
    """Batches of one picture each, of one code each: together they use more codes than one."""
    codec = VisionCodec(
        VisionConfig(channels=8, multipliers=(1,), patch=16, latent_channels=2, fsq_levels=(8, 8))
    )
    task = CodecTask(codec, PictureObjective())
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    batches = [{"image": x[None]} for x in pictures(40)[:, :, :16, :16] * torch.rand(40, 1, 1, 1)]
    (figures,) = trainer.validate(task, whole(batches), verbose=False)
    codes = torch.stack([codec.encode(batch["image"]) for batch in batches])
    assert figures["val/image/usage"] == pytest.approx(len(codes.unique()) / 64)
    assert len(codes.unique()) > 1
    assert figures["val/image/perplexity"] == pytest.approx(2 ** figures["val/image/entropy"])


def test_the_log_says_what_stands_in(
    image_recipe: dict[str, Any], write_recipe: WriteRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="unimm"):
        launch(["-c", str(write_recipe(image_recipe, **{"trainer.max_steps": 1}))])
    assert "gradients and cosine transforms stand in" in caplog.text


@pytest.mark.slow
def test_two_processes_train_as_one(
    image_recipe: dict[str, Any], write_recipe: WriteRecipe, ranks: Any
) -> None:
    """Pictures and films by turns, against both discriminators: the same gradients to 1e-3."""
    runs = []
    for world in (1, 2):
        run = Path(image_recipe["trainer"]["default_root_dir"]).with_name(f"world-{world}")
        changes = {
            "model.init_args.adversary": ADVERSARY,
            "data.init_args.batch_size": 8 // world,
            "data.init_args.config.video_batch_size": 2 // world,
            "trainer.default_root_dir": str(run),
            "trainer.devices": world,
            "trainer.strategy": "ddp_find_unused_parameters_true" if world > 1 else "auto",
            "trainer.max_steps": 8,
        }
        recipe = write_recipe(image_recipe, **changes)
        codes = ranks.run(world, "fit", "-c", str(recipe))
        assert codes == [0] * world, ranks.log()
        runs.append({row["step"]: row for row in metrics(run) if "train/loss" in row})
    one, two = runs
    assert list(one) == list(two) == list(range(1, 9))
    for step, row in one.items():
        name = "train/gradient_norm"  # of all processes; losses are logged by the first for itself
        assert two[step][name] == pytest.approx(row[name], rel=1e-3), step


def test_a_residual_codebook_trains_and_resumes(
    image_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    """A run cut in two has the losses of one that is not, codebook statistics and all."""
    codebook = {"fsq_levels": [], "codebook_size": 16, "codebook_dim": None}
    config = image_recipe["model"]["init_args"]["codec"]["init_args"]["config"] | codebook
    found = []
    for name, stops in (("whole", [10]), ("cut", [5, 10])):
        run = Path(image_recipe["trainer"]["default_root_dir"]).with_name(name)
        for stop in stops:
            changes = {
                "model.init_args.codec.init_args.config": config,
                "model.init_args.adversary": ADVERSARY,
                "model.init_args.optimizer.decay": 0.0,
                "model.init_args.average": 0.9,
                "trainer.default_root_dir": str(run),
                "trainer.max_steps": stop,
                "trainer.val_check_interval": stop,
            }
            launch(["-c", str(write_recipe(image_recipe, **changes))])
        found.append([row["train/loss"] for row in metrics(run) if "train/loss" in row])
    assert len(found[0]) == 10
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path, value: float) -> None:
    task = CodecTask(tiny_codec(), PictureObjective(), OptimizerConfig(weight_decay=0.1))
    first = next(task.codec.parameters())
    first.register_hook(lambda gradient: torch.full_like(gradient, value))
    before = state(task.codec)
    trainer = train(task, [{"image": pictures()} for _ in range(2)], tmp_path)
    assert trainer.global_step == 2
    assert all(torch.equal(task.codec.state_dict()[name], before[name]) for name in before)


def test_training_goes_on_after_a_gradient_that_is_not_finite(tmp_path: Path) -> None:
    task = CodecTask(tiny_codec(), PictureObjective())
    first = next(task.codec.parameters())
    seen: list[float] = []

    def poison_the_second(gradient: Tensor) -> Tensor:
        seen.append(float(first.detach().sum()))
        return gradient * (float("nan") if len(seen) == 2 else 1.0)

    first.register_hook(poison_the_second)
    train(task, [{"image": pictures()} for _ in range(3)], tmp_path)
    assert seen[1] != seen[0]
    assert seen[2] == seen[1]
    assert float(first.detach().sum()) != seen[2]
    assert all(bool(value.isfinite().all()) for value in task.codec.state_dict().values())


def test_clipping_bounds_the_step_and_reports_the_norm_before_it(tmp_path: Path) -> None:
    norms: list[float] = []

    class Listening(CodecTask):
        def descend(self, *args: Any, **kwargs: Any) -> Tensor:
            norm = super().descend(*args, **kwargs)
            gradients = [p.grad for p in self.codec.parameters() if p.grad is not None]
            clipped = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
            norms.extend([float(norm), float(clipped)])
            return norm

    config = OptimizerConfig(clip=0.01)
    train(Listening(tiny_codec(), PictureObjective(), config), [{"image": pictures()}], tmp_path)
    before, after = norms
    assert before > 0.01
    assert after == pytest.approx(0.01, rel=1e-3)
