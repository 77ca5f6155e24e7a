"""Layers of the vision codec: spatial ones on (B*T, C, H, W), temporal ones on (B, C, T, H, W).

Normalisation is per position, over channels, so that the receptive field stays bounded: with
statistics over space or time (GroupNorm) no codec can tile or stream exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each position; x: (N, C, *)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) -> (N, C, *)."""
        scale = x.float().square().mean(1, keepdim=True).add(1e-6).rsqrt().to(x.dtype)
        return x * scale * self.weight.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))


class ResidualBlock(nn.Module):
    """norm, SiLU, 3x3, norm, SiLU, 3x3, added to the input; (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ChannelNorm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            ChannelNorm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return x + self.body(x)


class CausalTimeConv(nn.Module):
    """Convolution over time that sees no later frame; the first frame stands in for its past.

    (B, C, T, H, W) -> (B, C, 1 + (T - 1) / stride, H, W).
    """

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(stride, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, 1 + (T - 1) / stride, H, W)."""
        past = x[:, :, :1].expand(-1, -1, 2, -1, -1)
        return self.conv(torch.cat([past, x], dim=2))


class TimeBlock(nn.Module):
    """norm, SiLU, causal time convolution, added to the input; (B, C, T, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(ChannelNorm(channels), nn.SiLU(), CausalTimeConv(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, H, W)."""
        return x + self.body(x)


class TimeDown(nn.Module):
    """Halve time: 1 + 2m frames -> 1 + m; the first one depends on the first frame alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalTimeConv(channels, stride=2)
        self.block = TimeBlock(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 1 + 2m, H, W) -> (B, C, 1 + m, H, W)."""
        return self.block(x[:, :, ::2] + self.conv(x))


class TimeUp(nn.Module):
    """Double time: 1 + m frames -> 1 + 2m."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalTimeConv(channels)
        self.block = TimeBlock(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 1 + m, H, W) -> (B, C, 1 + 2m, H, W)."""
        x = x.repeat_interleave(2, dim=2)[:, :, 1:]
        return self.block(x + self.conv(x))


def space_down(channels: int, out_channels: int) -> nn.Module:
    """Halve height and width: 2x2 blocks to channels, then a 1x1 convolution."""
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, out_channels, 1))


def space_up(channels: int, out_channels: int) -> nn.Module:
    """Double height and width: a 1x1 convolution, then channels to 2x2 blocks."""
    return nn.Sequential(nn.Conv2d(channels, 4 * out_channels, 1), nn.PixelShuffle(2))


def per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a spatial module to each frame of (B, C, T, H, W)."""
    batch, _, time = x.shape[:3]
    y = module(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (batch, time)).transpose(1, 2)


def pad_to_multiple(x: Tensor, multiple: int, axes: tuple[int, ...]) -> Tensor:
    """Repeat the last element along `axes` until each length is a multiple."""
    for axis in axes:
        short = -x.shape[axis] % multiple
        if short:
            x = torch.cat(
                [x, x.narrow(axis, x.shape[axis] - 1, 1).repeat_interleave(short, axis)], axis
            )
    return x
