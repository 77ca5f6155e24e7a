"""Adversaries that codecs are trained against."""

from unimm_tokenizers.discriminators.patch import PatchDiscriminator
from unimm_tokenizers.discriminators.spectrum import SpectrumDiscriminator

__all__ = ["PatchDiscriminator", "SpectrumDiscriminator"]
