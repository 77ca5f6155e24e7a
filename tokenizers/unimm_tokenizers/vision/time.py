"""Layers over time, on (B, C, T, H, W): causal, and with a past that the caller may keep.

The first frame stands in for its own past, so that it depends on nothing else: alone it is a
picture. A layer called with the past of the frames before a chunk gives what it would have given
for the whole film.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.vision.layers import ChannelNorm

Past = tuple[Tensor, ...]  # the last two frames (B, C, 2, H, W) that each convolution saw


class CausalTimeConv(nn.Module):
    """Convolution of three frames, the last one its own; with stride 2, of every second frame."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(stride, 1, 1))
        self.stride = stride

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, C, T, H, W) and two frames before it -> output, and the last two frames.

        A film starts without a past, with 1 + stride * n frames; chunks after it have stride * n.
        """
        first = past is None
        known = torch.cat([x[:, :, :1].expand(-1, -1, 2, -1, -1) if first else past, x], dim=2)
        # After the start, the first output of a stride of 2 is the chunk's second frame's.
        seen = known if first else known[:, :, self.stride - 1 :]
        return self.conv(seen), known[:, :, -2:]


class TimeBlock(nn.Module):
    """norm, SiLU, causal time convolution, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(ChannelNorm(channels), nn.SiLU(), CausalTimeConv(channels))

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, C, T, H, W) -> (B, C, T, H, W), and the past of what comes next."""
        y, kept = self.body[2](F.silu(self.body[0](x)), past)
        return x + y, kept


class TimeDown(nn.Module):
    """Halve time: 1 + 2m frames -> 1 + m; the first one depends on the first frame alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalTimeConv(channels, stride=2)
        self.block = TimeBlock(channels)

    def forward(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """(B, C, 1 + 2m, H, W), or 2m frames after a past -> 1 + m or m frames, and the past."""
        before = (None, None) if past is None else past
        y, first = self.conv(x, before[0])
        y, second = self.block(x[:, :, (0 if past is None else 1) :: 2] + y, before[1])
        return y, (first, second)


class TimeUp(nn.Module):
    """Double time: 1 + m frames -> 1 + 2m."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalTimeConv(channels)
        self.block = TimeBlock(channels)

    def forward(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """(B, C, 1 + m, H, W), or m frames after a past -> 1 + 2m or 2m frames, and the past."""
        before = (None, None) if past is None else past
        x = x.repeat_interleave(2, dim=2)[:, :, (1 if past is None else 0) :]
        y, first = self.conv(x, before[0])
        y, second = self.block(x + y, before[1])
        return y, (first, second)


class TimeStack(nn.ModuleList):
    """Halvings or doublings, one after the other."""

    def forward(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """(B, C, T, H, W) and the past of all layers -> output, and the next past."""
        kept: list[Tensor] = []
        for number, layer in enumerate(self):
            own = None if past is None else past[2 * number : 2 * number + 2]
            x, new = layer(x, own)
            kept += new
        return x, tuple(kept)

    @torch.no_grad()
    def clear(self) -> None:
        """Set all convolutions to zero: the last frame of each group passes through, repeated."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
