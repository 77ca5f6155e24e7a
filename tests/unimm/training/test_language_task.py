"""A tiny decoder is really trained on token shards."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unimm.data.batch import Batch
from unimm.data.module import TokenDataModule
from unimm.model import ModelConfig
from unimm.tokenizer import UnifiedTokenizer
from unimm.training import LanguageTask, OptimizerConfig
from unimm.training.launch import launch

WriteRecipe = Callable[..., Path]
SHAPE = ModelConfig(d_model=32, num_layers=1, num_heads=2)


@pytest.fixture
def batch(tokenizer_bundle: Path, token_shards: Path) -> Batch:
    """Four packed rows."""
    data = TokenDataModule(str(tokenizer_bundle), str(token_shards), row_length=128, batch_size=4)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def make_task(tokenizer: Path, **options: Any) -> LanguageTask:
    torch.manual_seed(0)
    return LanguageTask(str(tokenizer), SHAPE, **options)


def whole(batches: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def train(task: LanguageTask, batches: list[Batch], folder: Path) -> lightning.Trainer:
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


def test_the_vocabulary_decides_the_models_size(tokenizer_bundle: Path) -> None:
    tok = UnifiedTokenizer.from_pretrained(tokenizer_bundle)
    task = make_task(tokenizer_bundle)
    assert task.lm.config.vocab_size == tok.vocabulary.padded_size
    assert task.lm.embedding.weight.shape == (tok.vocabulary.padded_size, 32)
    assert task.bundle_entry()["vocabulary"] == tok.vocabulary.fingerprint


def test_an_untrained_model_knows_nothing(tokenizer_bundle: Path, batch: Batch) -> None:
    task = make_task(tokenizer_bundle)
    loss = float(task(batch).loss.detach())
    assert loss == pytest.approx(math.log(task.lm.config.vocab_size), rel=0.05)


def test_the_loss_is_the_weighted_cross_entropy_of_the_next_id(
    tokenizer_bundle: Path, batch: Batch
) -> None:
    task = make_task(tokenizer_bundle, z_loss=0.0)
    weights = batch.loss_weight * (1 + batch.modality)  # modalities differ in weight
    result = task(batch._replace(loss_weight=weights))
    with torch.no_grad():
        logits = task.lm(batch.ids, batch.positions, batch.segment_ids)[:, :-1].flatten(0, 1)
        nll = torch.nn.functional.cross_entropy(
            logits, batch.ids[:, 1:].flatten(), reduction="none"
        )
    weight = weights[:, 1:].flatten()
    assert torch.allclose(result.nll[weight > 0], nll[weight > 0], atol=1e-4)
    expected = float((nll * weight).sum() / weight.sum())
    assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_padding_teaches_nothing(tokenizer_bundle: Path, batch: Batch) -> None:
    padding = batch.segment_ids == 0
    assert bool(padding.any())
    task = make_task(tokenizer_bundle)
    other = batch._replace(ids=torch.where(padding, 5, batch.ids))
    assert float(task(batch).loss.detach()) == float(task(other).loss.detach())


def test_a_decoder_learns_and_every_modality_is_logged(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    changes = {"trainer.max_steps": 40, "trainer.val_check_interval": 40}
    cli = launch(["-c", str(write_recipe(language_recipe, **changes))])
    assert cli.trainer.global_step == 40  # two optimizers, yet a step is a batch
    run = Path(language_recipe["trainer"]["default_root_dir"])
    with (run / "logs/metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    modalities = ("text", "image", "audio", "video")
    assert {f"val/{name}" for name in ("loss", *modalities)} <= rows[-1].keys()
    logged = {key for row in rows for key in row}
    assert {f"train/{name}" for name in modalities} <= logged
    assert "train/semantic" not in logged


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_every_optimizer_moves_its_parameters(
    tokenizer_bundle: Path, batch: Batch, tmp_path: Path, matrices: str
) -> None:
    config = OptimizerConfig(matrices=matrices)  # type: ignore[arg-type]
    task = make_task(tokenizer_bundle, optimizer=config)
    before = {name: value.detach().clone() for name, value in task.named_parameters()}
    trainer = train(task, [batch, batch, batch], tmp_path)
    assert trainer.global_step == 3
    still = [name for name, value in task.named_parameters() if torch.equal(value, before[name])]
    assert still == []


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_changes_nothing(
    tokenizer_bundle: Path, batch: Batch, tmp_path: Path, matrices: str
) -> None:
    config = OptimizerConfig(matrices=matrices, weight_decay=0.1)  # type: ignore[arg-type]
    task = make_task(tokenizer_bundle, optimizer=config)
    calls: list[Tensor] = []

    def poison_the_second(gradient: Tensor) -> Tensor:
        calls.append(task.lm.norm.weight.detach().clone())
        return gradient * (float("nan") if len(calls) == 2 else 1.0)

    task.lm.norm.weight.register_hook(poison_the_second)
    train(task, [batch, batch, batch], tmp_path)
    assert not torch.equal(calls[0], calls[1])
    assert torch.equal(calls[1], calls[2])
    assert not torch.equal(calls[2], task.lm.norm.weight)
    assert all(bool(value.isfinite().all()) for value in task.state_dict().values())


def test_shards_of_another_vocabulary_are_refused(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe, other_tokenizer_bundle: Path
) -> None:
    made = UnifiedTokenizer.from_pretrained(language_recipe["data"]["init_args"]["tokenizer"])
    other = UnifiedTokenizer.from_pretrained(other_tokenizer_bundle)
    fingerprints = [tok.vocabulary.fingerprint[:12] for tok in (made, other)]
    changes = {
        "model.init_args.tokenizer": str(other_tokenizer_bundle),
        "data.init_args.tokenizer": str(other_tokenizer_bundle),
    }
    expected = r"\.tar was made with vocabulary {}, not with this one \({}\)".format(*fingerprints)
    with pytest.raises(ValueError, match=expected):
        launch(["-c", str(write_recipe(language_recipe, **changes))])


def test_a_run_of_another_vocabulary_is_not_continued(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe, other_tokenizer_bundle: Path
) -> None:
    launch(["-c", str(write_recipe(language_recipe, **{"trainer.max_steps": 1}))])
    changes = {"model.init_args.tokenizer": str(other_tokenizer_bundle)}
    with pytest.raises(ValueError, match=r"final\.ckpt was made with vocabulary \w{12}, not with"):
        launch(["-c", str(write_recipe(language_recipe, **changes))])


def test_a_missing_tokenizer_is_named(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    changes = {"model.init_args.tokenizer": "./nowhere"}
    with pytest.raises(ValueError, match=r"no folder '\./nowhere'"):
        launch(["-c", str(write_recipe(language_recipe, **changes))])
