"""Audio codecs: causal, strided, residual; waveform and spectral families."""

from unimm_tokenizers.audio.config import SoundConfig
from unimm_tokenizers.audio.soundstream import SoundStreamCodec, SoundStreamConfig
from unimm_tokenizers.audio.spectral import SpectralCodec, SpectralConfig
from unimm_tokenizers.audio.streaming import StreamingCodec, StreamState

__all__ = [
    "SoundConfig",
    "SoundStreamCodec",
    "SoundStreamConfig",
    "SpectralCodec",
    "SpectralConfig",
    "StreamState",
    "StreamingCodec",
]
