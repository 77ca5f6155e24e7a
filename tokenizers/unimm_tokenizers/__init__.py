"""Codecs: signals to local codes (B, K, *grid) and back. They know nothing of the library above."""

from unimm_tokenizers.codec import Codec, CodecOutput, register_codec
from unimm_tokenizers.presets import build_codec, presets
from unimm_tokenizers.quantize import Quantized, Quantizer

__all__ = [
    "Codec",
    "CodecOutput",
    "Quantized",
    "Quantizer",
    "build_codec",
    "presets",
    "register_codec",
]
