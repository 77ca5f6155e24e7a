"""Shape of a decoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder.

    vocab_size: rows of embedding and head; `Vocabulary.padded_size`. Training fills it in.
    num_kv_heads: key and value heads, a divisor of `num_heads`; None: as many (no grouping).
    d_ff: width of the gated feed-forward; None: 8/3 d_model in whole multiples of 64.
    rope_bases: rotary base of each position axis (t, h, w). Text stands on the diagonal, so the
        h and w axes must reach as far as t does.
    dropout: share of each residual branch's output that training drops (Chameleon-7B: 0.1).
    """

    vocab_size: int = 0
    d_model: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int | None = None
    d_ff: int | None = None
    rope_bases: tuple[float, float, float] = (10000.0, 10000.0, 10000.0)
    norm_eps: float = 1e-6
    dropout: float = 0.0
    tied_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.d_model % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"d_model {self.d_model} must split into {self.num_heads} heads of even width"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.kv_heads}"
            )
        if len(self.rope_bases) != 3 or self.head_dim < 6:
            raise ValueError("rope_bases needs one base for each of t, h, w; heads at least 6 wide")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def feed_forward(self) -> int:
        """Width of the gated feed-forward."""
        return self.d_ff or -(-8 * self.d_model // 3 // 64) * 64
