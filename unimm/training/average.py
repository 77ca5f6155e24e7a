"""Exponential moving average of weights (Polyak and Juditsky, 1992; Karras et al., 2312.02696)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """An average beside the weights, moved after every step.

    Its decay at step n is min(decay, (n + 1) / (n + 10)), so that the first steps are soon
    forgotten (as in TensorFlow's `ExponentialMovingAverage`). Shards have sharded averages.

    Args:
        module: whose parameters are averaged.
        decay: of the long run, for example 0.999.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"average: the decay must lie between 0 and 1, got {decay}")
        self.decay = decay
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
        """Move towards the weights after `step` steps."""
        weight = 1 - min(self.decay, (step + 1) / (step + 10))
        for name, parameter in parameters:
            kept = self.weights[name]
            if kept.device != parameter.device:  # made before the model went to its device
                kept = self.weights[name] = kept.to(parameter.device)
            kept.lerp_(parameter.detach(), weight)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over averages of the same names."""
        for name, kept in self.weights.items():
            kept.copy_(weights[name])
