"""Adapting: what moves in which phase, to the number; what is exported is what was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unimm import ModelConfig, UnifiedLM, UnifiedTokenizer
from unimm.checkpoint import seal
from unimm.training import AdaptTask, LoRAConfig
from unimm.training.adapt import add_lora, merged, new_rows
from unimm.training.export import export
from unimm.training.launch import launch

pytest.importorskip("peft", reason="the extra hf is not installed")

Recipe = dict[str, Any]
SHAPE = ModelConfig(
    d_model=32, num_layers=2, num_heads=4, rope_bases=(1e4,), qk_norm=None, tied_embeddings=False
)


@pytest.fixture
def bundle(tokenizer_bundle: Path, tmp_path: Path) -> Path:
    """Stands for a converted text model with codecs."""
    tok = UnifiedTokenizer.from_pretrained(tokenizer_bundle)
    torch.manual_seed(0)
    size = tok.vocabulary.padded_size
    lm = UnifiedLM(ModelConfig(**{**SHAPE.__dict__, "vocab_size": size}))
    tok.save_pretrained(tmp_path / "bundle")
    lm.save_pretrained(tmp_path / "bundle")
    seal(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def recipe(language_recipe: Recipe, bundle: Path, tmp_path: Path) -> Recipe:
    language_recipe["model"] = {
        "class_path": "unimm.training.AdaptTask",
        "init_args": {
            "bundle": str(bundle),
            "optimizer": {"learning_rate": 3e-3, "weight_decay": 0.1, "warmup": 1},
        },
    }
    language_recipe["trainer"]["default_root_dir"] = str(tmp_path / "run")
    return language_recipe


def trained(recipe: Path, tmp_path: Path, bundle: Path) -> UnifiedLM:
    """Run, export, load."""
    launch(["-c", str(recipe)])
    out = export(tmp_path / "run", tmp_path / "out", bundle)
    return UnifiedLM.from_pretrained(out)


def test_new_rows_alone(
    recipe: Recipe, bundle: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_recipe(recipe, **{"model.init_args.rows_steps": 100})
    before, after = UnifiedLM.from_pretrained(bundle), trained(path, tmp_path, bundle)
    new = new_rows(UnifiedTokenizer.from_pretrained(bundle).vocabulary)
    old_state = before.state_dict()
    for name, tensor in after.state_dict().items():
        if name in ("embedding.weight", "head.weight"):
            assert torch.equal(tensor[~new], old_state[name][~new]), name
            assert not torch.equal(tensor[new], old_state[name][new]), name
        else:
            assert torch.equal(tensor, old_state[name]), name


def test_then_all(
    recipe: Recipe,
    bundle: Path,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    changes = {"model.init_args.rows_steps": 3, "model.init_args.optimizer.matrices": "muon"}
    after = trained(write_recipe(recipe, **changes), tmp_path, bundle)
    before = UnifiedLM.from_pretrained(bundle).state_dict()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in after.state_dict().items())


def test_then_low_rank(
    recipe: Recipe, bundle: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """What is exported holds the updates, of the rank that was asked for; a resumed run goes on."""
    changes: dict[str, Any] = {
        "model.init_args.rows_steps": 2,
        "model.init_args.lora": {"rank": 3, "alpha": 6.0},
    }
    after = trained(write_recipe(recipe, **changes), tmp_path, bundle)
    before = UnifiedLM.from_pretrained(bundle).state_dict()
    for name, tensor in after.state_dict().items():
        if "norm" in name:
            assert torch.equal(tensor, before[name]), name
        elif "blocks" in name:
            change = torch.linalg.svdvals(tensor - before[name])
            assert change[2] > 1e-6 * change[0] > 0, name
            assert change[3] < 1e-4 * change[0], name
    launch(["-c", str(write_recipe(recipe, **{**changes, "trainer.max_steps": 8}))])
    longer = UnifiedLM.from_pretrained(export(tmp_path / "run", tmp_path / "longer", bundle))
    name = "blocks.0.attention.out.weight"
    assert not torch.equal(longer.state_dict()[name], after.state_dict()[name])


@torch.no_grad()
def test_merged_weights_compute_the_same(bundle: Path) -> None:
    lm = UnifiedLM.from_pretrained(bundle)
    add_lora(lm, LoRAConfig(rank=2, alpha=8.0))
    for name, parameter in lm.named_parameters():
        if ".lora_" in name:
            parameter.normal_(std=0.1)
    plain = UnifiedLM(lm.config)
    plain.load_state_dict(merged(lm))
    ids = torch.randint(0, lm.config.vocab_size, (2, 12))
    assert torch.allclose(plain.eval()(ids), lm.eval()(ids), atol=1e-5)
    learning = {name for name, p in lm.named_parameters() if p.requires_grad}
    assert {name for name in learning if ".lora_" not in name} == {
        "embedding.weight",
        "head.weight",
    }


def test_what_is_missing_is_named(tokenizer_bundle: Path, bundle: Path) -> None:
    with pytest.raises(ValueError, match="holds no language model"):
        AdaptTask(str(tokenizer_bundle))
    UnifiedLM(ModelConfig(**{**SHAPE.__dict__, "vocab_size": 128})).save_pretrained(bundle)
    with pytest.raises(ValueError, match="rows for 128 ids, the tokenizer for"):
        AdaptTask(str(bundle))
