"""What all measures share: the checks of their inputs."""

from __future__ import annotations

import torch
from torch import Tensor

CEILING = 100.0  # dB, of an exact copy: a mean over samples stays a number


def check(made: Tensor, real: Tensor) -> None:
    """Refuse two signals that are not of one shape (B, C, *signal).

    Raises:
        ValueError: they are not; a reference that was cropped otherwise ends here.
    """
    if made.shape != real.shape or made.ndim < 3 or not made.numel():
        raise ValueError(
            f"metrics: expected two signals of one shape (B, C, *signal), got "
            f"{tuple(made.shape)} and {tuple(real.shape)}"
        )


def undefined(signal: Tensor) -> Tensor:
    """NaN for every sample of (B, ...)."""
    return torch.full((len(signal),), float("nan"), dtype=torch.float64)
