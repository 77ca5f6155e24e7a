"""LPIPS, version 0.1 (Zhang et al., arXiv 1801.03924): distance of unit-length network features.

Trunks are the convolutions of AlexNet or VGG-16 in torchvision's state dicts, heads the 1x1 weights
of the package `lpips`; agreement with that package was checked on random weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class _Conv(NamedTuple):
    index: int  # in torchvision's `features`
    stride: int = 1
    padding: int = 1
    pool: tuple[int, int] | None = None  # window and stride of the pooling before it
    tap: bool = False  # whether its output is compared


_TRUNKS: dict[str, Sequence[_Conv]] = {
    "alex": (
        _Conv(0, 4, 2, tap=True),
        _Conv(3, padding=2, pool=(3, 2), tap=True),
        _Conv(6, pool=(3, 2), tap=True),
        _Conv(8, tap=True),
        _Conv(10, tap=True),
    ),
    "vgg": (
        _Conv(0),
        _Conv(2, tap=True),
        _Conv(5, pool=(2, 2)),
        _Conv(7, tap=True),
        _Conv(10, pool=(2, 2)),
        _Conv(12),
        _Conv(14, tap=True),
        _Conv(17, pool=(2, 2)),
        _Conv(19),
        _Conv(21, tap=True),
        _Conv(24, pool=(2, 2)),
        _Conv(26),
        _Conv(28, tap=True),
    ),
}


class LPIPS:
    """A distance of pictures.

    Args:
        network: "alex" or "vgg".
        trunk: torchvision's state dict of AlexNet or VGG-16.
        heads: the package's state dict of five heads, `lin0.model.1.weight` and so on.

    Raises:
        ValueError: a state dict lacks a tensor that the network needs.
    """

    def __init__(
        self, network: str, trunk: Mapping[str, Tensor], heads: Mapping[str, Tensor]
    ) -> None:
        self.layers = _TRUNKS[network]
        try:
            self.weights = [
                (trunk[f"features.{layer.index}.weight"], trunk[f"features.{layer.index}.bias"])
                for layer in self.layers
            ]
            taps = sum(layer.tap for layer in self.layers)
            self.heads = [heads[f"lin{i}.model.1.weight"] for i in range(taps)]
        except KeyError as error:
            raise ValueError(f"LPIPS on {network}: the weights hold no {error}") from None
        self.shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        self.scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)

    @torch.no_grad()
    def __call__(self, made: Tensor, real: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> distances (B,)."""
        total = torch.zeros(len(made))
        pairs = zip(self._features(made), self._features(real), self.heads, strict=True)
        for first, second, head in pairs:
            error = (_unit(first) - _unit(second)).square()
            total += F.conv2d(error, head).mean(dim=(1, 2, 3))
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        x = (x.float() - self.shift) / self.scale
        taps = []
        for layer, (weight, bias) in zip(self.layers, self.weights, strict=True):
            if layer.pool is not None:
                x = F.max_pool2d(x, *layer.pool)
            x = F.relu(F.conv2d(x, weight, bias, layer.stride, layer.padding))
            if layer.tap:
                taps.append(x)
        return taps


def _unit(x: Tensor) -> Tensor:
    """Of unit length over the channels."""
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
