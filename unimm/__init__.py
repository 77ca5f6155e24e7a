# pyright: strict

"""unimm: one vocabulary, one decoder-only transformer, every modality in and out.

Names resolve on first use, so that `import unimm` loads neither torch nor numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the room that defines it.
_HOMES = {
    "Audio": "unimm.signals",
    "Semantic": "unimm.signals",
    "Turn": "unimm.signals",
    "Video": "unimm.signals",
    "Vocabulary": "unimm.vocabulary",
    "UnifiedTokenizer": "unimm.tokenizer",
    "ModelConfig": "unimm.model",
    "UnifiedLM": "unimm.model",
    "build_codec": "unimm_tokenizers",
    "load_codec": "unimm.tokenizer",
    "presets": "unimm_tokenizers",
    "push_to_hub": "unimm.checkpoint",
    "Chat": "unimm.generation",
    "classify": "unimm.generation",
    "extend": "unimm.generation",
    "generate": "unimm.generation",
    "infill": "unimm.generation",
    "reconstruct": "unimm.views",
    "score": "unimm.generation",
    "show": "unimm.views",
    "stream": "unimm.generation",
}

__all__ = [
    "Audio",
    "Chat",
    "ModelConfig",
    "Semantic",
    "Turn",
    "UnifiedLM",
    "UnifiedTokenizer",
    "Video",
    "Vocabulary",
    "__version__",
    "build_codec",
    "classify",
    "extend",
    "generate",
    "infill",
    "load_codec",
    "presets",
    "push_to_hub",
    "reconstruct",
    "score",
    "show",
    "stream",
]

if TYPE_CHECKING:
    from unimm.checkpoint import push_to_hub
    from unimm.generation import Chat, classify, extend, generate, infill, score, stream
    from unimm.model import ModelConfig, UnifiedLM
    from unimm.signals import Audio, Semantic, Turn, Video
    from unimm.tokenizer import UnifiedTokenizer, load_codec
    from unimm.views import reconstruct, show
    from unimm.vocabulary import Vocabulary
    from unimm_tokenizers import build_codec, presets


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unimm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
