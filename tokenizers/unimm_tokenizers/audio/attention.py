"""A causal transformer over code frames that looks back a fixed number of frames.

Blocks as in Mimi (Defossez et al., arXiv 2410.00037, section 3.1): pre-norm, LayerScale. Distances
have a learned bias each instead of rotary angles, so that nothing depends on how long a stream has
been going on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.audio.layers import Causal, Past

HEAD_CHANNELS = 64
LAYER_SCALE = 0.01


class ContextBlock(Causal):
    """Attention over the frame itself and the `context` - 1 before it, then a feed-forward layer.

    Args:
        channels: C.
        context: frames that each frame sees, itself among them.
    """

    def __init__(self, channels: int, context: int) -> None:
        super().__init__()
        self.past = context - 1
        self.heads = max(1, channels // HEAD_CHANNELS)
        self.norm = nn.LayerNorm(channels)
        self.attend = nn.Linear(channels, 3 * channels, bias=False)
        self.join = nn.Linear(channels, channels, bias=False)
        self.forward_norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        self.scales = nn.Parameter(torch.full((2, channels), LAYER_SCALE))
        self.bias = nn.Parameter(torch.zeros(self.heads, context))  # by distance, from 0

    def step(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """See `Causal.step`; the past is the block's last normed inputs (B, n, C), n < context.

        Long sounds go in parts of `context` frames, so that memory grows with their length alone.
        """
        frames = x.transpose(1, 2)
        before = frames[:, :0] if past is None else past
        assert isinstance(before, Tensor)
        parts = []
        for part in frames.split(self.past + 1, dim=1):
            y, before = self._part(part, before)
            parts.append(y)
        return torch.cat(parts, dim=1).transpose(1, 2), before

    def _part(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C) behind (B, n, C) -> output, and what the next part sees of the past."""
        known = torch.cat([before, self.norm(x)], dim=1)
        size, count = known.shape[1], x.shape[1]
        qkv = self.attend(known).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        here = torch.arange(size - count, size, device=x.device)[:, None]
        distance = here - torch.arange(size, device=x.device)
        seen = (distance >= 0) & (distance <= self.past)
        bias = self.bias[:, distance.clamp(0, self.past)].masked_fill(~seen, -torch.inf)
        mixed = F.scaled_dot_product_attention(
            qkv[0][:, :, -count:], qkv[1], qkv[2], attn_mask=bias.to(qkv.dtype)[None]
        )
        x = x + self.scales[0] * self.join(mixed.transpose(1, 2).flatten(2))
        x = x + self.scales[1] * self.narrow(F.gelu(self.widen(self.forward_norm(x))))
        return x, known[:, max(0, size - self.past) :].clone()


def bottleneck(channels: int, layers: int, context: int) -> list[nn.Module]:
    """The transformer as layers of a stack; none of 0."""
    return [ContextBlock(channels, context) for _ in range(layers)]
