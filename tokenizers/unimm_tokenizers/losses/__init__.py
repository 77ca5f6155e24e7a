"""Training losses of codecs, in plain torch."""

from unimm_tokenizers.losses.adversarial import (
    LeCam,
    discriminator_hinge,
    generator_hinge,
    r1_penalty,
)
from unimm_tokenizers.losses.objectives import (
    Objective,
    PictureObjective,
    SpectrumObjective,
    WaveformObjective,
)
from unimm_tokenizers.losses.perceptual import Lpips, StructuralDistance, pack_lpips
from unimm_tokenizers.losses.spectral import MultiResolutionSTFT

__all__ = [
    "LeCam",
    "Lpips",
    "MultiResolutionSTFT",
    "Objective",
    "PictureObjective",
    "SpectrumObjective",
    "StructuralDistance",
    "WaveformObjective",
    "discriminator_hinge",
    "generator_hinge",
    "pack_lpips",
    "r1_penalty",
]
