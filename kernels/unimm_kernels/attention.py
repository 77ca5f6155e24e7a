"""Attention: O = softmax(scale * Q K^T + M) V, M zero where a query sees a key, else -inf.

Sources: Vaswani et al. 2017, section 3.2.1; grouped queries: Ainslie et al. 2023 (2305.13245).
Query i of T stands at key position i + S - T, so a causal mask is aligned to the last key, as in
FlashAttention 2.1. Window w: a query sees itself and the w - 1 keys before it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unimm_kernels import attention_kernels as kernels
from unimm_kernels import attention_tma
from unimm_kernels.attention_tiles import tiled_attention
from unimm_kernels.backend import adjacent, autocast, precision, resolve, same_dtype, triton
from unimm_kernels.documents import document_ranges
from unimm_kernels.tuning import PLAIN, Choice, choice, forward_tiles

LOG2_E = 1.4426950408889634


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention with grouped queries, packed documents and sliding windows; differentiable.

    Args:
        q: (B, T, H, D), floating.
        k: (B, S, G, D), H a multiple of G: query head h reads key head h // (H / G).
        v: (B, S, G, D).
        causal: a query sees no later key. Needs S >= T.
        window: number of keys that a query sees, itself the last; needs `causal`.
        segment_ids: (B, T) integers; a document is a maximal run of equal ids, and no token sees
            another document. Needs S == T.
        cu_seqlens: (n + 1,) integers, the same by document starts among the B * T tokens, padded by
            repeating the last value.
        scale: factor of the scores, D ** -0.5 by default.
        implementation: "triton", "torch" or None (by device). "triton" runs the forward kernel that
            was measured fastest on the device (tuning.py); "triton-tma" and "triton-ws" ask for the
            one of attention_tma.py, without and with warp specialisation.

    Returns:
        (B, T, H, D) in q's dtype, or autocast's where autocast is on.

    Raises:
        ValueError: shapes, dtypes or options do not go together; says which.
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v, causal, window, segment_ids is not None or cu_seqlens is not None)
    ranges = document_ranges(segment_ids, cu_seqlens, q.shape[0], q.shape[1])
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    if not factor > 0:
        raise ValueError(f"attention: scale {factor} must be positive")
    starts, ends = ranges or (None, None)
    asked = implementation if implementation in attention_tma.VARIANTS else None
    if resolve("triton" if asked else implementation, q) == "torch":
        # Of whole float32 rows scaled_dot_product_attention skips what is masked, too, and is a
        # little faster: 12.5 ms for 13.4 both ways of 8 rows of 256, 230 for 281 of one of 2,048.
        whole = ranges is None and window is None and (not causal or q.shape[1] == k.shape[1])
        if q.device.type == "cpu" and not (whole and q.dtype == torch.float32):
            return tiled_attention(q, k, v, starts, ends, causal, window or 0, factor)
        return _reference(q, k, v, ranges, causal, window, factor)
    return _attention(q, k, v, starts, ends, causal, window or 0, factor, asked or "triton")[0]


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, packed: bool) -> None:
    same_dtype("attention", q=q, k=k, v=v)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(f"attention: {shapes}: need q (B, T, H, D) and k, v (B, S, G, D)")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are no multiple of {k.shape[2]}")
    if causal and k.shape[1] < q.shape[1]:
        raise ValueError(f"attention: {shapes}: causal attention needs S >= T")
    if packed and k.shape[1] != q.shape[1]:
        raise ValueError(f"attention: {shapes}: packed documents need S == T")
    if q.shape[1] * q.stride(1) >= 2**31 or k.shape[1] * max(k.stride(1), v.stride(1)) >= 2**31:
        raise ValueError(f"attention: {shapes}: one row spans more than 2**31 elements")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"attention: window {window} must be at least 1 and needs causal=True")


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: tuple[Tensor, Tensor] | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """Plain torch: one call of scaled_dot_product_attention, a boolean mask where one is needed."""
    length, keys = q.shape[1], k.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    # SDPA aligns is_causal to the first key; that is ours only for a square mask.
    if ranges is None and window is None and (not causal or length == keys):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
    position = torch.arange(length, device=q.device)[:, None] + (keys - length)
    key = torch.arange(keys, device=q.device)[None, :]
    mask = torch.ones(1, length, keys, dtype=torch.bool, device=q.device)
    if causal:
        mask = mask & (key <= position)
    if window is not None:
        mask = mask & (key > position - window)
    if ranges is not None:
        starts, ends = ranges
        mask = mask & (key >= starts[:, :, None]) & (key < ends[:, :, None])
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, None], scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def block_of(head_dim: int) -> int:
    """Width of a tile's rows: a power of two, 16 at least, as the matrix units need."""
    return max(16, triton.next_power_of_2(head_dim))


