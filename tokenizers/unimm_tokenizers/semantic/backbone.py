"""Features of pictures: colours of cells, and what a small network makes of patches.

Features know nothing of their position and borders repeat the edge, so equal surroundings give
equal features: a picture of one colour is one region under any weights.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.semantic.config import SemanticConfig
from unimm_tokenizers.semantic.layers import SelfBlock, ToChannels
from unimm_tokenizers.vision.layers import unit_rms

_LIGHT, _CHROMA = 0.5, 0.25  # standard deviations of photographs, signals in [-1, 1]
_SMOOTHING, _ROUNDS = 0.5, 2  # noise of 8 in 255 goes, strokes of two pixels stay


class PictureFeatures(NamedTuple):
    """fine: (B, w, H, W), of pixels; deep: (B, N, dim), of patches in raster order."""

    fine: Tensor
    deep: Tensor


def stem(config: SemanticConfig) -> nn.Conv2d:
    """The convolution at full resolution: (B, C, H, W) -> (B, dim / 4, H, W)."""
    width = config.dim // 4
    return nn.Conv2d(config.num_channels, width, 3, padding=1, padding_mode="replicate")


class ReplicateBlock(nn.Module):
    """norm, 3x3, SiLU, 3x3, added to the input, edges repeated; (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="replicate")
        self.last = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="replicate")
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x + self.last(F.silu(self.first(unit_rms(x))))


class Backbone(nn.Module):
    """(B, C, H, W) in [-1, 1] -> `PictureFeatures`.

    A convolution at full resolution, then scales of half the side each until the patches, and one
    attention block over them. Channels of the scales: dim / 4, dim / 2, dim, dim.
    """

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        scales = (config.patch - 1).bit_length()
        widths = [min(config.dim, config.dim // 4 * 2**n) for n in range(scales)]
        self.stem = stem(config)
        self.scales = nn.ModuleList()
        for narrow, wide in pairwise([*widths, config.dim]):
            blocks = [ReplicateBlock(wide) for _ in range(config.num_layers)]
            down = nn.Sequential(ToChannels(2), nn.Conv2d(4 * narrow, wide, 1))
            self.scales.append(nn.Sequential(down, *blocks))
        if not self.scales:
            self.scales.append(nn.Conv2d(config.dim // 4, config.dim, 1))
        self.mixer = SelfBlock(config.dim, config.num_heads)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor) -> PictureFeatures:
        """See the class."""
        fine = F.silu(self.stem(x))
        deep = fine
        for scale in self.scales:
            deep = scale(deep)
        tokens = self.mixer(deep.flatten(2).transpose(1, 2))
        return PictureFeatures(fine, self.norm(tokens))


@torch.no_grad()
def colours(x: Tensor, cell: int) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> float64 (B, 1 or 3, H / cell, W / cell), of about unit variance.

    Lightness and two differences of colours; noise is smoothed away and edges are kept, by the
    bilateral filter of Tomasi and Manduchi (ICCV 1998) over 3 x 3 cells.
    """
    x = F.avg_pool2d(x.double(), cell)
    light = x.mean(1, keepdim=True) / _LIGHT
    if x.shape[1] == 3:
        red, green, blue = x.split(1, 1)
        yellow = (red + green) / 2 - blue
        light = torch.cat([light, (red - green) / _CHROMA, yellow / _CHROMA], 1)
    for _ in range(_ROUNDS):
        light = _bilateral(light)
    return light


def _bilateral(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    total, share = torch.zeros_like(x), torch.zeros_like(x[:, :1])
    for down in range(3):
        for right in range(3):
            near = padded[:, :, down : down + height, right : right + width]
            weight = torch.exp(-(near - x).square().mean(1, keepdim=True) / _SMOOTHING**2)
            total += weight * near
            share += weight
    return total / share


class RunningStandard(nn.Module):
    """Channels (*, D) to zero mean and unit variance over the pictures seen in training.

    The scale of what is clustered is fixed by this, whatever the features learn: patches of two
    pictures lie at a mean squared distance of 2 per channel, and thresholds keep their meaning.
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
