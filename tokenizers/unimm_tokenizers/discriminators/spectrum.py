"""Discriminators of waveforms by their short-time spectra, whole or in bands."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from unimm_tokenizers.discriminators.base import Discriminator, outputs, side_by_side
from unimm_tokenizers.discriminators.patch import PatchDiscriminator

# Edges of the bands as shares of the spectrum (Kumar et al., arXiv 2306.06546, section 3.3).
BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


def complex_spectrum(x: Tensor, window: int) -> Tensor:
    """Sound (B, C, T) -> real and imaginary parts (B * C, 2, window // 2 + 1, frames)."""
    hann = torch.hann_window(window, device=x.device)
    spectrum = torch.stft(
        x.flatten(0, 1).float(), window, window // 4, window=hann, return_complex=True
    )
    return torch.view_as_real(spectrum).movedim(-1, 1)


class SpectrumDiscriminator(Discriminator):
    """Complex spectra as pictures (SoundStream, arXiv 2107.03312, section III.D).

    Args:
        windows: window lengths in samples, one scorer each; the hop is a quarter.
        channels: width of each scorer's first layer.
    """

    def __init__(self, windows: tuple[int, ...] = (256, 512), channels: int = 16) -> None:
        super().__init__()
        self.windows = windows
        self.scorers = nn.ModuleList(PatchDiscriminator(2, channels) for _ in windows)

    def accepts(self, x: Tensor) -> bool:
        """Waveforms (B, C, T) longer than half of the longest window."""
        return _sounds(x, max(self.windows))

    def features(self, x: Tensor) -> list[Tensor]:
        """See `Discriminator.features`; scores (B * C, n), all resolutions side by side."""
        parts = []
        for size, scorer in zip(self.windows, self.scorers, strict=True):
            assert isinstance(scorer, PatchDiscriminator)
            parts.append(scorer.features(complex_spectrum(x, size)))
        return side_by_side(parts)


class BandDiscriminator(Discriminator):
    """Multi-band, multi-scale complex spectra (DAC, arXiv 2306.06546, section 3.3).

    Each band of each resolution has layers of its own: what a scorer learns of voices does not
    have to serve for hiss.

    Args:
        windows: window lengths in samples; the hop is a quarter.
        channels: width of the layers.
    """

    def __init__(self, windows: tuple[int, ...] = (2048, 1024, 512), channels: int = 32) -> None:
        super().__init__()
        self.windows = windows
        self.scorers = nn.ModuleList(_band(channels) for _ in windows for _ in BANDS[1:])

    def accepts(self, x: Tensor) -> bool:
        """Waveforms (B, C, T) longer than half of the longest window."""
        return _sounds(x, max(self.windows))

    def features(self, x: Tensor) -> list[Tensor]:
        """See `Discriminator.features`; scores (B * C, n)."""
        parts, scorers = [], iter(self.scorers)
        for size in self.windows:
            spectrum = complex_spectrum(x, size).transpose(2, 3)  # frames before bins
            edges = [round(share * spectrum.shape[3]) for share in BANDS]
            for low, high in pairwise(edges):
                scorer = next(scorers)
                assert isinstance(scorer, nn.Sequential)
                parts.append(outputs(scorer, spectrum[..., low:high]))
        return side_by_side(parts)


def _band(channels: int) -> nn.Sequential:
    """Layers over (N, 2, frames, bins) of a band; bins are halved three times."""
    layers: list[nn.Module] = []
    width = 2
    for stride in (1, 2, 2, 2):
        convolution = nn.Conv2d(width, channels, (3, 9), (1, stride), (1, 4))
        layers += [spectral_norm(convolution), nn.LeakyReLU(0.1)]
        width = channels
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(channels, 1, 3, padding=1)))


def _sounds(x: Tensor, window: int) -> bool:
    return x.ndim == 3 and x.shape[1] <= 2 and x.shape[2] > window // 2
