"""A semantic codec is really trained, words included, and comes out as a codec folder."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from unimm import load_codec
from unimm.data import dialpad
from unimm.training import OptimizerConfig, SemanticTask
from unimm.training.adversary import Adversary
from unimm.training.export import export
from unimm.training.launch import launch
from unimm.training.optim import GroupRule
from unimm_tokenizers.discriminators import PatchDiscriminator
from unimm_tokenizers.losses import PictureObjective
from unimm_tokenizers.semantic import SeTokCodec, SeTokConfig

DEBUG = Path(__file__).parents[3] / "recipes/semantic/debug.yaml"


def metrics(folder: Path, **model: Any) -> list[dict[str, str]]:
    """Train the small recipe for 12 steps, parts of its task replaced; rows of the log."""
    raw, run = folder / "raw", folder / "run"
    dialpad.write_raw_shards(raw, 16, seed=0)
    recipe: dict[str, Any] = yaml.safe_load(DEBUG.read_text())
    recipe["model"]["init_args"] |= model
    data = recipe["data"]["init_args"]
    data["sources"][0]["shards"] = data["val_shards"] = str(raw)
    recipe["trainer"] |= {"default_root_dir": str(run), "callbacks": []}
    recipe["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False, "max_steps": 12}
    recipe["trainer"]["val_check_interval"] = 12
    written = folder / "debug.yaml"
    written.write_text(yaml.safe_dump(recipe))
    assert launch(["-c", str(written)]).trainer.global_step == 12
    with (run / "logs/metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_pictures_and_words_are_learned_together(tmp_path: Path) -> None:
    rows = metrics(tmp_path)
    steps = [row for row in rows if row["train/loss"]]
    assert float(steps[-1]["train/loss"]) < float(steps[0]["train/loss"])
    assert float(steps[-1]["train/contrast"]) > 0
    assert any(row["val/semantic/psnr"] for row in rows)
    codec = load_codec(export(tmp_path / "run", tmp_path / "codec", dtype=torch.float16))
    assert isinstance(codec, SeTokCodec)
    codes = codec.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert codec.decode(codes).shape == (2, 3, 32, 32)


def test_an_adversary_and_perceptual_terms_are_named_in_a_recipe(
    tmp_path: Path, lpips_files: tuple[Path, str]
) -> None:
    weights, digest = lpips_files
    lpips = {"weights": str(weights), "sha256_digest": digest}
    scorer = {"num_channels": 3, "channels": 4}
    rows = metrics(
        tmp_path,
        contrast=0.0,
        adversary={
            "discriminators": [
                {
                    "class_path": "unimm_tokenizers.discriminators.PatchDiscriminator",
                    "init_args": scorer,
                }
            ],
            "start": 4,
        },
        objective={
            "class_path": "unimm_tokenizers.losses.PictureObjective",
            "init_args": {
                "cosine": 0.5,
                "perceptual": {
                    "class_path": "unimm_tokenizers.losses.Lpips",
                    "init_args": lpips,
                },
            },
        },
    )
    steps = [row for row in rows if row["train/loss"]]
    assert all(float(row["train/discriminator/hinge"]) > 0 for row in steps)
    assert [bool(row["train/adversarial"]) for row in steps] == [step >= 4 for step in range(12)]
    assert all(
        float(row[f"train/{name}"]) > 0 for row in steps for name in ("cosine", "perceptual")
    )
    assert "train/contrast" not in steps[0]
    assert any(row["val/semantic/perceptual"] for row in rows)


def test_what_moves_with_the_codec() -> None:
    """Text side, codec and adversary move, each weight once; rules speak of the codec alone."""
    codec = SeTokCodec(SeTokConfig(dim=16, num_heads=2, codebook_dim=4))
    rules = (GroupRule(match="detokenizer", scale=0.5),)
    adversary = Adversary([PatchDiscriminator(3, channels=4)])
    task = SemanticTask(codec, PictureObjective(), OptimizerConfig(rules=rules), adversary)
    moved = [
        id(p) for o in task.configure_optimizers() for g in o.param_groups for p in g["params"]
    ]
    assert task.words is not None
    assert sorted(moved) == sorted(id(p) for p in task.parameters())
    with pytest.raises(ValueError, match="contrast must be 0 or more"):
        SemanticTask(codec, PictureObjective(), contrast=-1.0)
