"""SEED's causal queries: a fixed number of codes, each of which knows those before it.

Ge et al. (arXiv 2307.08041, section 3.1): learned queries look at the picture and, causally, at
each other, so that the codes have the order in which a language model writes them.
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
class CausalQueryConfig(SemanticConfig):
    """Shape of a codec of `queries` codes a picture, made by `query_layers` layers."""

    queries: int = 16
    query_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 1 or self.query_layers < 1:
            raise ValueError(
                f"queries and query_layers must be at least 1, got {self.queries} and "
                f"{self.query_layers}"
            )

    @property
    def max_tokens(self) -> int:
        """See `SemanticConfig.max_tokens`."""
        return self.queries


class CausalQueryEncoder(nn.Module):
    """(B, C, H, W) in [-1, 1] -> `Tokens`, one per query; cells go to the query most like them."""

    def __init__(self, config: CausalQueryConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.config = config
        self.backbone = Backbone(config)
        self.positions: Tensor
        self.register_buffer("positions", grid_sinusoid(config.side, dim), persistent=False)
        self.position = nn.Linear(dim, dim)
        self.queries = nn.Parameter(torch.randn(config.queries, dim) * dim**-0.5)
        self.among = nn.ModuleList(SelfBlock(dim, heads) for _ in range(config.query_layers))
        self.look = nn.ModuleList(CrossBlock(dim, heads) for _ in range(config.query_layers))
        self.to_code = ToCode(dim, config.codebook_dim)

    def forward(self, x: Tensor) -> Tokens:
        """See the class."""
        deep = self.backbone(x).deep
        patches = deep + self.position(self.positions.to(deep.dtype))
        count = len(self.queries)
        everything = torch.ones(1, 1, deep.shape[1], dtype=torch.bool, device=x.device)
        causal = torch.ones(1, count, count, dtype=torch.bool, device=x.device).tril()
        tokens = self.queries.expand(len(x), -1, -1).to(deep.dtype)
        for among, look in zip(self.among, self.look, strict=True):
            tokens = look(among(tokens, causal), patches, everything)
        used = torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device)
        merged = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        assignment = self._assigned(patches, tokens)
        return Tokens(self.to_code(tokens), used, assignment, merged, x.new_zeros(()))

    @torch.no_grad()
    def _assigned(self, patches: Tensor, tokens: Tensor) -> Tensor:
        """Each cell's query, by the cosine of features: (B, n)."""
        unit = [F.normalize(part.double(), dim=-1) for part in (patches, tokens)]
        token = (unit[0] @ unit[1].transpose(1, 2)).round(decimals=DECIMALS).argmax(-1)
        return cells_of_patches(token, self.config)


@register_codec("causal-queries")
class CausalQueryCodec(SemanticCodec):
    """A fixed number of codes in causal order."""

    config_class = CausalQueryConfig
    config: CausalQueryConfig

    def __init__(self, config: CausalQueryConfig) -> None:
        super().__init__(config, CausalQueryEncoder(config))
