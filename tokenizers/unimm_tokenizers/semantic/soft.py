"""SeTok's own assignment: cells belong to several regions, by breaking a stick.

Paper (arXiv 2406.05127, section 3.1; the scopes are those of GENESIS-V2, arXiv 2104.09958, section
3.2): cluster c takes the share alpha = exp(-d^2 C ln 2) of what the clusters before it have left of
every cell. Here centres are those of the density peaks, the strongest first, so that all scopes are
one cumulative product; what the last cluster leaves is shared out in proportion. C, of which
the paper gives no value that can be computed, is `sharpness`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unimm_tokenizers.codec import register_codec
from unimm_tokenizers.semantic.backbone import PictureFeatures
from unimm_tokenizers.semantic.clustering import DECIMALS, Regions, number_regions
from unimm_tokenizers.semantic.codec import SemanticCodec
from unimm_tokenizers.semantic.config import SeTokConfig
from unimm_tokenizers.semantic.encoder import RegionEncoder


@dataclass(frozen=True, kw_only=True)
class SoftSeTokConfig(SeTokConfig):
    """`SeTokConfig`, and `sharpness`: at squared distance 1 / sharpness a cell is half a member."""

    sharpness: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sharpness > 0:
            raise ValueError(f"sharpness must be above 0, got {self.sharpness}")


class SoftRegionEncoder(RegionEncoder):
    """Tokens of soft regions; the region of a cell is the one that has most of it."""

    config: SoftSeTokConfig

    def members(self, x: Tensor, features: PictureFeatures) -> tuple[Regions, Tensor]:
        """See `RegionEncoder.members`."""
        cells, points = self.compared(x, features)
        peaks = self.peaks(points)
        between = torch.cdist(peaks.of(points), cells).square() / cells.shape[2]
        away = self.apart(self.cells_apart).T[peaks.index]
        share = torch.exp(-(between + away) * self.config.sharpness * math.log(2))
        masks = broken_stick(share.masked_fill(~peaks.used[..., None], 0))
        owner = masks.round(decimals=DECIMALS).argmax(1)
        regions = number_regions(owner, share.shape[1], peaks.merged)
        return regions, renamed(masks, owner, regions)


def broken_stick(share: Tensor) -> Tensor:
    """Shares alpha (B, M, n) in [0, 1] -> masks (B, M, n) that add up to 1 in every cell."""
    left = torch.cat([torch.ones_like(share[:, :1]), (1 - share[:, :-1]).cumprod(1)], 1)
    masks = left * share
    total = masks.sum(1, keepdim=True)
    # A cell that nothing reaches belongs to the first cluster.
    masks[:, :1] += total == 0
    return masks / masks.sum(1, keepdim=True)


def renamed(masks: Tensor, owner: Tensor, regions: Regions) -> Tensor:
    """Masks (B, M, n) in the order of their regions; clusters without a cell of their own go."""
    batch, most, _ = masks.shape
    name = owner.new_full((batch, most), most).scatter(1, owner, regions.assignment)
    order = name.argsort(dim=1, stable=True)
    sorted_masks = masks.gather(1, order[..., None].expand_as(masks))
    kept = regions.used(most)[..., None]
    return sorted_masks * kept / (sorted_masks * kept).sum(1, keepdim=True)


@register_codec("setok-soft")
class SoftSeTokCodec(SemanticCodec):
    """One code for each soft region."""

    config_class = SoftSeTokConfig
    config: SoftSeTokConfig

    def __init__(self, config: SoftSeTokConfig) -> None:
        super().__init__(config, SoftRegionEncoder(config))
