"""Attention of the newest few tokens against a static key-value cache.

o_i = softmax(scale * q_i K^T) V over the first lengths - (t - 1 - i) keys of the row: the t new
tokens are the last ones of the valid part of the cache, and each sees itself and what came before.
The Triton version splits the keys of a row among programs, enough to fill the device, each of which
serves all query heads of a key head, and then joins their partial softmaxes (Flash-Decoding:
Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unimm_kernels.attention import LOG2_E, block_of
from unimm_kernels.attention_kernels import load_rows
from unimm_kernels.backend import (
    Remembered,
    adjacent,
    autocast,
    precision,
    programs,
    resolve,
    same_dtype,
    tl,
    triton,
)

BLOCK_N = 64


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention for decoding; inference only (no gradient under "triton").

    Args:
        q: (B, t, H, D), the newest tokens, t at least 1.
        k_cache: (B, S, G, D), H a multiple of G.
        v_cache: (B, S, G, D).
        lengths: (B,) integers in t..S: valid keys of each row, the t new ones counted in. Whatever
            the cache holds behind them is never read into the result. To be changed through torch
            alone: for one tensor the layers of a model look at it once.
        scale: factor of the scores, D ** -0.5 by default.
        implementation: "triton", "torch" or None (by device).

    Returns:
        (B, t, H, D) in q's dtype, or autocast's where autocast is on.

    Raises:
        ValueError: shapes or dtypes do not go together; says which.
    """
    q, k_cache, v_cache = autocast(q, k_cache, v_cache)
    same_dtype("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache)
    _check(q, k_cache, v_cache, lengths)
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    if resolve(implementation, q) == "torch":
        return _reference(q, k_cache, v_cache, lengths, factor)
    return _decode(q, k_cache, v_cache, lengths, factor)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> None:
    fits = q.ndim == 4 and k_cache.shape == v_cache.shape and q.shape[::3] == k_cache.shape[::3]
    if fits and q.shape[2] % k_cache.shape[2] == 0 and lengths.shape == q.shape[:1]:
        return
    shapes = f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}"
    raise ValueError(
        f"decode_attention: {shapes}, lengths {tuple(lengths.shape)}: need q (B, t, H, D), "
        "caches (B, S, G, D) with H a multiple of G, lengths (B,)"
    )


def _bounds(lengths: Tensor) -> tuple[int, int]:
    """The shortest and the longest row."""
    shortest, longest = lengths.aminmax()
    return int(shortest), int(longest)


remembered_bounds = Remembered(_bounds)


