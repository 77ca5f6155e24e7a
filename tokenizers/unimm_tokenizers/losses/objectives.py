"""What a codec is trained for: named, weighted terms over one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.codec import CodecOutput
from unimm_tokenizers.losses.spectral import MultiResolutionSTFT


class Objective(nn.Module, ABC):
    """Terms of a reconstruction loss; the quantizer's own loss and the adversary come on top."""

    @abstractmethod
    def forward(self, output: CodecOutput) -> dict[str, Tensor]:
        """One pass -> weighted scalar terms by name."""


class PictureObjective(Objective):
    """L1, L2 and multi-scale gradients of pictures or film.

    The gradient term is a weight-free stand-in for a learned perceptual loss: it asks for edges in
    the right place at four scales.

    Args:
        l1, l2, gradient: weights of the terms.
    """

    def __init__(self, l1: float = 1.0, l2: float = 1.0, gradient: float = 0.5) -> None:
        super().__init__()
        self.l1, self.l2, self.gradient = l1, l2, gradient

    def forward(self, output: CodecOutput) -> dict[str, Tensor]:
        """See `Objective.forward`."""
        made, real = output.reconstruction.float(), output.target.float()
        if made.ndim == 5:
            made, real = (x.transpose(1, 2).flatten(0, 1) for x in (made, real))
        return {
            "l1": self.l1 * F.l1_loss(made, real),
            "l2": self.l2 * F.mse_loss(made, real),
            "gradient": self.gradient * _gradient_distance(made, real),
        }


def _gradient_distance(made: Tensor, real: Tensor, scales: int = 4) -> Tensor:
    total = made.new_zeros(())
    for _ in range(scales):
        for axis in (2, 3):
            if made.shape[axis] > 1:
                total = total + F.l1_loss(made.diff(dim=axis), real.diff(dim=axis))
        if min(made.shape[2:]) < 2:
            break
        made, real = F.avg_pool2d(made, 2), F.avg_pool2d(real, 2)
    return total / scales


class WaveformObjective(Objective):
    """L1 of samples and multi-resolution spectral distance of sound (B, C, T).

    Args:
        l1, spectral: weights of the terms.
        windows: window lengths of the spectral term, in samples.
    """

    def __init__(
        self,
        l1: float = 1.0,
        spectral: float = 1.0,
        windows: tuple[int, ...] = (128, 256, 512, 1024),
    ) -> None:
        super().__init__()
        self.l1, self.spectral = l1, spectral
        self.distance = MultiResolutionSTFT(tuple(windows))

    def forward(self, output: CodecOutput) -> dict[str, Tensor]:
        """See `Objective.forward`."""
        made, real = output.reconstruction.float(), output.target.float()
        return {
            "l1": self.l1 * F.l1_loss(made, real),
            "spectral": self.spectral * self.distance(made, real),
        }


class SpectrumObjective(Objective):
    """L1 and L2 of scaled log spectra (B, bins, frames), louder bins counting for more.

    Args:
        l1, l2: weights of the terms.
        loudness: how much more the loudest bin counts than the softest.
    """

    def __init__(self, l1: float = 1.0, l2: float = 1.0, loudness: float = 4.0) -> None:
        super().__init__()
        self.l1, self.l2, self.loudness = l1, l2, loudness

    def forward(self, output: CodecOutput) -> dict[str, Tensor]:
        """See `Objective.forward`."""
        made, real = output.reconstruction.float(), output.target.float()
        low, high = real.amin((1, 2), keepdim=True), real.amax((1, 2), keepdim=True)
        share = (real - low) / (high - low).clamp(min=1e-3)
        weight = 1 + (self.loudness - 1) * share
        weight = weight / weight.mean()
        difference = made - real
        return {
            "l1": self.l1 * (weight * difference.abs()).mean(),
            "l2": self.l2 * (weight * difference.square()).mean(),
        }


def total(terms: dict[str, Tensor]) -> Tensor:
    """Sum of the terms, in float32."""
    return torch.stack([term.float() for term in terms.values()]).sum()
