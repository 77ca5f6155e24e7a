"""Discriminators: adversaries that codecs train against."""

from unimm_tokenizers.discriminators.base import Discriminator
from unimm_tokenizers.discriminators.motion import MotionDiscriminator
from unimm_tokenizers.discriminators.patch import PatchDiscriminator
from unimm_tokenizers.discriminators.period import PeriodDiscriminator
from unimm_tokenizers.discriminators.spectrum import BandDiscriminator, SpectrumDiscriminator

__all__ = [
    "BandDiscriminator",
    "Discriminator",
    "MotionDiscriminator",
    "PatchDiscriminator",
    "PeriodDiscriminator",
    "SpectrumDiscriminator",
]
