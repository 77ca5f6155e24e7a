"""What every discriminator is."""

from __future__ import annotations

from torch import Tensor, nn


class Discriminator(nn.Module):
    """Scores signals: high for real ones, low for made ones."""

    def accepts(self, x: Tensor) -> bool:
        """Whether it has anything to say of signals (B, C, *signal) of this kind."""
        return True
