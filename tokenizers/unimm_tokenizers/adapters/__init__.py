"""Other people's codecs behind the codec interface: classical ones and other libraries'."""

from unimm_tokenizers.adapters.base import AdaptedCodec
from unimm_tokenizers.adapters.byte_codec import ByteCodec, ClassicalConfig
from unimm_tokenizers.adapters.classical_image import PillowCodec
from unimm_tokenizers.adapters.classical_media import FilmFileCodec, SoundFileCodec
from unimm_tokenizers.adapters.diffusers_vq import DiffusersAdapter
from unimm_tokenizers.adapters.function import FunctionCodec, FunctionConfig
from unimm_tokenizers.adapters.open import (
    adapt,
    classical,
    classical_formats,
    open_checkpoint,
)
from unimm_tokenizers.adapters.torchscript import TorchScriptAdapter, TorchScriptConfig
from unimm_tokenizers.adapters.transformers_audio import DacAdapter, EncodecAdapter, MimiAdapter
from unimm_tokenizers.adapters.transformers_image import (
    ChameleonAdapter,
    Emu3Adapter,
    JanusAdapter,
)

__all__ = [
    "AdaptedCodec",
    "ByteCodec",
    "ChameleonAdapter",
    "ClassicalConfig",
    "DacAdapter",
    "DiffusersAdapter",
    "Emu3Adapter",
    "EncodecAdapter",
    "FilmFileCodec",
    "FunctionCodec",
    "FunctionConfig",
    "JanusAdapter",
    "MimiAdapter",
    "PillowCodec",
    "SoundFileCodec",
    "TorchScriptAdapter",
    "TorchScriptConfig",
    "adapt",
    "classical",
    "classical_formats",
    "open_checkpoint",
]
