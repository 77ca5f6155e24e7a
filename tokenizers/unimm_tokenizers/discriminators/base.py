"""What every discriminator is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Discriminator(nn.Module, ABC):
    """Scores signals: high for real ones, low for made ones."""

    def accepts(self, x: Tensor) -> bool:
        """Whether it has anything to say of signals (B, C, *signal) of this kind."""
        return True

    @abstractmethod
    def features(self, x: Tensor) -> list[Tensor]:
        """What its layers make of signals, for feature matching; the scores come last."""

    def forward(self, x: Tensor) -> Tensor:
        """Scores of signals (B, C, *signal)."""
        return self.features(x)[-1]


def outputs(body: nn.Sequential, x: Tensor) -> list[Tensor]:
    """What comes out of every activation of a stack, and out of its last layer."""
    found = []
    for place, layer in enumerate(body, start=1):
        x = layer(x)
        if isinstance(layer, nn.LeakyReLU) or place == len(body):
            found.append(x)
    return found


def side_by_side(parts: list[list[Tensor]]) -> list[Tensor]:
    """Features of several scorers: all inner ones, then all scores (N, n) in a row."""
    inner = [feature for part in parts for feature in part[:-1]]
    return [*inner, torch.cat([part[-1].flatten(1) for part in parts], dim=1)]
