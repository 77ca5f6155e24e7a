"""Training losses of codecs, in plain torch."""

from unimm_tokenizers.losses.adversarial import (
    LeCam,
    discriminator_hinge,
    feature_distance,
    generator_hinge,
    r1_penalty,
)
from unimm_tokenizers.losses.distillation import SemanticDistillation
from unimm_tokenizers.losses.objectives import (
    MelSpectrumObjective,
    Objective,
    PictureObjective,
    SpectrumObjective,
    WaveformObjective,
)
from unimm_tokenizers.losses.perceptual import Lpips, StructuralDistance, pack_lpips
from unimm_tokenizers.losses.spectral import MultiResolutionSTFT, MultiScaleMel

__all__ = [
    "LeCam",
    "Lpips",
    "MelSpectrumObjective",
    "MultiResolutionSTFT",
    "MultiScaleMel",
    "Objective",
    "PictureObjective",
    "SemanticDistillation",
    "SpectrumObjective",
    "StructuralDistance",
    "WaveformObjective",
    "discriminator_hinge",
    "feature_distance",
    "generator_hinge",
    "pack_lpips",
    "r1_penalty",
]
