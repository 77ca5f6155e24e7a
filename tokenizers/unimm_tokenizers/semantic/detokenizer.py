"""From codes to a picture: the layout of the regions is predicted, so the codes are enough.

Each code says where it lies by a quadratic of the place, the log density of a Gaussian. Learned
queries, one per patch, look at the codes and correct that for every one of their cells (the source
head of MergeVQ, arXiv 2504.00999, equations 8 to 11); a cell takes over its code's content.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.semantic.backbone import ReplicateBlock
from unimm_tokenizers.semantic.config import SemanticConfig
from unimm_tokenizers.semantic.layers import (
    CrossBlock,
    FromChannels,
    SelfBlock,
    grid_quadratic,
    grid_sinusoid,
    sinusoid,
)

_LAYOUT_CHANNELS = 16  # in which cells and codes are compared
_PLACE_SCALE = 8.0  # of a region's quadratic: regions a quarter of the picture wide from the start
CELL_CHANNELS = 24  # of the last layers, at the resolution of cells


class Painted(NamedTuple):
    """made: (B, C, H, W), or what another head makes; layout: logits (B, n, M) of cells' codes."""

    made: Tensor
    layout: Tensor


class Detokenizer(nn.Module):
    """Code vectors in their order -> picture and layout.

    Args:
        config: shapes.
        head: the last layer, from (B, CELL_CHANNELS, cells, cells); None: one that makes pixels.
    """

    def __init__(self, config: SemanticConfig, head: nn.Module | None = None) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.side, self.ratio = config.side, config.patch // config.cell
        self.embed = nn.Linear(config.codebook_dim, dim)
        self.order = nn.Linear(dim, dim)
        self.mixer = SelfBlock(dim, heads)
        self.queries = nn.Parameter(grid_sinusoid(config.side, dim))
        self.readers = nn.ModuleList(CrossBlock(dim, heads) for _ in range(config.decoder_layers))
        self.painters = nn.ModuleList(SelfBlock(dim, heads) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(dim)
        area = self.ratio**2
        self.layout_query = nn.Linear(dim, _LAYOUT_CHANNELS * area)
        self.layout_key = nn.Linear(dim, _LAYOUT_CHANNELS)
        self.places: Tensor
        self.register_buffer("places", grid_quadratic(config.cells), persistent=False)
        self.layout_place = nn.Linear(dim, self.places.shape[1])
        self.from_patch = nn.Linear(dim, CELL_CHANNELS * area)
        self.from_code = nn.Linear(dim, CELL_CHANNELS)
        self.to_cells = FromChannels(self.ratio)
        self.blocks = nn.Sequential(ReplicateBlock(CELL_CHANNELS), ReplicateBlock(CELL_CHANNELS))
        self.to_pixels = head or nn.Sequential(
            nn.Conv2d(CELL_CHANNELS, config.num_channels * config.cell**2, 1),
            FromChannels(config.cell),
        )

    def forward(self, codes: Tensor, used: Tensor, assignment: Tensor | None = None) -> Painted:
        """Paint from codes (B, M, codebook_dim), of which `used` bool (B, M) are there.

        M is at least 1, and need not be the encoder's bound; what is painted without a code has no
        meaning.

        Args:
            assignment: int64 (B, n), the true code of each cell, given in training: a random half
                of the pictures is painted with it (teacher forcing), so that codes learn content
                before the layout is any good.
        """
        # A softmax over nothing is NaN: a picture without codes reads its padding.
        seen = (used | ~used.any(1, keepdim=True))[:, None]
        place = (used.cumsum(1) - 1).clamp(min=0)
        # Unit vectors to unit channels: as they are, their order would drown them out.
        context = self.embed(codes * codes.shape[-1] ** 0.5) + self.order(
            sinusoid(place, self.queries.shape[1])
        )
        context = self.mixer(context, seen)
        x = self.queries.expand(codes.shape[0], -1, -1)
        for reader, painter in zip(self.readers, self.painters, strict=True):
            x = painter(reader(x, context, seen))
        x = self.norm(x)
        query = self._cells(self.layout_query(x)).flatten(2).transpose(1, 2)
        layout = query @ self.layout_key(context).transpose(1, 2) * _LAYOUT_CHANNELS**-0.5
        layout = layout + _PLACE_SCALE * self.places @ self.layout_place(context).transpose(1, 2)
        layout = layout.float().masked_fill(~seen, -torch.inf)
        share = layout.softmax(-1)
        if assignment is not None:
            taught = torch.rand_like(share[:, :1, :1]) < 0.5
            share = torch.where(taught, F.one_hot(assignment, codes.shape[1]), share)
        content = share.to(context.dtype) @ self.from_code(context)
        grid = self._cells(self.from_patch(x))
        grid = self.blocks(grid + content.transpose(1, 2).unflatten(2, grid.shape[2:]))
        return Painted(self.to_pixels(grid), layout)

    def _cells(self, x: Tensor) -> Tensor:
        """(B, N, channels * ratio^2) of patches -> (B, channels, cells, cells)."""
        grid = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.to_cells(grid)
