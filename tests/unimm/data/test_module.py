from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from unimm.data.batch import Batch
from unimm.data.module import SignalDataModule, TokenDataModule
from unimm.data.signals_data import SignalConfig
from unimm.data.templates import Template
from unimm.data.tokenize import TokenizeConfig
from unimm.data.tokenize_many import tokenize_shards
from unimm.tokenizer import UnifiedTokenizer


class Recorder(lightning.LightningModule):
    """Learns nothing to speak of, and keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.shown: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.shown.append(batch)
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validator(Recorder):
    """Counts what it is validated on."""

    validated = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        first = batch.ids if isinstance(batch, Batch) else next(iter(batch.values()))
        self.validated += len(first)


def trainer(folder: Path, steps: int, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


@pytest.fixture
def tokens(make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path) -> Path:
    config = TokenizeConfig(documents_per_sample=3)
    templates = [Template(["{txt}", "{png}"]), Template(["{wav}", "{txt}"])]
    tokenize_shards(make.raw(2, 10), tmp_path / "out", tokenizer, templates, config, progress=False)
    return tmp_path / "out"


def token_module(tokens: Path, bundle: Path, **options: Any) -> TokenDataModule:
    return TokenDataModule(str(bundle), str(tokens), row_length=96, batch_size=2, **options)


def signal_module(raw: Path, **options: Any) -> SignalDataModule:
    return SignalDataModule(
        str(raw), SignalConfig(modality="image", size=16, shift=2), batch_size=3, **options
    )


def equal(one: Any, two: Any) -> bool:
    tensors = one.values() if isinstance(one, dict) else one
    others = two.values() if isinstance(two, dict) else two
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize("kind", ["tokens", "signals"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_shown_what_is_left(
    kind: str, accumulate: int, tokens: Path, bundle: Path, make: Any, tmp_path: Path
) -> None:
    def fresh() -> Any:
        raw = make.folder / "raw"
        return token_module(tokens, bundle) if kind == "tokens" else signal_module(raw)

    def run(steps: int, checkpoint: Path | None) -> tuple[Recorder, Any, lightning.Trainer]:
        model, data = Recorder(), fresh()
        fitting = trainer(tmp_path, steps, accumulate_grad_batches=accumulate)
        fitting.fit(model, data, ckpt_path=None if checkpoint is None else str(checkpoint))
        return model, data, fitting

    whole, _, _ = run(9, None)
    first, data, fitting = run(4, None)
    assert data.consumed == 4 * accumulate * (2 if kind == "tokens" else 1)
    fitting.save_checkpoint(tmp_path / "a.ckpt")
    second, _, fitting = run(7, tmp_path / "a.ckpt")
    fitting.save_checkpoint(tmp_path / "b.ckpt")
    third, data, _ = run(9, tmp_path / "b.ckpt")
    shown = first.shown + second.shown + third.shown
    assert len(shown) == len(whole.shown) == 9 * accumulate
    assert all(equal(one, two) for one, two in zip(shown, whole.shown, strict=True))
    assert data.consumed == 9 * accumulate * (2 if kind == "tokens" else 1)


class SaveAt(lightning.Callback):
    """Saves in the middle of a run, where Lightning's own checkpoints are saved."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.step = step

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_checkpoint_inside_a_run_is_exact(
    workers: int, tokens: Path, bundle: Path, tmp_path: Path
) -> None:
    whole, rest = Recorder(), Recorder()
    saving = SaveAt(tmp_path / "a.ckpt", 5)
    data = token_module(tokens, bundle, num_workers=workers)
    trainer(tmp_path, 8, callbacks=[saving]).fit(whole, data)
    data = token_module(tokens, bundle, num_workers=workers)
    trainer(tmp_path, 8).fit(rest, data, ckpt_path=str(saving.path))
    assert len(rest.shown) == 3
    assert all(equal(a, b) for a, b in zip(rest.shown, whole.shown[5:], strict=True))


