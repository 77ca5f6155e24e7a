"""From a picture to region tokens: features, clustering, merging (SeTok, arXiv 2406.05127).

Features know nothing of their position and borders repeat the edge, so equal surroundings give
equal features: a picture of one colour is one region under any weights. The clustering knows how
far apart patches lie; where they lie comes in at the merging, for a token has to say it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.semantic.clustering import Regions, density_peaks
from unimm_tokenizers.semantic.config import SeTokConfig
from unimm_tokenizers.semantic.layers import ConvBlock, SelfBlock, grid_sinusoid


class RegionTokens(NamedTuple):
    """tokens: (B, max_regions, codebook_dim) of unit length, rows past `regions.count` unused."""

    tokens: Tensor
    regions: Regions


class Backbone(nn.Module):
    """Patch features (B, C, H, W) -> (B, N, dim), each channel of about unit scale."""

    def __init__(self, config: SeTokConfig) -> None:
        super().__init__()
        self.embed = nn.Conv2d(config.num_channels, config.dim, config.patch, stride=config.patch)
        self.blocks = nn.ModuleList(ConvBlock(config.dim) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x.flatten(2).transpose(1, 2))


class RunningStandard(nn.Module):
    """Channels (*, D) to zero mean and unit variance over the pictures seen in training.

    The scale of what is clustered is fixed by this, whatever the features learn: patches of two
    pictures lie at a mean squared distance of 2 per channel, and thresholds keep their meaning.
    Without it, 148 training steps on dial-pad pictures left 1.4 regions a picture.
    """

    def __init__(self, dim: int, decay: float = 0.98) -> None:
        super().__init__()
        self.decay = decay
        self.mean: Tensor
        self.variance: Tensor
        self.seen: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))
        self.register_buffer("seen", torch.tensor(0))  # batches

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take a training batch into the statistics."""
        self.seen += 1
        # A plain mean over the first batches, an exponential one later.
        share = torch.clamp(1 / self.seen, min=1 - self.decay)
        flat = x.to(self.mean.dtype).flatten(0, -2)
        self.mean.lerp_(flat.mean(0), share)
        self.variance.lerp_((flat - self.mean).square().mean(0), share)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """See the class; no gradient passes."""
        return (x - self.mean) * (self.variance + 1e-6).rsqrt()


class Merger(nn.Module):
    """Patches to one token per region: attention within regions, mean, attention between them."""

    def __init__(self, config: SeTokConfig) -> None:
        super().__init__()
        dim = config.dim
        self.max_regions = config.max_regions
        self.positions: Tensor
        self.register_buffer("positions", grid_sinusoid(config.side, dim), persistent=False)
        self.position = nn.Linear(dim, dim)
        self.inner = nn.ModuleList(
            SelfBlock(dim, config.num_heads) for _ in range(config.inner_layers)
        )
        self.inter = nn.ModuleList(
            SelfBlock(dim, config.num_heads) for _ in range(config.inter_layers)
        )
        self.to_code = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, config.codebook_dim)
        )

    def forward(self, features: Tensor, regions: Regions) -> Tensor:
        """(B, N, dim) -> (B, max_regions, codebook_dim) of unit length."""
        x = features + self.position(self.positions.to(features.dtype))
        same = regions.assignment[:, :, None] == regions.assignment[:, None, :]
        for block in self.inner:
            x = block(x, same)
        members = regions.members(self.max_regions).to(x.dtype)
        x = members @ x / members.sum(-1, keepdim=True).clamp(min=1)
        used = regions.used(self.max_regions)[:, None]
        for block in self.inter:
            x = block(x, used)
        return F.normalize(self.to_code(x), dim=-1)


class RegionEncoder(nn.Module):
    """(B, C, H, W) in [-1, 1] -> `RegionTokens`."""

    def __init__(self, config: SeTokConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.standard = RunningStandard(config.dim)
        self.merger = Merger(config)
        axis = torch.arange(config.side)
        place = torch.cartesian_prod(axis, axis)
        self.cells_apart: Tensor
        self.register_buffer(
            "cells_apart", (place[:, None] - place).square().sum(-1), persistent=False
        )

    def forward(self, x: Tensor) -> RegionTokens:
        """See the class."""
        return self.merged(self.backbone(x))

    def merged(self, features: Tensor) -> RegionTokens:
        """Features (B, N, dim) of the backbone -> `RegionTokens`."""
        config = self.config
        regions = density_peaks(
            self.standard(features),
            self.cells_apart.double() * (config.spatial_weight / config.side**2),
            neighbours=config.neighbours,
            threshold=config.threshold,
            min_regions=config.min_regions,
            max_regions=config.max_regions,
        )
        return RegionTokens(self.merger(features, regions), regions)
