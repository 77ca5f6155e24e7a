"""Distances of spectra: multi-resolution STFT, multi-scale mel."""

from __future__ import annotations

import torch
import torchaudio
from torch import Tensor, nn

MEL_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))


class MultiResolutionSTFT(nn.Module):
    """Mean over resolutions of spectral convergence plus L1 of log magnitudes.

    Yamamoto et al., arXiv 1910.11480, section 2.2.

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
        return magnitudes(x, size).clamp(min=1e-5)


class MultiScaleMel(nn.Module):
    """Mean over scales of L1 of log10 mel magnitudes (DAC, arXiv 2306.06546, section 3.4).

    Args:
        sample_rate: of the sound, in Hz.
        scales: window lengths in samples, and the number of mel bands of each.
    """

    def __init__(
        self,
        sample_rate: int,
        scales: tuple[tuple[int, int], ...] = MEL_SCALES,
    ) -> None:
        super().__init__()
        self.scales = scales
        self.filters = [mel_filters(sample_rate, size, bands) for size, bands in scales]

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        """(B, C, T) float -> scalar; T must exceed half of the longest window."""
        distances = []
        for (size, _), filters in zip(self.scales, self.filters, strict=True):
            weights = filters.to(made.device)
            a, b = (weights @ magnitudes(x, size) for x in (made, real))
            distances.append((a.clamp(min=1e-5).log10() - b.clamp(min=1e-5).log10()).abs().mean())
        return torch.stack(distances).mean()


def magnitudes(x: Tensor, size: int) -> Tensor:
    """(B, C, T) -> (B * C, size // 2 + 1, frames), hop a quarter of the window."""
    window = torch.hann_window(size, device=x.device)
    sounds = x.flatten(0, 1).float()
    return torch.stft(sounds, size, size // 4, window=window, return_complex=True).abs()


def mel_filters(sample_rate: int, window: int, bands: int) -> Tensor:
    """Triangular filters (bands, window // 2 + 1) on Slaney's mel scale, each of unit area."""
    bins = window // 2 + 1
    filters = torchaudio.functional.melscale_fbanks(
        bins, 0.0, sample_rate / 2, bands, sample_rate, norm="slaney", mel_scale="slaney"
    )
    return filters.T.contiguous()
