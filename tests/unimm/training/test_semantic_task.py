"""A semantic codec is really trained, words included, and comes out as a codec folder."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from unimm import load_codec
from unimm.data import dialpad
from unimm.training import SemanticTask
from unimm.training.export import export
from unimm.training.launch import launch
from unimm_tokenizers.losses import PictureObjective
from unimm_tokenizers.semantic import SeTokCodec, SeTokConfig

DEBUG = Path(__file__).parents[3] / "recipes/semantic/debug.yaml"


def test_pictures_and_words_are_learned_together(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    dialpad.write_raw_shards(raw, 16, seed=0)
    recipe: dict[str, Any] = yaml.safe_load(DEBUG.read_text())
    data = recipe["data"]["init_args"]
    data["sources"][0]["shards"] = data["val_shards"] = str(raw)
    recipe["trainer"] |= {"default_root_dir": str(tmp_path / "run"), "callbacks": []}
    recipe["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False, "max_steps": 12}
    recipe["trainer"]["val_check_interval"] = 12
    written = tmp_path / "debug.yaml"
    written.write_text(yaml.safe_dump(recipe))
    launch(["-c", str(written)])
    with (tmp_path / "run/logs/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row["train/loss"]]
    assert float(steps[-1]["train/loss"]) < float(steps[0]["train/loss"])
    assert float(steps[-1]["train/contrast"]) > 0
    assert any(row["val/semantic/psnr"] for row in rows)
    codec = load_codec(export(tmp_path / "run", tmp_path / "codec", dtype=torch.float16))
    assert isinstance(codec, SeTokCodec)
    codes = codec.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert codec.decode(codes).shape == (2, 3, 32, 32)


def test_the_text_side_moves_with_the_codec() -> None:
    codec = SeTokCodec(SeTokConfig(dim=16, num_heads=2, codebook_dim=4))
    task = SemanticTask(codec, PictureObjective())
    moved = {
        id(p) for o in task.configure_optimizers() for g in o.param_groups for p in g["params"]
    }
    assert {id(p) for p in task.words.parameters()} <= moved
    with pytest.raises(ValueError, match="contrast must be 0 or more"):
        SemanticTask(codec, PictureObjective(), contrast=-1.0)
