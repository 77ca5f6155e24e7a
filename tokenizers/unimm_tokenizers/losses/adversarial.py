"""Hinge losses (Lim and Ye, arXiv 1705.02894), in float32 whatever the autocast type."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Scalar loss of the discriminator, from its scores of real and made signals."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def generator_hinge(fake: Tensor) -> Tensor:
    """Scalar loss of the codec, from the scores of what it made."""
    return -fake.float().mean()
