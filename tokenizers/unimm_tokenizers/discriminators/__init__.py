"""Adversaries that codecs are trained against."""

from unimm_tokenizers.discriminators.base import Discriminator
from unimm_tokenizers.discriminators.motion import MotionDiscriminator
from unimm_tokenizers.discriminators.patch import PatchDiscriminator
from unimm_tokenizers.discriminators.spectrum import SpectrumDiscriminator

__all__ = ["Discriminator", "MotionDiscriminator", "PatchDiscriminator", "SpectrumDiscriminator"]
