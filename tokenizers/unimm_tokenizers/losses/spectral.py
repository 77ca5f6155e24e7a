"""Multi-resolution spectral distance (Yamamoto et al., arXiv 1910.11480, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MultiResolutionSTFT(nn.Module):
    """Mean over resolutions of spectral convergence plus L1 of log magnitudes.

    Args:
        windows: window lengths in samples; the hop is a quarter of each.
    """

    def __init__(self, windows: tuple[int, ...] = (128, 256, 512, 1024)) -> None:
        super().__init__()
        self.windows = windows

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        """(B, C, T) float -> scalar; T must exceed half of the longest window."""
        total = made.new_zeros(())
        for size in self.windows:
            a, b = self._magnitudes(made, size), self._magnitudes(real, size)
            total = (
                total + (a - b).norm() / b.norm().clamp(min=1e-5) + (a.log() - b.log()).abs().mean()
            )
        return total / len(self.windows)

    @staticmethod
    def _magnitudes(x: Tensor, size: int) -> Tensor:
        window = torch.hann_window(size, device=x.device)
        spectrum = torch.stft(
            x.flatten(0, 1).float(), size, size // 4, window=window, return_complex=True
        )
        return spectrum.abs().clamp(min=1e-5)
