"""Shape of the semantic codec."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SeTokConfig:
    """Shape of a semantic codec.

    Pictures of `image_size` pixels a side, cut in patches of `patch`. Layers: `num_layers` of
    features, `inner_layers` within regions, `inter_layers` between regions, `decoder_layers` that
    look at the codes and as many that do not. Clustering: see `clustering.density_peaks`;
    `spatial_weight` is what a whole side of distance adds to the squared distance of two patches.

    `layout_weight` weighs the loss of the predicted layout; `warmup_steps` training passes go by
    before the quantizer comes in: k-means on features of an untrained network wastes the codebook
    (LaVIT's author gives the same advice, github.com/jy0205/LaVIT issue 29).
    """

    num_channels: int = 3
    image_size: int = 32
    patch: int = 4
    dim: int = 64
    num_heads: int = 4
    num_layers: int = 1
    inner_layers: int = 1
    inter_layers: int = 1
    decoder_layers: int = 2
    min_regions: int = 1
    max_regions: int = 16
    neighbours: int = 3
    threshold: float = 0.4
    spatial_weight: float = 0.25
    codebook_size: int = 256
    codebook_dim: int = 8
    layout_weight: float = 0.3
    warmup_steps: int = 100

    def __post_init__(self) -> None:
        if self.patch < 1 or self.image_size < self.patch or self.image_size % self.patch:
            raise ValueError(
                f"image_size must be a multiple of patch, got {self.image_size} and {self.patch}"
            )
        if self.dim % 4 or self.dim % self.num_heads:
            raise ValueError(
                f"dim must be a multiple of 4 and of num_heads, got {self.dim} and {self.num_heads}"
            )
        patches = self.side**2
        if not 1 <= self.min_regions <= self.max_regions <= patches:
            raise ValueError(
                f"regions must keep 1 <= min_regions <= max_regions <= {patches} patches, got "
                f"{self.min_regions} and {self.max_regions}"
            )
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {self.neighbours}")
        if self.spatial_weight < 0:
            raise ValueError(f"spatial_weight must not be negative, got {self.spatial_weight}")
        step = self.spatial_weight**0.5 / self.side
        if self.threshold <= step:
            raise ValueError(
                "threshold must exceed the distance of two equal patches side by side, "
                f"sqrt(spatial_weight) / {self.side} = {step:.3g}, or plain areas fall apart; got "
                f"{self.threshold}"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")

    @property
    def side(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch
