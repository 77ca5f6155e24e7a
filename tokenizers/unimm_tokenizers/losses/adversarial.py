"""Losses of codec and discriminator, in float32 whatever the autocast type."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.ranks import sum_over_ranks, world_size


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss (Lim and Ye, arXiv 1705.02894) of the scores of real and made signals; scalar."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def generator_hinge(fake: Tensor) -> Tensor:
    """Scalar loss of the codec, from the scores of what it made."""
    return -fake.float().mean()


def feature_distance(made: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean over layers of L1 between a discriminator's features, by the real ones' mean size."""
    distances = [
        F.l1_loss(a.float(), b.float()) / b.float().abs().mean().clamp(min=1e-5)
        for a, b in zip(made, real, strict=True)
    ]
    return torch.stack(distances).mean()


class LeCam(nn.Module):
    """LeCAM regularization (Tseng et al., arXiv 2104.03310, section 3.2).

    Scores of real signals may not run away from the moving average of the made ones' and the other
    way round: a discriminator of little data otherwise learns it by heart.

    Args:
        decay: of the averages (Open-MAGVIT2: 0.999).
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.real: Tensor
        self.fake: Tensor
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Scores -> scalar penalty; moves the averages."""
        real, fake = real.float(), fake.float()
        means = torch.stack([real.mean(), fake.mean()]).detach()
        means = sum_over_ranks(means) / world_size()
        for average, mean in zip((self.real, self.fake), means, strict=True):
            average.lerp_(mean, 1 - self.decay)
        to_fake = F.relu(real - self.fake).square().mean()
        return to_fake + F.relu(self.real - fake).square().mean()


def r1_penalty(score: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """Half the mean squared gradient of scores at real signals (R1: arXiv 1801.04406).

    Args:
        score: the discriminator.
        real: (B, C, *signal).
    """
    real = real.detach().float().requires_grad_()
    with torch.autocast(real.device.type, enabled=False):
        scores = score(real).flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()
