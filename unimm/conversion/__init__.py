"""Weights of other people's models: Hugging Face folders (Llama family, Chameleon) <-> bundles.

Needs nothing of `transformers`: it reads and writes config, safetensors and `tokenizer.json`.
"""

from unimm.conversion.bundle import Converted, convert, from_hugging_face, to_hugging_face

__all__ = ["Converted", "convert", "from_hugging_face", "to_hugging_face"]
