"""Causal one-dimensional layers; x: (B, C, T). Nothing sees a later frame."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class CausalConv(nn.Module):
    """Convolution padded on the left only; T must be a multiple of the stride.

    (B, C, T) -> (B, C', T / stride).
    """

    def __init__(
        self, channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        self.past = (kernel - 1) * dilation + 1 - stride
        self.conv = nn.Conv1d(channels, out_channels, kernel, stride=stride, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C', T / stride)."""
        return self.conv(F.pad(x, (self.past, 0)))


class CausalUpsample(nn.Module):
    """Transposed convolution, kernel twice the stride (no checkerboard), cut to be causal.

    (B, C, T) -> (B, C', T * stride).
    """

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.ConvTranspose1d(channels, out_channels, 2 * stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C', T * stride)."""
        return self.conv(x)[..., : -self.stride]


class ResidualUnit(nn.Module):
    """ELU, dilated convolution (kernel 7 or 3), ELU, 1x1, added to the input."""

    def __init__(self, channels: int, dilation: int, kernel: int = 7) -> None:
        super().__init__()
        self.past = (kernel - 1) * dilation
        self.body = nn.Sequential(
            nn.ELU(),
            CausalConv(channels, channels, kernel, dilation=dilation),
            nn.ELU(),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        return x + self.body(x)
