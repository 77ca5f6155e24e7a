"""Optimizers and their schedule.

Matrices inside the blocks may take Muon (Jordan et al., 2024; `torch.optim.Muon`), everything
else AdamW. One learning-rate factor, a pure function of the step, serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters move.

    learning_rate: AdamW's peak. matrix_learning_rate: Muon's peak, used with matrices="muon".
    warmup: steps of linear rise. decay: share of the steps, at the end, of linear fall to zero
    (1: the whole run; 0.2: the warmup-stable-decay schedule of arXiv 2404.06395, section 4).
    """

    learning_rate: float = 1e-3
    matrices: Literal["adamw", "muon"] = "adamw"
    matrix_learning_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup: int = 50
    decay: float = 1.0
    clip: float = 1.0

    def factor(self, step: int, steps: int) -> float:
        """Share of the peak learning rate at a step of a run of `steps`."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = (steps - step) / max(1.0, self.decay * steps)
        return min(rise, max(0.0, min(1.0, fall)))


def build_optimizers(module: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices where the config says so.

    Vectors and embeddings are never decayed; Muon takes two-dimensional weights of Linear layers
    other than the output head.
    """
    embeddings, linears = (
        {id(child.weight) for child in module.modules() if isinstance(child, kind)}
        for kind in (nn.Embedding, nn.Linear)
    )
    matrices: list[Tensor] = []
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            plain.append(parameter)
        elif config.matrices == "muon" and id(parameter) in linears and "head" not in name:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": config.weight_decay},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
        )
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=config.matrix_learning_rate,
                weight_decay=config.weight_decay,
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
