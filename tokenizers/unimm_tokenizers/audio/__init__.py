"""Audio codecs: causal, strided, residual; waveform and spectral families."""

from unimm_tokenizers.audio.soundstream import SoundStreamCodec, SoundStreamConfig
from unimm_tokenizers.audio.spectral import SpectralCodec, SpectralConfig

__all__ = ["SoundStreamCodec", "SoundStreamConfig", "SpectralCodec", "SpectralConfig"]
