"""Shapes of the semantic codecs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SemanticConfig(ABC):
    """What every semantic codec has: a size, a network, and a codebook.

    Pictures of `image_size` pixels a side. Regions are made of cells of `cell` pixels; features and
    the decoder's queries stand on a grid of `patch` pixels. `num_layers` residual blocks at every
    scale of the encoder, `decoder_layers` of the decoder that look at the codes.

    `layout_weight` weighs the loss of the predicted layout; `warmup_steps` training passes go by
    before the quantizer comes in: k-means on features of an untrained network wastes the codebook
    (LaVIT's author gives the same advice, github.com/jy0205/LaVIT issue 29).
    """

    num_channels: int = 3
    image_size: int = 32
    cell: int = 1
    patch: int = 4
    dim: int = 64
    num_heads: int = 4
    num_layers: int = 1
    decoder_layers: int = 2
    codebook_size: int = 256
    codebook_dim: int = 16
    layout_weight: float = 0.1
    warmup_steps: int = 100

    def __post_init__(self) -> None:
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels must be 1 or 3, got {self.num_channels}")
        if self.patch < 1 or self.image_size < self.patch or self.image_size % self.patch:
            raise ValueError(
                f"image_size must be a multiple of patch, got {self.image_size} and {self.patch}"
            )
        ratio, rest = divmod(self.patch, max(1, self.cell))
        if self.cell < 1 or rest or ratio & (ratio - 1):
            raise ValueError(
                f"patch must be cell times a power of two, got {self.patch} and {self.cell}"
            )
        if self.dim % 8 or self.dim % self.num_heads:
            raise ValueError(
                f"dim must be a multiple of 8 and of num_heads, got {self.dim} and {self.num_heads}"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")

    @property
    def side(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch

    @property
    def cells(self) -> int:
        """Cells a side."""
        return self.image_size // self.cell

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """Most codes of a picture."""


@dataclass(frozen=True, kw_only=True)
class SeTokConfig(SemanticConfig):
    """Shape of a discrete SeTok; clustering is that of `clustering.find_peaks`.

    Cells are compared by colour and, with `learned_weight`, by learned features; `spatial_weight`
    is what a whole side of distance adds to the squared distance of two cells. Centres are sought
    among every `seek`-th cell of every `seek`-th row. `inner_layers` look within regions,
    `inter_layers` between them.
    """

    inner_layers: int = 1
    inter_layers: int = 1
    min_regions: int = 1
    max_regions: int = 24
    seek: int = 2
    neighbours: int = 5
    threshold: float = 0.3
    spatial_weight: float = 0.25
    learned_weight: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seek < 1 or self.cells % self.seek:
            raise ValueError(f"seek must divide {self.cells} cells a side, got {self.seek}")
        patches = (self.cells // self.seek) ** 2
        if not 1 <= self.min_regions <= self.max_regions <= patches:
            raise ValueError(
                f"regions must keep 1 <= min_regions <= max_regions <= {patches} places, got "
                f"{self.min_regions} and {self.max_regions}"
            )
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {self.neighbours}")
        if self.spatial_weight < 0 or self.learned_weight < 0:
            raise ValueError(
                "spatial_weight and learned_weight must not be negative, got "
                f"{self.spatial_weight} and {self.learned_weight}"
            )
        step = self.spatial_weight**0.5 * self.seek / self.cells
        if self.threshold <= step:
            raise ValueError(
                "threshold must exceed the distance of two equal cells side by side, "
                f"sqrt(spatial_weight) * seek / {self.cells} = {step:.3g}, or plain areas fall "
                f"apart; got {self.threshold}"
            )

    @property
    def max_tokens(self) -> int:
        """See `SemanticConfig.max_tokens`."""
        return self.max_regions
