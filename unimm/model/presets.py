"""Shapes from 1M to 8B parameters, and what a shape costs, counted without making a weight.

Names up to "30M" count what lies between embedding and head; from "125M" on all of it, at 65,536
ids. Heads are 64 wide up to "350M" and 128 above; from "3B" on queries are grouped as in Llama 3
(arXiv 2407.21783, table 3). Positions reach 4,096 at base 10,000 and 32,768 at 500,000.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from unimm.checkpoint import did_you_mean
from unimm.model.config import ModelConfig
from unimm.model.decoder import UnifiedLM

_FAR = (500_000.0, 500_000.0, 500_000.0)
PRESETS: dict[str, ModelConfig] = {
    "1M": ModelConfig(d_model=128, num_layers=5, num_heads=2),
    "3M": ModelConfig(d_model=192, num_layers=7, num_heads=3),
    "10M": ModelConfig(d_model=320, num_layers=8, num_heads=5),
    "30M": ModelConfig(d_model=512, num_layers=10, num_heads=8),
    "125M": ModelConfig(d_model=768, num_layers=12, num_heads=12),
    "350M": ModelConfig(d_model=1024, num_layers=24, num_heads=16),
    "760M": ModelConfig(d_model=1536, num_layers=24, num_heads=12),
    "1.3B": ModelConfig(d_model=2048, num_layers=24, num_heads=16),
    "3B": ModelConfig(
        d_model=3072, num_layers=28, num_heads=24, num_kv_heads=8, d_ff=8192, rope_bases=_FAR
    ),
    "8B": ModelConfig(
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        d_ff=14336,
        rope_bases=_FAR,
        tied_embeddings=False,
    ),
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """The shape of a name, with some fields changed.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        hint = did_you_mean(name, list(PRESETS))
        raise ValueError(f"no model preset {name!r}{hint}; there are {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)


class Size(NamedTuple):
    """What a shape costs.

    parameters: trained numbers. active: those that one token goes through. embedding: those of
    them that are looked up and not multiplied. attention: floating-point operations of the forward
    pass per token, layer and id in reach. windows: ids that each layer sees; None: all.
    """

    parameters: int
    active: int
    embedding: int
    attention: int
    windows: tuple[int | None, ...]

    def flops_per_token(self, context: int) -> float:
        """Operations of forward and backward pass per token, in rows of `context` ids.

        6 for each multiplied parameter and 12 H D for each layer and id in reach (Chowdhery et al.,
        arXiv 2204.02311, appendix B): causal masks are not discounted, as is usual for MFU.
        """
        reach = sum(min(context, window or context) for window in self.windows)
        return 6.0 * (self.active - self.embedding) + 3.0 * self.attention * reach

    def __str__(self) -> str:
        sparse = f", {self.active:,} active" if self.active != self.parameters else ""
        flops = self.flops_per_token(2048) / 1e9
        return f"{self.parameters:,} parameters{sparse}, {flops:.3g} GFLOP per token at 2,048 ids"


def size_of(config: ModelConfig) -> Size:
    """Count a shape on the meta device."""
    with torch.device("meta"):
        lm = UnifiedLM(config)
    idle = 0
    for layer in range(config.num_layers):
        experts = config.experts_of(layer)
        if experts is not None:
            every = sum(p.numel() for p in lm.blocks[layer].parameters() if p.ndim == 3)
            idle += every * (experts.count - experts.chosen) // experts.count
    return Size(
        parameters=lm.num_parameters,
        active=lm.num_parameters - idle,
        embedding=0 if config.tied_embeddings else lm.embedding.weight.numel(),
        attention=4 * config.num_heads * config.head_dim,
        windows=tuple(config.window_of(layer) for layer in range(config.num_layers)),
    )
