"""Small random models of `transformers` in folders, as they come from the Hub; no download."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra hf is not installed")

os.environ["TQDM_DISABLE"] = "1"  # transformers draws a bar for every file that it writes

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from unimm.conversion.chameleon import code_name

LINES = ["the quick brown fox jumps over the lazy dog", "two times two is four, not five"] * 3
SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VQ: dict[str, Any] = {
    "embed_dim": 8,
    "num_embeddings": 16,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "resolution": 8,
    "attn_resolutions": [4],
}
CODES = [code_name(code) for code in range(16)]
CHAMELEON_SPECIAL = [
    *("<s>", "<pad>", "</s>", "<unk>"),
    *CODES,
    *("<eoss>", "<racm3:break>", "<reserved08706>", "<image>"),
]
Save = Callable[..., Any]


def train_tokenizer(special: list[str]) -> Tokenizer:
    """Byte-level BPE, special pieces first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=330,
        special_tokens=[AddedToken(name, special=True) for name in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def random_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Every number random, norms and biases too: one that is left out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty_like(parameter).normal_(std=0.08, generator=generator)
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0))


@pytest.fixture
def save_language_model(tmp_path: Path) -> Save:
    """(kind, **config) -> its model, saved in tmp_path/source with a tokenizer."""

    def save(kind: str = "Llama", **config: Any) -> Any:
        tokenizer = train_tokenizer(["<s>", "</s>"])
        ids = {"bos_token_id": 0, "eos_token_id": 1}
        shape = {**SHAPE, "vocab_size": tokenizer.get_vocab_size() + 5, **ids, **config}
        config_class = getattr(transformers, f"{kind}Config")
        model = getattr(transformers, f"{kind}ForCausalLM")(config_class(**shape)).eval()
        random_weights(model)
        model.save_pretrained(tmp_path / "source")
        tokenizer.save(str(tmp_path / "source" / "tokenizer.json"))
        return model

    return save


@pytest.fixture
def save_chameleon(tmp_path: Path) -> Save:
    """(**config) -> a Chameleon, saved in tmp_path/source, with no decoder as ever."""

    def save(**config: Any) -> Any:
        tokenizer = train_tokenizer(CHAMELEON_SPECIAL)
        shape = {
            **SHAPE,
            "vocab_size": tokenizer.get_vocab_size(),
            "bos_token_id": 1,  # Llama's, as in the public configs; it is <pad> here
            "eos_token_id": 2,
            "vocabulary_map": tokenizer.get_vocab(),
            "vq_config": VQ,
            **config,
        }
        config_class = transformers.ChameleonConfig
        model = transformers.ChameleonForConditionalGeneration(config_class(**shape)).eval()
        random_weights(model)
        model.save_pretrained(tmp_path / "source")
        tokenizer.save(str(tmp_path / "source" / "tokenizer.json"))
        return model

    return save
