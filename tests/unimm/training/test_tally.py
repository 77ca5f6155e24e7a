"""Losses, figures by modality, and what fits a model into memory, on real batches."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from unimm.data.batch import Batch
from unimm.data.module import TokenDataModule
from unimm.model import ExpertsConfig, ModelConfig, UnifiedLM
from unimm.sequence import Segment
from unimm.tokenizer import UnifiedTokenizer
from unimm.training import LanguageTask, ScaleConfig
from unimm.training import losses as head
from unimm.training.language import _split
from unimm.training.launch import launch
from unimm.training.scale import prepare
from unimm.training.tally import Tally, units_of_ids
from unimm.vocabulary import MODALITIES

WriteRecipe = Callable[..., Path]
SHAPE = ModelConfig(vocab_size=128, d_model=32, num_layers=2, num_heads=2)


@pytest.fixture
def batch(tokenizer_bundle: Path, token_shards: Path) -> Batch:
    """Sixteen packed rows."""
    data = TokenDataModule(str(tokenizer_bundle), str(token_shards), row_length=128, batch_size=16)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


# The loss


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_bounded_logits_have_the_loss_of_the_formula(
    z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = UnifiedLM(dataclasses.replace(SHAPE, logit_cap=0.3))
    hidden = torch.randn(11, 32, requires_grad=True)
    targets, weight = torch.randint(128, (11,)), torch.rand(11)
    weight[3] = 0
    logits = lm.cap(hidden @ lm.head_weight.T)
    nll = F.cross_entropy(logits, targets, reduction="none")
    expected = (weight * (nll + z_loss * logits.logsumexp(1).square())).sum() / weight.sum()
    gradients = torch.autograd.grad(expected, (hidden, lm.head_weight))
    monkeypatch.setattr(head, "LOGIT_BYTES", 4 * 128 * 4)  # chunks of four rows
    found = head.head_loss(lm, hidden, targets, weight, z_loss)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.nll, nll.detach())
    for one, two in zip(
        torch.autograd.grad(found.loss, (hidden, lm.head_weight)), gradients, strict=True
    ):
        torch.testing.assert_close(one, two)
    assert torch.equal(head.hits(lm, hidden, targets), logits.argmax(1) == targets)


def test_a_batch_in_parts_has_the_gradient_of_the_whole(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe, losses: Any, tmp_path: Path
) -> None:
    found = []
    for parts in (1, 4):
        changes = {
            "model.init_args.scale": {"micro_batches": parts},
            "trainer.default_root_dir": str(tmp_path / str(parts)),
            "trainer.max_steps": 10,
        }
        launch(["-c", str(write_recipe(language_recipe, **changes))])
        found.append([float(loss) for loss in losses(tmp_path / str(parts)).values()])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_more_parts_than_rows_are_refused(batch: Batch) -> None:
    parts = _split(batch, 5)
    assert [len(part.ids) for part in parts] == [4, 3, 3, 3, 3]
    assert torch.equal(torch.cat([part.positions for part in parts], dim=1), batch.positions)
    with pytest.raises(ValueError, match="the batch has only 16 rows; raise"):
        _split(batch, 17)


# Figures


def test_ids_stand_for_bytes_pixels_and_seconds(tokenizer_bundle: Path) -> None:
    """Pictures of 32 x 32 pixels, sounds of a known length, any words: exact sums."""
    tok = UnifiedTokenizer.from_pretrained(tokenizer_bundle)
    units = units_of_ids(tok)
    image, audio = tok.codecs["image"], tok.codecs["audio"]
    codes = torch.zeros(1, 32 // image.downsample[-2], 32 // image.downsample[-1]).long()
    sounds = torch.zeros(audio.num_codebooks, 50).long()
    for text in ("seven up", "Grüße, 世界 \u2581"):
        pieces = Segment("text", tok.text.encode(text))
        ids = tok.grammar.encode([pieces, Segment("image", codes), Segment("audio", sounds)])
        modality = tok.grammar.layout(ids).modality
        amount = torch.zeros(len(MODALITIES)).index_add(0, modality, units[modality, ids])
        assert float(amount[0]) == len(text.encode())
        assert float(amount[MODALITIES.index("image")]) == 32 * 32
        assert audio.frame_rate is not None
        expected = 50 / audio.frame_rate
        assert float(amount[MODALITIES.index("audio")]) == pytest.approx(expected)


def test_figures_are_means_over_what_is_predicted(tokenizer_bundle: Path, batch: Batch) -> None:
    tok = UnifiedTokenizer.from_pretrained(tokenizer_bundle)
    units = units_of_ids(tok)
    count = batch.ids[:, 1:].numel()
    nll, hits = torch.rand(count), torch.rand(count) < 0.5
    tally = Tally.of(batch, nll, units, hits)
    figures = tally.figures(judged=True)
    predicted = (batch.loss_weight[:, 1:] > 0).flatten()
    modality, ids = batch.modality[:, 1:].flatten(), batch.ids[:, 1:].flatten()
    for index, name in enumerate(MODALITIES):
        chosen = predicted & (modality == index)
        if not chosen.any():
            assert name not in figures
            continue
        assert figures[name] == pytest.approx(float(nll[chosen].mean()), rel=1e-5)
        assert figures[f"{name}_accuracy"] == pytest.approx(float(hits[chosen].float().mean()))
    text = predicted & (modality == 0)
    written = float(units[0, ids[text]].sum())
    bits = float(nll[text].sum()) / math.log(2)
    assert figures["text_bits_per_byte"] == pytest.approx(bits / written, rel=1e-5)
    assert {"image_bits_per_pixel", "audio_bits_per_second"} <= figures.keys()
    double = (tally + tally).figures(judged=False)
    assert double["text"] == pytest.approx(figures["text"])
    assert "text_accuracy" not in double


def test_figures_and_routing_are_logged(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    changes = {
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 4,
        "model.init_args.model.experts": {"count": 4},
    }
    cli = launch(["-c", str(write_recipe(language_recipe, **changes))])
    logged = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    for name in ("train/text", "train/image_bits_per_pixel", "val/text_accuracy"):
        assert name in logged
    assert 0.5 < logged["routing/balance"] < 4
    assert 0.25 <= logged["routing/text"] <= 1
    assert 0.25 <= logged["routing/image"] <= 1


# Memory


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("experts", [None, ExpertsConfig(count=4)])
def test_what_is_recomputed_is_the_same(recompute: Any, experts: ExpertsConfig | None) -> None:
    ids = torch.randint(128, (2, 16))
    found = []
    for policy in ("none", recompute):
        torch.manual_seed(0)
        lm = UnifiedLM(dataclasses.replace(SHAPE, experts=experts, dropout=0.3)).train()
        names = list(lm.state_dict())
        prepare(lm, ScaleConfig(recompute=policy), compiled=False)
        assert list(lm.state_dict()) == names
        torch.manual_seed(1)
        loss = lm(ids).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in lm.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_recomputing_keeps_less() -> None:
    ids, kept = torch.randint(128, (4, 64)), {}
    for policy in ("none", "selective", "full"):
        lm = UnifiedLM(dataclasses.replace(SHAPE, num_layers=6))
        prepare(lm, ScaleConfig(recompute=policy), compiled=False)  # type: ignore[arg-type]
        own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
        seen: dict[int, int] = {}

        def keep(tensor: torch.Tensor, seen: dict[int, int] = seen, own: set[int] = own) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = lm(ids).square().mean()
        kept[policy] = sum(seen.values())
        loss.backward()
    assert kept["full"] < 0.35 * kept["none"]


@pytest.mark.parametrize("change", [{"recompute_every": 0}, {"micro_batches": 0}])
def test_impossible_scales_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="recompute_every and micro_batches must be 1 or more"):
        ScaleConfig(**change)  # type: ignore[arg-type]


def test_a_deferred_model_needs_the_strategy_that_makes_it(
    language_recipe: dict[str, Any], write_recipe: WriteRecipe
) -> None:
    recipe = write_recipe(language_recipe, **{"model.init_args.scale": {"deferred": True}})
    with pytest.raises(ValueError, match="this strategy keeps the whole model"):
        launch(["-c", str(recipe)])


def test_a_model_may_be_named(tokenizer_bundle: Path) -> None:
    task = LanguageTask(str(tokenizer_bundle), "1M", scale=ScaleConfig(deferred=True))
    assert task.lm.config.d_model == 128
    assert task.lm.embedding.weight.is_meta
    with pytest.raises(ValueError, match="no model preset '1Q'"):
        LanguageTask(str(tokenizer_bundle), "1Q")
