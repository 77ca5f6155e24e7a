"""The decoder-only transformer, in pure torch: it knows V ids, never modalities."""

from unimm.model.cache import KVCache
from unimm.model.config import ModelConfig
from unimm.model.decoder import UnifiedLM

__all__ = ["KVCache", "ModelConfig", "UnifiedLM"]
