"""Training checkpoints -> bundles of safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unimm.checkpoint import seal
from unimm.model import ModelConfig, UnifiedLM
from unimm.tokenizer import UnifiedTokenizer
from unimm.training.checkpoints import COMPLETE, newest_checkpoint, read_checkpoint
from unimm.training.sharded import exported_weights
from unimm_tokenizers.codec import codec_from_config, config_from_dict


def export(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write what a training made.

    A codec becomes a codec folder; a language model becomes a whole bundle, tokenizer included.

    Args:
        source: a checkpoint file that this library wrote, or a run folder (its newest one).
        out: the folder to write.
        tokenizer: the bundle that the language model was trained with.
        dtype: store floating weights in this type; None keeps float32.

    Raises:
        ValueError: there is no checkpoint, it is not ours, or it needs another tokenizer.
    """
    run = Path(source).is_dir() and not (Path(source) / COMPLETE).is_file()
    path = newest_checkpoint(source) if run else Path(source)
    if path is None or not path.exists():
        raise ValueError(f"{source}: no checkpoint is there; give a .ckpt file or a run folder")
    stored = read_checkpoint(path, "cpu").get("unimm")
    if stored is None:
        raise ValueError(f"{path}: this checkpoint was not written by `unimm fit`")
    entry, weights = stored["entry"], stored["weights"]
    if path.is_dir():
        weights = exported_weights(path)
    if entry["kind"] == "codec":
        codec = codec_from_config(entry["codec"], entry["config"], str(path))
        codec.load_state_dict(weights)
        codec.save_pretrained(out, dtype)
    else:
        _export_lm(path, entry, weights, Path(out), tokenizer, dtype)
    return Path(out)


def _export_lm(
    path: Path,
    entry: dict[str, Any],
    weights: dict[str, torch.Tensor],
    out: Path,
    tokenizer: str | Path | None,
    dtype: torch.dtype | None,
) -> None:
    if tokenizer is None:
        raise ValueError(f"{path}: a language model needs its tokenizer: name the bundle")
    tok = UnifiedTokenizer.from_pretrained(tokenizer)
    tok.vocabulary.require(entry["vocabulary"], str(path))
    lm = UnifiedLM(config_from_dict(ModelConfig, entry["config"], str(path)))
    lm.load_state_dict(weights)
    tok.save_pretrained(out, dtype)
    lm.save_pretrained(out, dtype)
    seal(out)
