"""The vision codec: a convolutional VQ-GAN for pictures and film."""

from unimm_tokenizers.vision.codec import FilmState, VisionCodec
from unimm_tokenizers.vision.config import VisionConfig
from unimm_tokenizers.vision.vqgan import VQGANCodec, VQGANConfig

__all__ = ["FilmState", "VQGANCodec", "VQGANConfig", "VisionCodec", "VisionConfig"]
