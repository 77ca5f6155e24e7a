"""Transformer blocks and position codes of the semantic codec; tokens are (B, N, D)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention of queries (B, N, D) to a context (B, M, D)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """`mask`: bool (B, N or 1, M), True where a query may look."""
        query = self._heads(self.query(x))
        key, value = (self._heads(part) for part in self.key_value(context).chunk(2, -1))
        heads_mask = None if mask is None else mask[:, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=heads_mask)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def feed_forward(dim: int) -> nn.Module:
    """Norm and a two-layer perceptron of twice the width."""
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
    )


class SelfBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.feed_forward = feed_forward(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: bool (B, N or 1, N), True where a token may look."""
        normed = self.norm(x)
        x = x + self.attention(normed, normed, mask)
        return x + self.feed_forward(x)


class CrossBlock(nn.Module):
    """Pre-norm block that looks at a context and not at itself."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.feed_forward = feed_forward(dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """`mask`: bool (B, 1, M), True where the context holds a token."""
        x = x + self.attention(self.norm(x), context, mask)
        return x + self.feed_forward(x)


class ConvBlock(nn.Module):
    """Depthwise 3x3, then a perceptron per position (ConvNeXt, arXiv 2201.03545); (B, D, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(dim, dim, 3, padding=1, padding_mode="replicate", groups=dim)
        self.feed_forward = feed_forward(dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        mixed = self.feed_forward(self.mix(x).movedim(1, -1))
        return x + mixed.movedim(-1, 1)


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Sine and cosine codes (Vaswani et al., arXiv 1706.03762, section 3.5): (*,) -> (*, dim)."""
    rates = torch.exp(torch.arange(0, dim, 2, device=positions.device) * (-math.log(1e3) / dim))
    angles = positions[..., None].to(rates.dtype) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def grid_sinusoid(side: int, dim: int) -> Tensor:
    """Codes of a square grid in raster order, half of the channels per axis: (side * side, dim)."""
    axis = sinusoid(torch.arange(side), dim // 2)
    rows = axis[:, None].expand(side, side, dim // 2)
    columns = axis[None].expand(side, side, dim // 2)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)
