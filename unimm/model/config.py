# pyright: strict

"""Shape of a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

NormOrder = Literal["pre", "swin"]
QKNorm = Literal["rms", "layer"]


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Sparse mixture-of-experts feed-forward (Shazeer et al., arXiv 1701.06538).

    count: experts of a layer. chosen: experts that a token goes through. every: each so-manieth
        layer is sparse, the last of the group. d_ff: width of an expert; None: the dense width
        over `chosen`, so that a token costs what it costs in a dense layer.
    balance: factor of the load-balancing loss (Fedus et al., arXiv 2101.03961, section 2.2: 0.01).
    """

    count: int = 8
    chosen: int = 2
    every: int = 1
    d_ff: int | None = None
    balance: float = 0.01

    def __post_init__(self) -> None:
        if not 1 <= self.chosen <= self.count or self.every < 1 or self.balance < 0:
            raise ValueError(
                f"experts: choose 1 to count of them, every 1 or more, balance 0 or more; got "
                f"chosen {self.chosen} of {self.count}, every {self.every}, balance {self.balance}"
            )


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Slower turns for long contexts, as Llama 3.1 has them ("llama3" in `transformers`).

    A channel pair that turns less than `slow` times within `length` ids turns `factor` times
    slower; one that turns more than `fast` times stays as it is; between them the two are mixed.
    """

    factor: float = 8.0
    slow: float = 1.0
    fast: float = 4.0
    length: int = 8192

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.slow < self.fast and self.length > 0):
            raise ValueError(
                "rope_scaling: factor must be 1 or more, slow below fast, length above 0; got "
                f"factor {self.factor}, slow {self.slow}, fast {self.fast}, length {self.length}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder.

    vocab_size: rows of embedding and head; `Vocabulary.padded_size`. Training fills it in.
    d_model: width of the residual stream. num_layers: blocks. num_heads: query heads.
    num_kv_heads: key and value heads, a divisor of `num_heads`; None: as many (no grouping).
    d_head: width of a head; None: d_model over `num_heads` (Qwen 3 has wider ones).
    d_ff: width of the gated feed-forward; None: 8/3 d_model in whole multiples of 64.
    rope_bases: rotary base of each position axis (t, h, w). Text stands on the diagonal, so the
        h and w axes must reach as far as t does. One base alone: ids are numbered as they come,
        whatever they are of, as Llama and Chameleon have it.
    rope_scaling: slower turns for long contexts; with one base alone.
    qk_norm: of queries and keys: "rms", one weight for all heads; "layer", centred too, with
        weights and biases of each head (Chameleon); None (Llama).
    qkv_bias: queries, keys and values have biases (Qwen 2, arXiv 2407.10671, section 2.2).
    dropout: share of each residual branch's output that training drops (Chameleon-7B: 0.1).
    norm_eps: added to the mean square under every norm's root.
    tied_embeddings: the head's rows are the embedding's.
    norm_order: "pre" norms what goes into a branch; "swin" what comes out of it, which bounds its
        growth where QK-norm and dropout do not suffice (Chameleon-34B, arXiv 2405.09818, 2.3).
    logit_cap: bound c of the logits, c tanh(logits / c) (Gemma 2, arXiv 2408.00118: 30).
    window: ids that a windowed layer sees, its own the last; None: every layer sees all.
    full_every: each so-manieth layer sees all the same, the last of the group (Gemma 3: 6).
    experts: sparse feed-forward; None: dense.
    """

    vocab_size: int = 0
    d_model: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int | None = None
    d_head: int | None = None
    d_ff: int | None = None
    rope_bases: tuple[float, ...] = (10000.0, 10000.0, 10000.0)
    rope_scaling: RopeScaling | None = None
    qk_norm: QKNorm | None = "rms"
    qkv_bias: bool = False
    norm_eps: float = 1e-6
    dropout: float = 0.0
    tied_embeddings: bool = True
    norm_order: NormOrder = "pre"
    logit_cap: float | None = None
    window: int | None = None
    full_every: int = 6
    experts: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        if isinstance(self.experts, Mapping):  # as a stored config.json holds it
            plain: dict[str, Any] = dict(self.experts)
            object.__setattr__(self, "experts", ExpertsConfig(**plain))
        if isinstance(self.rope_scaling, Mapping):
            plain = dict(self.rope_scaling)
            object.__setattr__(self, "rope_scaling", RopeScaling(**plain))
        if (self.d_head is None and self.d_model % self.num_heads) or self.head_dim % 2:
            raise ValueError(
                f"d_model {self.d_model} must split into {self.num_heads} heads of even width"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.kv_heads}"
            )
        if len(self.rope_bases) not in (1, 3) or self.head_dim < 6:
            raise ValueError(
                "rope_bases needs one base for each of t, h, w, or one alone; heads at least 6 wide"
            )
        if self.rope_scaling is not None and len(self.rope_bases) != 1:
            raise ValueError("rope_scaling needs one rotary base alone: rope_bases with one number")
        if self.qk_norm not in ("rms", "layer", None):
            raise ValueError(f"qk_norm {self.qk_norm!r} must be 'rms', 'layer' or None")
        if self.norm_order not in ("pre", "swin"):
            raise ValueError(f"norm_order {self.norm_order!r} must be 'pre' or 'swin'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must be 0 or more, and less than 1")
        for name in ("logit_cap", "window", "full_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value} must be above 0")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_head or self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def feed_forward(self) -> int:
        """Width of the gated feed-forward."""
        return self.d_ff or -(-8 * self.d_model // 3 // 64) * 64

    def window_of(self, layer: int) -> int | None:
        """Ids that a layer sees; None: all."""
        return None if (layer + 1) % self.full_every == 0 else self.window

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """Experts of a layer; None: it is dense."""
        sparse = self.experts is not None and (layer + 1) % self.experts.every == 0
        return self.experts if sparse else None
