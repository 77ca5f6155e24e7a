"""The decoder: ids in, logits over the one vocabulary out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from unimm.checkpoint import (
    LM_FOLDER,
    lm_folder,
    load_weights,
    read_config,
    reopen,
    save_model,
)
from unimm.model.block import Block, RMSNorm
from unimm.model.cache import KVCache
from unimm.model.config import ModelConfig


class UnifiedLM(nn.Module):
    """Decoder-only transformer: RMSNorm, QK-norm, SwiGLU, grouped queries, three-axis rotary.

    Args:
        config: shape of the model.

    Raises:
        ValueError: the config names no `vocab_size`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("a model needs vocab_size: take Vocabulary.padded_size")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = (
            None
            if config.tied_embeddings
            else nn.Linear(config.d_model, config.vocab_size, bias=False)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 0.02), with residual outputs scaled down by depth (GPT-2, section 2.3)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
                continue
            residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            depth = (2 * self.config.num_layers) ** -0.5 if residual else 1.0
            nn.init.normal_(parameter, std=0.02 * depth)

    @property
    def head_weight(self) -> Tensor:
        """(V, d_model), the output head; the embedding itself when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def num_parameters(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.embedding.weight.device

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states under the head.

        Args:
            ids: int64 (B, T).
            positions: int64 (3, B, T) as the grammar gives them; None: plain text, 0, 1, 2, ...
            segment_ids: int64 (B, T); ids of different segments never see each other.
            cache: keys and values of what came before; the new ones are stored there. The caller
                then moves the cache's lengths with `KVCache.advance`.

        Returns:
            (B, T, d_model).
        """
        assert cache is None or segment_ids is None, "a cache holds one document per row"
        if positions is None:
            start = 0 if cache is None else cache.lengths[:, None]
            line = start + torch.arange(ids.shape[1], device=ids.device)
            positions = line.expand(3, *ids.shape)
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, positions, segment_ids, cache)
        return self.norm(x)

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) of ids (B, T); see `hidden`."""
        return self.hidden(ids, positions, segment_ids) @ self.head_weight.T

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `lm/config.json` and `lm/model.safetensors` into a bundle folder.

        An `index.json` that stands there is void and removed: seal the bundle anew.
        """
        config = dataclasses.asdict(self.config)
        reopen(folder)
        save_model(Path(folder) / LM_FOLDER, config, self.state_dict(), dtype)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> Self:
        """Read the language model of a bundle: shipped name, folder, or Hub repository id.

        Raises:
            ValueError: nothing is found, or a file is missing, damaged or of another shape.
        """
        folder = lm_folder(name_or_path)
        model = cls(read_config(ModelConfig, folder))
        load_weights(model, folder)
        return model.eval()
