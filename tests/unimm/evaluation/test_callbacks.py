"""Samples that a language model writes while it is trained."""

from pathlib import Path

import lightning
import pytest
import torch
from PIL import Image

from unimm.data.module import TokenDataModule
from unimm.evaluation.callbacks import WriteSamples
from unimm.model import ModelConfig
from unimm.training import LanguageTask


def train(tokenizer: Path, tokens: Path, run: Path, callbacks: list[WriteSamples]) -> LanguageTask:
    torch.manual_seed(0)
    task = LanguageTask(str(tokenizer), ModelConfig(d_model=32, num_layers=1, num_heads=2))
    data = TokenDataModule(str(tokenizer), str(tokens), str(tokens), row_length=128, batch_size=4)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=4,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run,
        callbacks=list(callbacks),
    )
    trainer.fit(task, data)
    return task


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_bundle: Path, token_shards: Path
) -> tuple[Path, LanguageTask]:
    """A training of four steps that shows samples after two and four."""
    folder = tmp_path_factory.mktemp("run")
    shown = WriteSamples(["seven", "two"], ["text", "image"], max_new_tokens=100)
    return folder, train(tokenizer_bundle, token_shards, folder, [shown])


def test_every_prompt_is_answered_in_every_modality(run: tuple[Path, LanguageTask]) -> None:
    samples = run[0] / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["step=2", "step=4"]
    for step in samples.iterdir():
        pictures = sorted((step / "image").iterdir())
        assert [path.name for path in pictures] == ["01-1.png", "02-1.png"]
        for path in pictures:
            with Image.open(path) as picture:
                assert min(picture.size) > 0
        assert {path.suffix for path in (step / "text").iterdir()} <= {".txt"}


def test_training_is_the_same_without_it(
    run: tuple[Path, LanguageTask], tokenizer_bundle: Path, token_shards: Path, tmp_path: Path
) -> None:
    quiet = train(tokenizer_bundle, token_shards, tmp_path, [])
    weights = run[1].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in quiet.state_dict().items())
    assert not (tmp_path / "samples").exists()


def test_guidance_moves_what_is_shown(run: tuple[Path, LanguageTask], tmp_path: Path) -> None:
    shown = {}
    for guidance in (1.0, 50.0):
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, default_root_dir=tmp_path / str(guidance)
        )
        WriteSamples(["seven"], ["image"], 100, guidance).on_validation_end(trainer, run[1])
        (path,) = (tmp_path / str(guidance)).rglob("*.png")
        shown[guidance] = path.read_bytes()
    assert shown[1.0] != shown[50.0]
