"""Initial weights, each a function of a seed and the parameter's name alone.

So a model has the same weights whatever order, process or shard makes them: a block can be made
on its own, cut into shards, and its whole freed before the next one is made.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from unimm.model.config import ModelConfig

STD = 0.02
# What a residual branch ends in; scaled down by depth (GPT-2, section 2.3).
_RESIDUAL = ("attention.out.weight", "feed_forward.down.weight", "feed_forward.down")


def initial(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Weights of one parameter, float32 on the CPU: normal(0, 0.02); norms ones, biases zeros.

    Args:
        name: as `UnifiedLM.named_parameters` gives it.
        shape: its shape.
        config: the model's shape; residual outputs shrink by the square root of twice its depth.
        seed: of the model.
    """
    if len(shape) < 2:
        return torch.full(shape, float(not name.endswith("bias")), device="cpu")
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7]))
    std = STD * (2 * config.num_layers) ** -0.5 if name.endswith(_RESIDUAL) else STD
    return torch.empty(shape, device="cpu").normal_(std=std, generator=generator)


@torch.no_grad()
def initialise(module: nn.Module, prefix: str, config: ModelConfig, seed: int) -> None:
    """Give a part of a model its initial weights; `prefix` is its name in the model, or ""."""
    for name, parameter in module.named_parameters(prefix):
        parameter.copy_(initial(name, parameter.shape, config, seed))
