"""Quantizers behind one signature: latents (B, D, *grid) -> codes (B, K, *grid)."""

from unimm_tokenizers.quantize.base import Quantized, Quantizer
from unimm_tokenizers.quantize.finite import FiniteScalarQuantizer
from unimm_tokenizers.quantize.vector import ResidualVectorQuantizer

__all__ = ["FiniteScalarQuantizer", "Quantized", "Quantizer", "ResidualVectorQuantizer"]
