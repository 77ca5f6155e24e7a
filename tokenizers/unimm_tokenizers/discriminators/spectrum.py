"""Complex-spectrum discriminator of waveforms (SoundStream, arXiv 2107.03312, section III.D)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unimm_tokenizers.discriminators.base import Discriminator
from unimm_tokenizers.discriminators.patch import PatchDiscriminator


class SpectrumDiscriminator(Discriminator):
    """Scores waveforms (B, 1, T) by real and imaginary parts of their short-time spectra.

    Args:
        windows: window lengths in samples, one scorer each; the hop is a quarter.
        channels: width of each scorer's first layer.
    """

    def __init__(self, windows: tuple[int, ...] = (256, 512), channels: int = 16) -> None:
        super().__init__()
        self.windows = windows
        self.scorers = nn.ModuleList(PatchDiscriminator(2, channels) for _ in windows)

    def forward(self, x: Tensor) -> Tensor:
        """-> scores (B, n), all resolutions side by side."""
        scores = []
        for size, scorer in zip(self.windows, self.scorers, strict=True):
            window = torch.hann_window(size, device=x.device)
            spectrum = torch.stft(
                x.flatten(0, 1).float(), size, size // 4, window=window, return_complex=True
            )
            scores.append(scorer(torch.view_as_real(spectrum).movedim(-1, 1)).flatten(1))
        return torch.cat(scores, dim=1)
