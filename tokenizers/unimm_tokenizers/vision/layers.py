"""Layers of the vision codec over space, on (N, C, H, W), N pictures or frames.

Normalisation is per position, over channels, so that the receptive field stays bounded: with
statistics over space or time (GroupNorm) no codec can tile or stream exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _UnitRMS(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over axis 1, with one saved tensor and a backward of four passes.

    Left to autograd, the backward of these few operations took 28% of a training step (bfloat16,
    channels last, one core of an AMD EPYC), the convolutions around them being fast.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = x.float().square().mean(1, keepdim=True).add(1e-6).rsqrt().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        (gradient,) = gradients
        along = (gradient * y).mean(1, keepdim=True)
        return torch.addcmul(gradient, y, along, value=-1).mul_(scale)


def unit_rms(x: Tensor) -> Tensor:
    """Divide each position's channels by their root mean square; x: (N, C, *)."""
    return _UnitRMS.apply(x)  # pyright: ignore[reportReturnType]


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each position; x: (N, C, *)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) -> (N, C, *)."""
        return unit_rms(x) * self.weight.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))


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


class LeanBlock(nn.Module):
    """norm, 3x3, SiLU, 3x3, added to the input; (N, C, H, W).

    One norm, whose scale the convolution after it absorbs, and one activation: what remains of a
    step is convolution (83% of its time on one core). The last convolution starts at zero, so that
    the block starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return x + self.last(F.silu(self.first(unit_rms(x))))


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