def _reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Plain torch: two products for each key head, scores in float32 at least.

    On a CPU only the part of the cache that some row has filled is read. Measured on one core of an
    AMD EPYC (Zen 5), 32 rows, 100 of 256 keys, 2 query heads and 1 key head of 64, float32: 2.6 ms
    by masked scaled_dot_product_attention of the whole cache, 0.2 ms so. Where nothing is masked,
    that function with the heads of a group as its queries: one row of 280 keys 83 us and 18 us so;
    of bfloat16 its time is up to 5 times that of the products.
    """
    batch, new, heads, dim = q.shape
    groups, masked = k.shape[2], True
    if batch and q.device.type == "cpu" and not torch.compiler.is_compiling():
        shortest, longest = remembered_bounds(lengths)
        k, v = k[:, :longest], v[:, :longest]
        masked = new > 1 or shortest < longest  # else every key counts in every row
        if not masked and q.dtype == torch.float32:
            own = q.reshape(batch, groups, -1, dim)
            keys, values = k.transpose(1, 2), v.transpose(1, 2)
            out = F.scaled_dot_product_attention(own, keys, values, scale=scale)
            return out.reshape(q.shape)
    wide = torch.promote_types(q.dtype, torch.float32)
    own = (q.to(wide) * scale).unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3)
    scores = own @ k.to(wide).permute(0, 2, 3, 1)
    if masked:
        key = torch.arange(k.shape[1], device=q.device)
        last = lengths.view(-1, 1) - new + torch.arange(new, device=q.device)
        late = (key > last[:, :, None])[:, None, :, None]
        each = scores.view(batch, groups, new, -1, len(key))
        # A score of an unwritten NaN of the cache is replaced; a weight of 0 times one is NaN.
        scores = each.masked_fill(late, float("-inf")).flatten(2, 3)
        v = v.masked_fill((key >= lengths.view(-1, 1))[:, :, None, None], 0)
    weights = scores.softmax(-1).to(q.dtype)
    out = (weights @ v.transpose(1, 2)).view(batch, groups, new, -1, dim)
    return out.transpose(1, 2).reshape(batch, new, heads, dim)


@triton.jit
def split_kernel(
    Q, K, V, LENGTHS, PARTIAL, TOP, TOTAL, scale, new,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of the keys of one key head, for the rows (token, head of the group)."""
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    length = tl.load(LENGTHS + batch).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    begin = split * share
    row = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    token = row // GROUP
    where = Q + batch * sqb + token * sqt + (head * GROUP + row % GROUP) * sqh
    mask = (token < new)[:, None] & (d < D)[None, :]
    q = tl.load(where[:, None] + d[None, :], mask=mask, other=0.0)
    end = tl.minimum(length - new + 1 + token, length)
    K += batch * skb + head * skh
    V += batch * svb + head * svh
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for start in tl.range(begin, tl.minimum(begin + share, length), BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = load_rows(K, j, skt, length, D, BLOCK_D, True)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = tl.where(j[None, :] < end[:, None], s, float("-inf"))
        high = tl.maximum(top, tl.max(s, 1))
        base = tl.where(high == float("-inf"), 0.0, high)
        p = tl.math.exp2(s - base[:, None])
        shrink = tl.math.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(V, j, svt, length, D, BLOCK_D, True)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = high
    part = ((batch * tl.num_programs(1) + head) * splits + split) * BLOCK_R + row
    tl.store(PARTIAL + part[:, None] * BLOCK_D + d[None, :], acc)
    tl.store(TOP + part, top)
    tl.store(TOTAL + part, total)


@triton.jit
def join_kernel(
    PARTIAL, TOP, TOTAL, OUT, splits, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One row of the output from its partial sums, added in the order of the keys. OUT is dense."""
    head = tl.program_id(0)
    token = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = token * GROUP + head % GROUP
    base = (batch * (heads // GROUP) + head // GROUP) * splits
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    top = float("-inf")
    total = 0.0
    for split in tl.range(0, splits):
        part = (base + split) * BLOCK_R + row
        own = tl.load(TOP + part)
        if own > float("-inf"):
            high = tl.maximum(top, own)
            keep = tl.math.exp2(top - high)
            scale = tl.math.exp2(own - high)
            acc = acc * keep + scale * tl.load(PARTIAL + part * BLOCK_D + d)
            total = total * keep + scale * tl.load(TOTAL + part)
            top = high
    out = OUT + ((batch * tl.num_programs(1) + token) * heads + head) * D + d
    tl.store(out, (acc / total).to(OUT.dtype.element_ty), mask=d < D)


@torch.library.custom_op("unimm::decode_attention", mutates_args=())
def _decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    q, k, v = adjacent(q, k, v)
    batch, new, heads, head_dim = q.shape
    key_heads = k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # From the cache's size, not from the lengths: nothing waits, and a CUDA graph stays valid.
    most = triton.cdiv(k.shape[1], BLOCK_N)
    splits = max(1, min(most, programs(q.device) // (batch * key_heads)))
    block_r = max(16, triton.next_power_of_2(new * (heads // key_heads)))
    block_d = block_of(head_dim)
    shape = (batch, key_heads, splits, block_r)
    partial = torch.empty(*shape, block_d, dtype=torch.float32, device=q.device)
    top = torch.empty(shape, dtype=torch.float32, device=q.device)
    total = torch.empty(shape, dtype=torch.float32, device=q.device)
    sizes = {
        "D": head_dim,
        "BLOCK_D": block_d,
        "GROUP": heads // key_heads,
        "BLOCK_R": block_r,
    }
    split_kernel[(splits, key_heads, batch)](
        q, k, v, lengths, partial, top, total, scale * LOG2_E, new,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        **sizes, BLOCK_N=BLOCK_N, PRECISION=precision(q.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip
    join_kernel[(heads, new, batch)](partial, top, total, out, splits, heads, **sizes, num_warps=1)
    return out


@_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)
