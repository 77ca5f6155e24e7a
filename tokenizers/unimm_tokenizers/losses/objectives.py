"""What a codec is trained for: named, weighted terms over one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.audio.spectral import unscaled
from unimm_tokenizers.codec import CodecOutput
from unimm_tokenizers.losses.perceptual import Lpips, StructuralDistance
from unimm_tokenizers.losses.spectral import MultiResolutionSTFT, MultiScaleMel, mel_filters


class Objective(nn.Module, ABC):
    """Terms of a reconstruction loss; the quantizer's own loss and the adversary come on top."""

    @property
    def note(self) -> str:
        """What a reader of the training log must know of this objective."""
        return ""

    @abstractmethod
    def forward(self, output: CodecOutput) -> dict[str, Tensor]:
        """One pass -> weighted scalar terms by name."""


class PictureObjective(Objective):
    """L1 and L2 of pictures or film, and a perceptual distance.

    Args:
        l1, l2: weights of the terms.
        gradient, cosine: weights of the weight-free stand-in, `StructuralDistance`.
        perceptual: LPIPS from a file; None leaves the stand-in alone.
        perceptual_weight: its weight.
    """

    def __init__(
        self,
        l1: float = 1.0,
        l2: float = 1.0,
        gradient: float = 0.5,
        cosine: float = 0.0,
        perceptual: Lpips | None = None,
        perceptual_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.l1, self.l2 = l1, l2
        self.structure = StructuralDistance(gradient, cosine)
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight

    @property
    def note(self) -> str:
        """See `Objective.note`."""
        if self.perceptual is not None:
            return "perceptual distance: LPIPS"
        return "perceptual distance: none learned; gradients and cosine transforms stand in"

    def forward(self, output: CodecOutput) -> dict[str, Tensor]:
        """See `Objective.forward`."""
        made, real = output.reconstruction.float(), output.target.float()
        if made.ndim == 5:
            made, real = (x.transpose(1, 2).flatten(0, 1) for x in (made, real))
        terms = {
            "l1": self.l1 * F.l1_loss(made, real),
            "l2": self.l2 * F.mse_loss(made, real),
            **self.structure(made, real),
        }
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual_weight * self.perceptual(made, real)
        return terms


class WaveformObjective(Objective):
    """L1 of samples, multi-resolution spectral distance and mel distance of sound (B, C, T).

    Args:
        l1, spectral, mel: weights of the terms; without weight no mel term.
        windows: window lengths of the spectral term, in samples.
        sample_rate: of the sound, in Hz, for the mel term.
    """

    def __init__(
        self,
        l1: float = 1.0,
        spectral: float = 1.0,
        windows: tuple[int, ...] = (128, 256, 512, 1024),
        mel: float = 0.0,
        sample_rate: int = 24000,
    ) -> None:
        super().__init__()
        self.l1, self.spectral, self.mel = l1, spectral, mel
        self.bands = MultiScaleMel(sample_rate) if mel else None
        self.distance = MultiResolutionSTFT(tuple(windows))

    def forward(self, output: CodecOutput) -> dict[str, Tensor]:
        """See `Objective.forward`."""
        made, real = output.reconstruction.float(), output.target.float()
        terms = {
            "l1": self.l1 * F.l1_loss(made, real),
            "spectral": self.spectral * self.distance(made, real),
        }
        if self.bands is not None:
            terms["mel"] = self.mel * self.bands(made, real)
        return terms


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


class MelSpectrumObjective(SpectrumObjective):
    """`SpectrumObjective`, and L1 of log mel magnitudes, which is how ears share out the bins.

    Args:
        l1, l2, loudness: see `SpectrumObjective`.
        mel: weight of the mel term.
        sample_rate: of the sound, in Hz.
        window: its spectrum's window, in samples: bins are window // 2 + 1.
        bands: numbers of mel bands, each a term of its own.
    """

    def __init__(
        self,
        l1: float = 1.0,
        l2: float = 1.0,
        loudness: float = 4.0,
        mel: float = 1.0,
        sample_rate: int = 16000,
        window: int = 640,
        bands: tuple[int, ...] = (20, 80),
    ) -> None:
        super().__init__(l1, l2, loudness)
        self.mel = mel
        self.filters = [mel_filters(sample_rate, window, count) for count in bands]

    def forward(self, output: CodecOutput) -> dict[str, Tensor]:
        """See `Objective.forward`."""
        # A magnitude is below e^8 for any window that fits into memory.
        made, real = (
            unscaled(x.float()).clamp(max=8).exp() for x in (output.reconstruction, output.target)
        )
        distances = [
            ((filters.to(made) @ made).log() - (filters.to(made) @ real).log()).abs().mean()
            for filters in self.filters
        ]
        return {**super().forward(output), "mel": self.mel * torch.stack(distances).mean()}


def total(terms: dict[str, Tensor]) -> Tensor:
    """Sum of the terms, in float32."""
    return torch.stack([term.float() for term in terms.values()]).sum()
