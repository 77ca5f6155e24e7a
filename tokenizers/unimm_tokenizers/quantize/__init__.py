"""Quantizers behind one signature: latents (B, D, *grid) -> codes (B, K, *grid)."""

from unimm_tokenizers.quantize.base import CodeUsage, Quantized, Quantizer, code_usage
from unimm_tokenizers.quantize.binary import BinaryQuantizer
from unimm_tokenizers.quantize.factorized import FactorizedResidualQuantizer
from unimm_tokenizers.quantize.finite import FiniteScalarQuantizer
from unimm_tokenizers.quantize.index import IndexBackpropagationQuantizer
from unimm_tokenizers.quantize.linear import SimVectorQuantizer
from unimm_tokenizers.quantize.usage import UsageCounter
from unimm_tokenizers.quantize.vector import ResidualVectorQuantizer

__all__ = [
    "BinaryQuantizer",
    "CodeUsage",
    "FactorizedResidualQuantizer",
    "FiniteScalarQuantizer",
    "IndexBackpropagationQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualVectorQuantizer",
    "SimVectorQuantizer",
    "UsageCounter",
    "code_usage",
]
