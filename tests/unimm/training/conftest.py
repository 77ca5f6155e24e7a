"""Recipes that train in a second, as data; tests change single keys."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Recipe = dict[str, Any]


def _task(codec: str, config: Recipe, objective: str) -> Recipe:
    return {
        "class_path": "unimm.training.CodecTask",
        "init_args": {
            "codec": {"class_path": f"unimm_tokenizers.{codec}", "init_args": {"config": config}},
            "objective": {"class_path": f"unimm_tokenizers.losses.{objective}"},
            "optimizer": {"learning_rate": 2e-3, "warmup": 2},
        },
    }


def _signals(shards: Path, config: Recipe) -> Recipe:
    return {
        "class_path": "unimm.data.module.SignalDataModule",
        "init_args": {
            "shards": str(shards),
            "val_shards": str(shards),
            "batch_size": 8,
            "config": config,
        },
    }


def _trainer(run: Path) -> Recipe:
    return {
        "default_root_dir": str(run),
        "max_steps": 6,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 2,
        "val_check_interval": 6,
    }


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe with some keys changed, named by dotted path; None removes a key."""

    def write(recipe: Recipe, **changes: Any) -> Path:
        changed = copy.deepcopy(recipe)
        for dotted, value in changes.items():
            *parents, last = dotted.split(".")
            node = changed
            for parent in parents:
                node = node[parent]
            node[last] = value
            if value is None:
                del node[last]
        path = tmp_path / f"recipe-{len(list(tmp_path.glob('*.yaml')))}.yaml"
        path.write_text(yaml.safe_dump(changed))
        return path

    return write


@pytest.fixture
def image_recipe(tmp_path: Path, raw_shards: Path) -> Recipe:
    """A codec for pictures and films."""
    vision = {
        "channels": 8,
        "multipliers": [1, 2],
        "patch": 4,
        "time_downsample": 4,
        "latent_channels": 8,
        "fsq_levels": [4, 4],
    }
    signals = {
        "modality": "image+video",
        "size": 32,
        "frames": 5,
        "video_share": 0.25,
        "video_batch_size": 2,
    }
    return {
        "seed_everything": 0,
        "model": _task("vision.VisionCodec", vision, "PictureObjective"),
        "data": _signals(raw_shards, signals),
        "trainer": _trainer(tmp_path / "image"),
    }


@pytest.fixture
def audio_recipe(tmp_path: Path, raw_shards: Path) -> Recipe:
    """A codec for sounds."""
    spectral = {"channels": 16, "num_blocks": 1, "num_codebooks": 2, "codebook_size": 16}
    signals = {"modality": "audio", "num_channels": 1, "sample_rate": 8000, "length": 3200}
    return {
        "seed_everything": 0,
        "model": _task("audio.SpectralCodec", spectral, "SpectrumObjective"),
        "data": _signals(raw_shards, signals),
        "trainer": _trainer(tmp_path / "audio"),
    }


@pytest.fixture
def language_recipe(tmp_path: Path, tokenizer_bundle: Path, token_shards: Path) -> Recipe:
    """A decoder trained by AdamW and Muon, at a learning rate that does not fall."""
    optimizer = {"learning_rate": 3e-3, "matrices": "muon", "warmup": 2, "decay": 0.01}
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "unimm.training.LanguageTask",
            "init_args": {
                "tokenizer": str(tokenizer_bundle),
                "model": {"d_model": 32, "num_layers": 1, "num_heads": 2},
                "optimizer": optimizer,
            },
        },
        "data": {
            "class_path": "unimm.data.module.TokenDataModule",
            "init_args": {
                "tokenizer": str(tokenizer_bundle),
                "shards": str(token_shards),
                "val_shards": str(token_shards),
                "row_length": 128,
                "batch_size": 4,
                "loss_weight": {"text": 2.0},
            },
        },
        "trainer": _trainer(tmp_path / "lm"),
    }
