"""Training losses of codecs, in plain torch."""

from unimm_tokenizers.losses.adversarial import discriminator_hinge, generator_hinge
from unimm_tokenizers.losses.objectives import (
    Objective,
    PictureObjective,
    SpectrumObjective,
    WaveformObjective,
)
from unimm_tokenizers.losses.spectral import MultiResolutionSTFT

__all__ = [
    "MultiResolutionSTFT",
    "Objective",
    "PictureObjective",
    "SpectrumObjective",
    "WaveformObjective",
    "discriminator_hinge",
    "generator_hinge",
]
