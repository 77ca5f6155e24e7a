"""One layer: pre-norm attention with grouped queries and QK-norm, then a gated feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unimm.model.cache import KVCache
from unimm.model.config import ModelConfig
from unimm_kernels import attention, decode_attention, qk_norm_rotary, rms_norm, swiglu


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape."""
        return rms_norm(x, self.weight, eps=self.eps)


class Attention(nn.Module):
    """Causal attention within documents; x: (B, T, d_model).

    QK-norm (Dehghani et al., arXiv 2302.05442, section 2) keeps the logits of mixed modalities
    from growing apart, the instability that Chameleon reports (arXiv 2405.09818, section 2.3).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        head, kv = config.head_dim, config.kv_heads
        self.qkv = nn.Linear(config.d_model, (config.num_heads + 2 * kv) * head, bias=False)
        self.out = nn.Linear(config.num_heads * head, config.d_model, bias=False)
        self.q_norm = nn.Parameter(torch.ones(head))
        self.k_norm = nn.Parameter(torch.ones(head))

    def forward(
        self, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """(B, T, d_model) -> (B, T, d_model); with a cache, new ids attend to it as well."""
        config = self.config
        head, kv = config.head_dim, config.kv_heads
        heads = self.qkv(x).unflatten(-1, (-1, head))
        q, k, v = heads.split((config.num_heads, kv, kv), dim=2)
        q, k = qk_norm_rotary(
            q, k, self.q_norm, self.k_norm, positions, bases=config.rope_bases, eps=config.norm_eps
        )
        if cache is None:
            mixed = attention(q, k, v, segment_ids=segment_ids)
        else:
            keys, values = cache.write(self.layer, k, v)
            mixed = decode_attention(q.to(keys.dtype), keys, values, cache.lengths + x.shape[1]).to(
                x.dtype
            )
        return self.out(mixed.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., d_model)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(swiglu(gate, up))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """(B, T, d_model) -> (B, T, d_model)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), positions, segment_ids, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
