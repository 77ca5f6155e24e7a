"""From codes to a picture: the layout of the regions is predicted, so the codes are enough.

Learned queries, one per patch, look at the codes; each then says which code it belongs to (the
source head of MergeVQ, arXiv 2504.00999, equations 8 to 11) and takes over that code's content.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.semantic.config import SeTokConfig
from unimm_tokenizers.semantic.layers import (
    ConvBlock,
    CrossBlock,
    SelfBlock,
    grid_sinusoid,
    sinusoid,
)

_PIXEL_CHANNELS = 16  # of the last layer before colours, at full resolution


class Painted(NamedTuple):
    """signal: (B, C, H, W); layout: logits (B, N, M) of the code that each patch belongs to."""

    signal: Tensor
    layout: Tensor


class Detokenizer(nn.Module):
    """Code vectors in their order -> picture and layout."""

    def __init__(self, config: SeTokConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.side = config.side
        self.embed = nn.Linear(config.codebook_dim, dim)
        self.order = nn.Linear(dim, dim)
        self.mixer = SelfBlock(dim, heads)
        self.queries = nn.Parameter(grid_sinusoid(config.side, dim))
        self.readers = nn.ModuleList(CrossBlock(dim, heads) for _ in range(config.decoder_layers))
        self.layout_query = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.layout_key = nn.Linear(dim, dim)
        self.painters = nn.ModuleList(ConvBlock(dim) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(dim)
        self.to_pixels = nn.Sequential(
            nn.Conv2d(dim, _PIXEL_CHANNELS * config.patch**2, 1),
            nn.PixelShuffle(config.patch),
            nn.SiLU(),
            nn.Conv2d(_PIXEL_CHANNELS, config.num_channels, 3, padding=1, padding_mode="replicate"),
        )

    def forward(self, codes: Tensor, used: Tensor, assignment: Tensor | None = None) -> Painted:
        """Paint from codes (B, M, codebook_dim), of which `used` bool (B, M) are there.

        A picture without codes is mid-grey. M is at least 1, and need not be the encoder's bound.

        Args:
            assignment: int64 (B, N), the true code of each patch, given in training: a random half
                of the pictures is painted with it (teacher forcing), so that codes learn content
                before the layout is any good.
        """
        some = used.any(1)
        # A softmax over nothing is NaN: a picture without codes reads its padding, and is blanked.
        seen = (used | ~some[:, None])[:, None]
        place = (used.cumsum(1) - 1).clamp(min=0)
        context = self.embed(codes) + self.order(sinusoid(place, self.queries.shape[1]))
        context = self.mixer(context, seen)
        x = self.queries.expand(codes.shape[0], -1, -1)
        for reader in self.readers:
            x = reader(x, context, seen)
        keys = self.layout_key(context)
        layout = self.layout_query(x) @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5
        layout = layout.float().masked_fill(~seen, -torch.inf)
        share = layout.softmax(-1)
        if assignment is not None:
            taught = torch.rand_like(share[:, :1, :1]) < 0.5
            share = torch.where(taught, F.one_hot(assignment, codes.shape[1]), share)
        x = self.norm(x + share.to(context.dtype) @ context)
        grid = x.transpose(1, 2).unflatten(2, (self.side, self.side))
        for painter in self.painters:
            grid = painter(grid)
        return Painted(self.to_pixels(grid) * some[:, None, None, None], layout)
