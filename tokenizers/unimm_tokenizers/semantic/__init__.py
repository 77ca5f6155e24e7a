"""The semantic codec: a picture to a few codes, one per region, and back."""

from unimm_tokenizers.semantic.codec import SeTokCodec, SeTokConfig

__all__ = ["SeTokCodec", "SeTokConfig"]
