"""Kernels of unimm's hot path: each op with a plain torch reference and a Triton version.

Every op takes `implementation=None | "triton" | "torch"`: None chooses "triton" for CUDA tensors
and "torch" for all others. Each file states its formula, shapes, dtypes and sources.
"""

from unimm_kernels.attention import attention
from unimm_kernels.code_sums import code_sums
from unimm_kernels.decode_attention import decode_attention
from unimm_kernels.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from unimm_kernels.nearest_code import ScoredCodes, nearest_code, scored_codes
from unimm_kernels.residual_nearest_code import residual_nearest_code
from unimm_kernels.rms_norm import rms_norm
from unimm_kernels.rotary import pairs_per_axis, qk_norm_rotary, rotary
from unimm_kernels.swiglu import swiglu

__all__ = [
    "LinearCrossEntropy",
    "ScoredCodes",
    "attention",
    "code_sums",
    "decode_attention",
    "linear_cross_entropy",
    "nearest_code",
    "pairs_per_axis",
    "qk_norm_rotary",
    "residual_nearest_code",
    "rms_norm",
    "rotary",
    "scored_codes",
    "swiglu",
]
