"""The decoder-only transformer, in pure torch: it knows V ids, never modalities."""

from unimm.model.cache import KVCache
from unimm.model.config import ExpertsConfig, ModelConfig, RopeScaling
from unimm.model.decoder import UnifiedLM
from unimm.model.presets import preset, size_of

__all__ = [
    "ExpertsConfig",
    "KVCache",
    "ModelConfig",
    "RopeScaling",
    "UnifiedLM",
    "preset",
    "size_of",
]
