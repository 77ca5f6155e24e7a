"""Shape of a vision codec, and the quantizer that it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from unimm_tokenizers.quantize import (
    BinaryQuantizer,
    FiniteScalarQuantizer,
    IndexBackpropagationQuantizer,
    Quantizer,
    ResidualVectorQuantizer,
    SimVectorQuantizer,
)

Block = Literal["residual", "lean"]
QuantizerName = Literal["vq", "simvq", "ibq", "lfq", "bsq"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Shape of a vision codec.

    Space shrinks by `patch` times 2 for every multiplier after the first; time by
    `time_downsample` (1: pictures only). `fsq_levels` chooses finite scalar quantization; otherwise
    `quantizer` makes `codebook_size` codes in `codebook_dim` channels (None: the latents' own):

    - "vq": moving averages; of unit length in `codebook_dim` channels (LlamaGen's setting), or,
      with None, anywhere. `num_codebooks` above 1: residual levels, anywhere.
    - "simvq": a frozen codebook moved by one linear map. "ibq": gradients to all codes.
    - "lfq", "bsq": signs of log2(codebook_size) channels, free or on the sphere.

    Raises:
        ValueError: a value is out of range.
    """

    num_channels: int = 3
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2, 4)
    num_blocks: int = 1  # of each encoder stage; decoder stages have one more
    block: Block = "residual"
    patch: int = 2
    time_downsample: int = 1
    latent_channels: int = 32
    quantizer: QuantizerName = "vq"
    num_codebooks: int = 1
    codebook_size: int = 1024
    codebook_dim: int | None = 8
    fsq_levels: tuple[int, ...] = ()
    fps: float = 10.0  # frames per second of the films that it decodes

    def __post_init__(self) -> None:
        if self.time_downsample not in (1, 2, 4, 8):
            raise ValueError(f"time_downsample must be 1, 2, 4 or 8, got {self.time_downsample}")
        for name, kind in (("block", Block), ("quantizer", QuantizerName)):
            value = getattr(self, name)
            if value not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        for name in ("num_channels", "channels", "patch", "latent_channels", "num_codebooks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.multipliers or min(self.multipliers) < 1 or self.num_blocks < 0:
            raise ValueError("multipliers must be numbers above 0, and num_blocks 0 or more")
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size must be at least 2, got {self.codebook_size}")
        if self.num_codebooks > 1 and (self.fsq_levels or self.quantizer != "vq"):
            raise ValueError("num_codebooks above 1 (residual levels) needs quantizer 'vq'")
        if self.quantizer in ("lfq", "bsq") and self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"{self.quantizer}: codebook_size must be a power of 2")

    @property
    def space_downsample(self) -> int:
        """Pixels per code on each side."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


def build_quantizer(config: VisionConfig) -> Quantizer:
    """The quantizer that a config names, untrained."""
    dim, size, width = config.latent_channels, config.codebook_size, config.codebook_dim
    if config.fsq_levels:
        return FiniteScalarQuantizer(dim, config.fsq_levels)
    if config.quantizer == "simvq":
        return SimVectorQuantizer(dim, size, width)
    if config.quantizer == "ibq":
        return IndexBackpropagationQuantizer(dim, size, width)
    if config.quantizer in ("lfq", "bsq"):
        bits = size.bit_length() - 1
        return BinaryQuantizer(dim, bits, spherical=config.quantizer == "bsq")
    cosine = width is not None and config.num_codebooks == 1
    return ResidualVectorQuantizer(dim, size, config.num_codebooks, width, cosine=cosine)
