"""The vision codec: a convolutional VQ-GAN for pictures and film."""

from unimm_tokenizers.vision.codec import VisionCodec, VisionConfig

__all__ = ["VisionCodec", "VisionConfig"]
