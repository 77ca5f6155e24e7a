"""LaVIT's dynamic tokens: a selector keeps the patches that matter, the others are merged in.

Jin et al. (arXiv 2309.04669, section 3.1): the selector looks at each patch and at the mean of
all; kept tokens look at the kept ones before them and at the dropped ones. Keeping is a hard
Gumbel-softmax (Jang et al., arXiv 1611.01144) in training, the likelier choice otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.codec import register_codec
from unimm_tokenizers.semantic.backbone import Backbone
from unimm_tokenizers.semantic.clustering import DECIMALS
from unimm_tokenizers.semantic.codec import SemanticCodec
from unimm_tokenizers.semantic.config import SemanticConfig
from unimm_tokenizers.semantic.encoder import ToCode, Tokens, cells_of_patches
from unimm_tokenizers.semantic.layers import CrossBlock, SelfBlock, grid_sinusoid


@dataclass(frozen=True, kw_only=True)
class KeepOrMergeConfig(SemanticConfig):
    """Shape of a codec that keeps some patches.

    `keep_rate` is the share of patches that training aims at, `keep_weight` weighs its loss,
    `merge_layers` look at kept and dropped patches.
    """

    keep_rate: float = 0.25
    keep_weight: float = 1.0
    merge_layers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate must lie in 0 to 1, above 0, got {self.keep_rate}")

    @property
    def max_tokens(self) -> int:
        """See `SemanticConfig.max_tokens`."""
        return self.side**2


class KeepOrMergeEncoder(nn.Module):
    """(B, C, H, W) in [-1, 1] -> `Tokens`, one per kept patch, in raster order."""

    def __init__(self, config: KeepOrMergeConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.config = config
        self.backbone = Backbone(config)
        self.select = nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, 2))
        self.positions: Tensor
        self.register_buffer("positions", grid_sinusoid(config.side, dim), persistent=False)
        self.position = nn.Linear(dim, dim)
        self.among = nn.ModuleList(SelfBlock(dim, heads) for _ in range(config.merge_layers))
        self.merge = nn.ModuleList(CrossBlock(dim, heads) for _ in range(config.merge_layers))
        self.to_code = ToCode(dim, config.codebook_dim)

    def forward(self, x: Tensor) -> Tokens:
        """See the class."""
        deep = self.backbone(x).deep
        logits = self.select(torch.cat([deep, deep.mean(1, keepdim=True).expand_as(deep)], -1))
        chosen = self._chosen(logits.float() if logits.dtype != torch.float64 else logits)
        kept = chosen.detach() > 0.5
        rate = logits.float().softmax(-1)[..., 0].mean()
        loss = self.config.keep_weight * (rate - self.config.keep_rate).square()
        order = (~kept).byte().argsort(dim=1, stable=True)
        used = kept.gather(1, order)
        patches = deep + self.position(self.positions.to(deep.dtype))
        weighed = patches * chosen[..., None].to(deep.dtype)  # the selector's way to a gradient
        tokens = weighed.gather(1, order[..., None].expand_as(deep))
        count = used.shape[1]
        triangle = torch.ones(count, count, dtype=torch.bool, device=x.device).tril()
        own = torch.eye(count, dtype=torch.bool, device=x.device)  # padding looks at itself
        before = (used[:, None] & triangle) | own
        dropped = ~kept[:, None]
        dropped = dropped | ~dropped.any(-1, keepdim=True)  # nothing dropped: all are looked at
        for among, merge in zip(self.among, self.merge, strict=True):
            tokens = merge(among(tokens, before), patches, dropped)
        assignment = self._assigned(deep, kept)
        merged = torch.zeros_like(assignment[:, 0])
        return Tokens(self.to_code(tokens), used, assignment, merged, loss)

    def _chosen(self, logits: Tensor) -> Tensor:
        """(B, N, 2) -> 1 for kept patches, 0 for dropped; a picture keeps one at least."""
        lead = (logits[..., 0] - logits[..., 1]).detach().round(decimals=DECIMALS)
        best = F.one_hot(lead.argmax(1), lead.shape[1]).to(logits.dtype)
        if not self.training:
            return torch.maximum(best, (lead > 0).to(logits.dtype))
        drawn = F.gumbel_softmax(logits, hard=True)[..., 0]
        return drawn + best * (1 - drawn.detach())

    @torch.no_grad()
    def _assigned(self, deep: Tensor, kept: Tensor) -> Tensor:
        """Each cell's token: its patch's, or that of the kept patch most like it; (B, n)."""
        unit = F.normalize(deep.double(), dim=-1)
        alike = (unit @ unit.transpose(1, 2)).round(decimals=DECIMALS)
        owner = alike.masked_fill(~kept[:, None], -torch.inf).argmax(-1)
        own = torch.arange(owner.shape[1], device=owner.device)
        owner = torch.where(kept, own, owner)
        token = (kept.cumsum(1) - 1).gather(1, owner)
        return cells_of_patches(token, self.config)


@register_codec("keep-or-merge")
class KeepOrMergeCodec(SemanticCodec):
    """One code for each patch that is kept."""

    config_class = KeepOrMergeConfig
    config: KeepOrMergeConfig

    def __init__(self, config: KeepOrMergeConfig) -> None:
        super().__init__(config, KeepOrMergeEncoder(config))
