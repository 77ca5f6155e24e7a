"""One layer: attention with grouped queries and QK-norm, then a feed-forward, both residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.model.cache import KVCache
from unimm.model.config import ModelConfig, NormOrder, QKNorm
from unimm.model.experts import SparseFeedForward
from unimm.model.positions import rotary_bases
from unimm_kernels import attention, decode_attention, qk_norm_rotary, rms_norm, rotary, swiglu

LAYER_NORM_EPS = 1e-5  # Chameleon's, whatever the eps of its other norms


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
        self.window = config.window_of(layer)
        self.bases = rotary_bases(config)
        head, kv = config.head_dim, config.kv_heads
        self.qkv = nn.Linear(
            config.d_model, (config.num_heads + 2 * kv) * head, bias=config.qkv_bias
        )
        self.out = nn.Linear(config.num_heads * head, config.d_model, bias=False)
        self.make_norms()

    def make_norms(self) -> None:
        """Parameters of the norm of queries and keys."""
        self.q_norm = nn.Parameter(torch.ones(self.config.head_dim))
        self.k_norm = nn.Parameter(torch.ones(self.config.head_dim))

    def turned(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, T, H, D) and keys (B, T, G, D), normed and turned to their positions."""
        return qk_norm_rotary(
            q, k, self.q_norm, self.k_norm, positions, bases=self.bases, eps=self.config.norm_eps
        )

    def forward(
        self, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """(B, T, d_model) -> (B, T, d_model); with a cache, new ids attend to it as well."""
        config = self.config
        head, kv = config.head_dim, config.kv_heads
        heads = self.qkv(x).unflatten(-1, (-1, head))
        q, k, v = heads.split((config.num_heads, kv, kv), dim=2)
        q, k = self.turned(q, k, positions)
        if cache is None:
            mixed = attention(q, k, v, window=self.window, segment_ids=segment_ids)
        else:
            keys, values = cache.write(self.layer, k, v)
            if self.window is not None:
                return self.out(self._windowed(q, keys, values, cache.lengths).flatten(2))
            ends = cache.ends(x.shape[1])
            mixed = decode_attention(q.to(keys.dtype), keys, values, ends).to(x.dtype)
        return self.out(mixed.flatten(2))

    def _windowed(self, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """New queries (B, t, H, D) against the last `window` keys of each row's cache."""
        assert self.window is not None
        slots = torch.arange(keys.shape[1], device=q.device)
        last = lengths[:, None] + torch.arange(q.shape[1], device=q.device)
        behind = last[:, None, :, None] - slots  # (B, 1, t, S): how far back a key lies
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2).to(keys.dtype),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=(behind >= 0) & (behind < self.window),
            enable_gqa=True,
        )
        return mixed.transpose(1, 2).to(q.dtype)


class PlainAttention(Attention):
    """Attention without a norm of queries and keys (Llama)."""

    def make_norms(self) -> None:
        """There are none."""

    def turned(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, T, H, D) and keys (B, T, G, D), turned to their positions."""
        return (
            rotary(q, positions, bases=self.bases),
            rotary(k, positions, bases=self.bases),
        )


class CentredAttention(PlainAttention):
    """Attention with a layer norm of queries and keys whose weights and biases are each head's own.

    Chameleon's (arXiv 2405.09818, section 2.3), as `transformers` has it. Flat, as norms are.
    """

    def make_norms(self) -> None:
        """Weights and biases (heads * head_dim,)."""
        head, heads, kv = self.config.head_dim, self.config.num_heads, self.config.kv_heads
        self.q_norm = nn.Parameter(torch.ones(heads * head))
        self.q_norm_bias = nn.Parameter(torch.zeros(heads * head))
        self.k_norm = nn.Parameter(torch.ones(kv * head))
        self.k_norm_bias = nn.Parameter(torch.zeros(kv * head))

    def turned(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, T, H, D) and keys (B, T, G, D), normed and turned to their positions."""
        q = self._normed(q, self.q_norm, self.q_norm_bias)
        return super().turned(q, self._normed(k, self.k_norm, self.k_norm_bias), positions)

    @staticmethod
    def _normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(B, T, H, D) -> the same shape."""
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=LAYER_NORM_EPS)
        return (normed * weight.view(x.shape[-2:]) + bias.view(x.shape[-2:])).to(x.dtype)


ATTENTIONS: dict[QKNorm | None, type[Attention]] = {
    "rms": Attention,
    "layer": CentredAttention,
    None: PlainAttention,
}


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
    """x + attention(norm(x)), then x + feed_forward(norm(x)); dense or sparse, by layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = ATTENTIONS[config.qk_norm](config, layer)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        sparse = config.experts_of(layer) is not None
        self.feed_forward = SparseFeedForward(config) if sparse else FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """(B, T, d_model) -> (B, T, d_model)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), positions, segment_ids, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class SwinBlock(Block):
    """x + norm(attention(x)), then x + norm(feed_forward(x)) (Liu et al., arXiv 2111.09883)."""

    def forward(
        self, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """(B, T, d_model) -> (B, T, d_model)."""
        x = x + self.dropout(self.attention_norm(self.attention(x, positions, segment_ids, cache)))
        return x + self.dropout(self.feed_forward_norm(self.feed_forward(x)))


BLOCKS: dict[NormOrder, type[Block]] = {"pre": Block, "swin": SwinBlock}
