"""Optimizers, their parameter groups, and their schedule.

Matrices inside the blocks may take Muon (Jordan et al., 2024; `torch.optim.Muon`), everything
else AdamW. One learning-rate factor, a pure function of the step, serves both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

MOMENTUM = 0.95  # of Muon


@dataclass(frozen=True, kw_only=True)
class GroupRule:
    """How the parameters of some names differ from all others.

    match: regular expression, sought in a parameter's name; the first rule that fits counts.
    scale: factor of the learning rate; 0 freezes. weight_decay: instead of the general one.
    """

    match: str
    scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(
                f"rules: match {self.match!r} is no regular expression: {error}"
            ) from None
        if self.scale < 0:
            raise ValueError(f"rules: scale of {self.match!r} must be 0 or more, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters move.

    learning_rate: AdamW's peak. betas: its decay rates. weight_decay: decoupled, of matrices.
    matrix_learning_rate: Muon's peak, used with matrices="muon".
    warmup: steps of linear rise. decay: share of the steps, at the end, of the fall to `floor`
    (1: the whole run; 0.2: the warmup-stable-decay schedule of arXiv 2404.06395, section 4).
    shape: of that fall, a line or half a cosine (Loshchilov and Hutter, arXiv 1608.03983).
    floor: share of the peak at the end. clip: bound of the gradient's norm over all processes; 0
    never clips. rules: what differs for parameters by name.
    """

    learning_rate: float = 1e-3
    matrices: Literal["adamw", "muon"] = "adamw"
    matrix_learning_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup: int = 50
    decay: float = 1.0
    shape: Literal["linear", "cosine"] = "linear"
    floor: float = 0.0
    clip: float = 1.0
    rules: tuple[GroupRule, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1 or not 0 <= self.decay <= 1:
            raise ValueError(
                f"optimizer: floor and decay must lie in 0 to 1, got {self.floor} and {self.decay}"
            )

    def factor(self, step: int, steps: int) -> float:
        """Share of the peak learning rate at a step of a run of `steps`."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        left = max(0.0, min(1.0, (steps - step) / max(1.0, self.decay * steps)))
        if self.shape == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return min(rise, self.floor + (1 - self.floor) * left)

    def rule(self, name: str) -> GroupRule | None:
        """The first rule that a parameter's name fits."""
        return next((rule for rule in self.rules if re.search(rule.match, name)), None)


def build_optimizers(module: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices where the config says so.

    Vectors and embeddings are never decayed, unless a rule says so; Muon takes two-dimensional
    weights of Linear layers other than the output head. Every group holds its parameters' names.

    Raises:
        ValueError: a rule fits no parameter, or none is left to train.
    """
    embeddings, linears = (
        {id(child.weight) for child in module.modules() if isinstance(child, kind)}
        for kind in (nn.Embedding, nn.Linear)
    )
    groups: dict[tuple[bool, float, float], list[tuple[str, Tensor]]] = {}
    used: set[GroupRule] = set()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        rule = config.rule(name)
        used |= {rule} if rule else set()
        flat = parameter.ndim < 2 or id(parameter) in embeddings
        muon = (
            not flat
            and config.matrices == "muon"
            and id(parameter) in linears
            and "head" not in name
        )
        decay = 0.0 if flat else config.weight_decay
        if rule is not None and rule.weight_decay is not None:
            decay = rule.weight_decay
        scale = 1.0 if rule is None else rule.scale
        groups.setdefault((muon, scale, decay), []).append((name, parameter))
    idle = [rule.match for rule in config.rules if rule not in used]
    if idle:
        raise ValueError(f"optimizer.rules: {idle[0]!r} fits the name of no trained parameter")
    made = [_optimizer(groups, config, muon=muon) for muon in (False, True)]
    found = [optimizer for optimizer in made if optimizer is not None]
    if not found:
        raise ValueError("optimizer: there is no parameter to train")
    return found


def _optimizer(
    groups: dict[tuple[bool, float, float], list[tuple[str, Tensor]]],
    config: OptimizerConfig,
    *,
    muon: bool,
) -> torch.optim.Optimizer | None:
    peak = config.matrix_learning_rate if muon else config.learning_rate
    chosen: list[dict[str, Any]] = [
        {"params": members, "lr": peak * scale, "peak": peak * scale, "weight_decay": decay}
        for (own, scale, decay), members in sorted(groups.items(), key=lambda item: item[0])
        if own == muon
    ]
    if not chosen:
        return None
    if muon:
        return torch.optim.Muon(chosen, lr=peak, momentum=MOMENTUM)
    first = chosen[0]["params"][0][1]
    # One pass over memory instead of ten; on a CPU torch's default is a loop over parameters.
    fused = not isinstance(first, DTensor) or first.device.type == "cuda"
    return torch.optim.AdamW(chosen, lr=peak, betas=config.betas, fused=fused)


def describe(optimizers: Sequence[torch.optim.Optimizer]) -> str:
    """One line per parameter group: what moves it, how fast, how many numbers, which they are."""
    lines = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            names: list[str] = group["param_names"]
            kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
            listed = ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} more" * (len(kinds) > 4))
            count = sum(parameter.numel() for parameter in group["params"])
            lines.append(
                f"{type(optimizer).__name__}: {count:,} parameters, peak {group['peak']:.3g}, "
                f"decay {group['weight_decay']:.3g}: {listed}"
            )
    return "\n".join(lines)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def clip_gradients(parameters: Sequence[nn.Parameter], bound: float) -> Tensor:
    """Scale gradients down to a norm of `bound`; returns the norm before, over all shards.

    The norm is that of the whole gradient however it is cut: shards' squares are added up over
    their processes. A bound of 0 only measures.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if bound:
        torch.nn.utils.clip_grads_with_norm_(parameters, bound, norm)
    return norm
