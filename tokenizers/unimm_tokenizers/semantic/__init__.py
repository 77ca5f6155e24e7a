"""Semantic codecs: a picture to as many codes as it has regions, and back."""

from unimm_tokenizers.semantic.codec import SemanticCodec, SeTokCodec
from unimm_tokenizers.semantic.config import SemanticConfig, SeTokConfig
from unimm_tokenizers.semantic.contrast import WordsContrast
from unimm_tokenizers.semantic.frozen import FrozenSeTokCodec, FrozenSeTokConfig, register_backbone
from unimm_tokenizers.semantic.keep import KeepOrMergeCodec, KeepOrMergeConfig
from unimm_tokenizers.semantic.latent import (
    LatentSeTokCodec,
    LatentSeTokConfig,
    register_vision_codec,
)
from unimm_tokenizers.semantic.queries import CausalQueryCodec, CausalQueryConfig
from unimm_tokenizers.semantic.soft import SoftSeTokCodec, SoftSeTokConfig

__all__ = [
    "CausalQueryCodec",
    "CausalQueryConfig",
    "FrozenSeTokCodec",
    "FrozenSeTokConfig",
    "KeepOrMergeCodec",
    "KeepOrMergeConfig",
    "LatentSeTokCodec",
    "LatentSeTokConfig",
    "SeTokCodec",
    "SeTokConfig",
    "SemanticCodec",
    "SemanticConfig",
    "SoftSeTokCodec",
    "SoftSeTokConfig",
    "WordsContrast",
    "register_backbone",
    "register_vision_codec",
]