def _modes(
    q: Tensor, k: Tensor, starts: Tensor | None, causal: bool, window: int
) -> dict[str, Any]:
    return {
        "D": q.shape[3],
        "BLOCK_D": block_of(q.shape[3]),
        "GROUP": q.shape[2] // k.shape[2],
        "CAUSAL": causal,
        "WINDOWED": window > 0,
        "PACKED": starts is not None,
        "PRECISION": precision(q.dtype),
    }


def _forward_choice(
    asked: str, q: Tensor, k: Tensor, v: Tensor, packed: bool, causal: bool
) -> Choice:
    """What was asked for by name, or was measured and can run on these inputs."""
    reason = attention_tma.refusal(q, k, v, packed, causal)
    if asked in attention_tma.VARIANTS:
        if reason is not None:
            raise ValueError(f'attention: implementation "{asked}" {reason}: give "triton"')
        return Choice(asked, attention_tma.tma_tiles(q.shape[3], asked == "triton-ws"))
    best = choice("attention.forward", q)
    if best.variant != PLAIN and reason is not None:
        return Choice(PLAIN, forward_tiles(q.shape[3], q.element_size()))
    return best


@torch.library.custom_op("unimm::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    variant: str,
) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, D) and log2 of the normaliser, float32 (B, H, T)."""
    q, k, v = adjacent(q, k, v)
    batch, length, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    modes = _modes(q, k, starts, causal, window)
    variant, tiles = _forward_choice(variant, q, k, v, starts is not None, causal)
    if variant in attention_tma.VARIANTS:
        special = variant == "triton-ws"
        attention_tma.launch(
            q, k, v, out, lse, starts, scale * LOG2_E, window, modes, tiles, special
        )
        return out, lse
    grid = (triton.cdiv(length, tiles.queries), heads, batch)
    kernels.forward_kernel[grid](
        q, k, v, out, lse, lse if starts is None else starts, lse if ends is None else ends,
        scale * LOG2_E, window, length, k.shape[1], heads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        **modes, BLOCK_M=tiles.queries, BLOCK_N=tiles.keys,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out, lse


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    variant: str,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("unimm::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, dense. Runs the queries' kernel first: it leaves delta."""
    grad, q, k, v, out = adjacent(grad, q, k, v, out)
    batch, length, heads, _ = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    delta = torch.empty_like(lse)
    ranges = (lse if starts is None else starts, lse if ends is None else ends)
    numbers = (scale * LOG2_E, scale, window, length, k.shape[1], heads)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    modes = _modes(q, k, starts, causal, window)
    tiles = choice("attention.query_gradient", q).tiles
    kernels.query_gradient_kernel[(triton.cdiv(length, tiles.queries), heads, batch)](
        q, k, v, out, grad, lse, delta, dq, *ranges, *numbers,
        *strides, *out.stride()[:3], *grad.stride()[:3],
        **modes, BLOCK_M=tiles.queries, BLOCK_N=tiles.keys,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    tiles = choice("attention.key_gradient", q).tiles
    kernels.key_gradient_kernel[(triton.cdiv(k.shape[1], tiles.keys), k.shape[2], batch)](
        q, k, v, grad, lse, delta, dk, dv, *ranges, *numbers, *strides, *grad.stride()[:3],
        **modes, BLOCK_M=tiles.queries, BLOCK_N=tiles.keys,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return dq, dk, dv


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ends, ctx.causal, ctx.window, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output, starts, ends)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    grads = _attention_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.window, ctx.scale)
    return (*grads, *(None,) * 6)


_attention.register_autograd(_backward, setup_context=_setup)
