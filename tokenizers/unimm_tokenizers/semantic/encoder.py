"""From a picture to region tokens: features, clustering, merging (SeTok, arXiv 2406.05127).

The clustering knows how far apart cells lie; where they lie comes in at the merging, for a token
has to say it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.semantic.backbone import Backbone, PictureFeatures, RunningStandard, colours
from unimm_tokenizers.semantic.clustering import Peaks, Regions, find_peaks, join_peaks
from unimm_tokenizers.semantic.config import SemanticConfig, SeTokConfig
from unimm_tokenizers.semantic.layers import (
    CrossBlock,
    SelfBlock,
    grid_quadratic,
    grid_sinusoid,
)


class Tokens(NamedTuple):
    """What a picture becomes before it is quantized.

    vectors: (B, M, codebook_dim) of unit length; used: bool (B, M), which of them are there.
    assignment: int64 (B, n), the token of each cell in raster order.
    merged: int64 (B,), regions that gave way to the bound.
    loss: scalar, what the encoder itself is trained for.
    """

    vectors: Tensor
    used: Tensor
    assignment: Tensor
    merged: Tensor
    loss: Tensor


class ToCode(nn.Sequential):
    """Tokens (B, M, dim) -> unit vectors (B, M, codebook_dim), by way of a tanh as in LaVIT."""

    def __init__(self, dim: int, codebook_dim: int) -> None:
        super().__init__(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, codebook_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.normalize(super().forward(x), dim=-1)


def cells_of_patches(token: Tensor, config: SemanticConfig) -> Tensor:
    """A number for each patch (B, N) -> that number for each of its cells (B, n)."""
    ratio = config.patch // config.cell
    grid = token.unflatten(1, (config.side, config.side))
    return grid.repeat_interleave(ratio, 1).repeat_interleave(ratio, 2).flatten(1)


class Merger(nn.Module):
    """Cells to one token per region.

    A token starts as the mean of its cells, with their number, place and extent; within regions it
    looks at the patches that the region touches, between regions at the other tokens. Attention of
    all cells to each other, as in the paper, would cost 1,024 x 1,024 a picture; this costs
    24 x 64.
    """

    def __init__(self, config: SeTokConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.cells, self.side, self.cell = config.cells, config.side, config.cell
        self.ratio = config.patch // config.cell
        self.positions: Tensor
        self.register_buffer("positions", grid_sinusoid(config.side, dim), persistent=False)
        self.position = nn.Linear(dim, dim)
        self.fine = nn.Linear(config.dim // 4 + config.num_channels, dim)
        self.moments: Tensor
        self.register_buffer("moments", grid_quadratic(config.cells), persistent=False)
        self.shape = nn.Linear(7, dim)
        self.inner = nn.ModuleList(CrossBlock(dim, heads) for _ in range(config.inner_layers))
        self.inter = nn.ModuleList(SelfBlock(dim, heads) for _ in range(config.inter_layers))
        self.to_code = ToCode(dim, config.codebook_dim)

    def forward(self, x: Tensor, features: PictureFeatures, members: Tensor) -> Tensor:
        """Signal, its features, members (B, M, n) in [0, 1] -> (B, M, codebook_dim), unit length.

        Members are hard (0 or 1) or soft (the shares of a cell add up to 1).
        """
        fine = torch.cat([features.fine, x.to(features.fine.dtype)], 1)
        members = members.to(fine.dtype)
        mass = members.sum(-1, keepdim=True)
        share = members / mass.clamp(min=1e-6)
        cells = F.avg_pool2d(fine, self.cell).flatten(2).transpose(1, 2)
        grid = share.unflatten(2, (self.cells, self.cells))
        by_patch = F.avg_pool2d(grid, self.ratio).flatten(2) * self.ratio**2  # (B, M, N)
        patches = features.deep + self.position(self.positions.to(fine.dtype))
        tokens = self.fine(share @ cells) + by_patch @ patches
        shape = torch.cat([share @ self.moments.to(fine.dtype), torch.log1p(mass) / 4], -1)
        tokens = tokens + self.shape(shape)
        touched = by_patch > 0
        touched = touched | ~touched.any(-1, keepdim=True)  # a softmax over nothing is NaN
        for block in self.inner:
            tokens = block(tokens, patches, touched)
        used = mass[..., 0] > 0
        for block in self.inter:
            tokens = block(tokens, used[:, None])
        return self.to_code(tokens)


class RegionEncoder(nn.Module):
    """(B, C, H, W) in [-1, 1] -> `Tokens`, one per region.

    Args:
        config: shapes.
        backbone: pictures to `PictureFeatures`; None: an own `Backbone`.
    """

    def __init__(self, config: SeTokConfig, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone or Backbone(config)
        self.standard = RunningStandard(config.dim)
        self.merger = Merger(config)
        axis = torch.arange(config.cells)
        place = torch.cartesian_prod(axis, axis)
        some = place.unflatten(0, (config.cells, config.cells))[self._lattice].flatten(0, 1)
        self.cells_apart: Tensor
        self.register_buffer(
            "cells_apart", (place[:, None] - some).square().sum(-1), persistent=False
        )
        self.points_apart: Tensor
        self.register_buffer(
            "points_apart", (some[:, None] - some).square().sum(-1), persistent=False
        )

    @property
    def _lattice(self) -> tuple[slice, slice]:
        """Rows and columns where centres are sought."""
        every = slice(self.config.seek // 2, None, self.config.seek)
        return every, every

    def forward(self, x: Tensor) -> Tokens:
        """See the class."""
        features = self.backbone(x)
        if self.training:
            self.standard.observe(features.deep)
        regions, members = self.members(x, features)
        vectors = self.merger(x, features, members)
        used = regions.used(self.config.max_regions)
        return Tokens(vectors, used, regions.assignment, regions.merged, x.new_zeros(()))

    def members(self, x: Tensor, features: PictureFeatures) -> tuple[Regions, Tensor]:
        """Regions over cells, and how far each cell belongs to each: (B, max_regions, n)."""
        cells, points = self.compared(x, features)
        peaks = self.peaks(points)
        regions = join_peaks(cells, points, self.apart(self.cells_apart), peaks)
        return regions, regions.members(self.config.max_regions)

    @torch.no_grad()
    def compared(self, x: Tensor, features: PictureFeatures) -> tuple[Tensor, Tensor]:
        """What is clustered, float64, D times unit variance: cells (B, n, D), points (B, N, D).

        Points are the cells among which centres are sought.
        """
        config = self.config
        seen = colours(x, config.cell)
        if config.learned_weight > 0:
            deep = self.standard(features.deep).double().transpose(1, 2)
            deep = F.interpolate(
                deep.unflatten(2, (config.side, config.side)),
                size=(config.cells, config.cells),
                mode="bilinear",
            )
            # Distances are means over channels: both parts are scaled to be means of their own.
            width = seen.shape[1] + deep.shape[1]
            deep = deep * (config.learned_weight * width / deep.shape[1]) ** 0.5
            seen = torch.cat([seen * (width / seen.shape[1]) ** 0.5, deep], 1)
        points = seen[:, :, *self._lattice]
        return seen.flatten(2).transpose(1, 2), points.flatten(2).transpose(1, 2)

    def peaks(self, points: Tensor) -> Peaks:
        """Centres among the points (B, N, D)."""
        config = self.config
        return find_peaks(
            points,
            self.apart(self.points_apart),
            neighbours=config.neighbours,
            threshold=config.threshold,
            min_regions=config.min_regions,
            max_regions=config.max_regions,
        )

    def apart(self, squared_cells: Tensor) -> Tensor:
        """What squared distances in cells add to squared distances of features, float64."""
        return squared_cells.double() * (self.config.spatial_weight / self.config.cells**2)