def test_a_new_fit_begins_at_the_beginning(tokens: Path, bundle: Path, tmp_path: Path) -> None:
    data, shown = token_module(tokens, bundle), []
    for _ in range(2):
        model = Recorder()
        trainer(tmp_path, 2).fit(model, data)
        shown.append(model.shown)
    assert all(equal(a, b) for a, b in zip(*shown, strict=True))


def test_validation_shows_everything_once(
    tokens: Path, bundle: Path, make: Any, tmp_path: Path
) -> None:
    data = token_module(tokens, bundle, val_shards=str(tokens / "raw-001.tar"))
    model = Validator()
    trainer(tmp_path, 2).validate(model, data, verbose=False)
    assert data.val_rows is not None
    assert model.validated == len(data.val_rows)
    data = signal_module(make.folder / "raw", val_shards=str(make.folder / "raw"))
    model = Validator()
    trainer(tmp_path, 4, val_check_interval=2).fit(model, data)
    assert model.validated == 2 * 20


def test_without_validation_shards_nothing_is_validated(
    tokens: Path, bundle: Path, tmp_path: Path
) -> None:
    model = Validator()
    with pytest.warns(UserWarning, match="Skipping val loop"):
        trainer(tmp_path, 3, val_check_interval=1).fit(model, token_module(tokens, bundle))
    assert model.validated == 0


def test_loss_weights_reach_the_batches(tokens: Path, bundle: Path) -> None:
    data = token_module(tokens, bundle, loss_weight={"image": 3.0})
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch.loss_weight.unique().tolist()) == {0.0, 1.0, 3.0}


def test_the_trainers_processes_share_the_rows(tokens: Path, bundle: Path) -> None:
    """Two ranks of batch size 2 make what one rank of batch size 4 makes."""

    class Rank:
        strategy = lightning.Trainer(logger=False, accelerator="cpu").strategy
        fit_loop = lightning.Trainer(logger=False, accelerator="cpu").fit_loop
        default_root_dir = str(tokens.parent)

        def __init__(self, rank: int) -> None:
            self.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}

    whole = TokenDataModule(str(bundle), str(tokens), row_length=96, batch_size=4)
    whole.setup("fit")
    expected = list(islice(whole.train_dataloader(), 3))
    for rank in range(2):
        part = token_module(tokens, bundle)
        part.trainer = Rank(rank)  # type: ignore[assignment]
        part.setup("fit")
        assert part.unit == 4
        for one, two in zip(islice(part.train_dataloader(), 3), expected, strict=True):
            assert torch.equal(one.ids, two.ids[2 * rank : 2 * rank + 2])


@pytest.mark.parametrize(("size", "workers"), [(0, 0), (1, -1)])
def test_numbers_out_of_range(size: int, workers: int) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1 and num_workers 0 or more"):
        TokenDataModule("x", "y", batch_size=size, num_workers=workers)


def test_missing_shards_are_named_before_training(bundle: Path, tmp_path: Path) -> None:
    data = TokenDataModule(str(bundle), f"{tmp_path}/a-{{0..1}}.tar")
    with pytest.raises(ValueError, match=r"2 missing shards: .*a-0\.tar, .*a-1\.tar"):
        data.setup("fit")


def test_recipes_can_name_everything() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SignalDataModule, "signals")
    parser.add_class_arguments(TokenDataModule, "tokens")
    config = {"modality": "image+video", "size": 32, "frames": 9, "shift": 2, "video_share": 0.25}
    parsed = parser.parse_object(
        {
            "signals": {"shards": "a", "config": config, "batch_size": 48},
            "tokens": {"tokenizer": "t", "shards": "s", "loss_weight": {"text": 4.0}},
        }
    )
    assert SignalConfig(**vars(parsed.signals.config)) == SignalConfig(**config)  # type: ignore[arg-type]
    assert parsed.tokens.loss_weight == {"text": 4.0}
    with pytest.raises(Exception, match="modality"):
        parser.parse_object({"signals": {"shards": "a", "config": {"modality": "smell"}}})
