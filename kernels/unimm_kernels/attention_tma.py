"""Attention's forward pass for Hopper: tiles brought in by the tensor memory accelerator.

The same sums as `attention_kernels.forward_kernel`, written as Triton 3.6 can warp-specialise them
on sm_90 (a producer warp group that loads, two consumer groups that multiply): ONE loop,
descriptors made on the device, four warps, 128 queries. Two loops, or descriptors made on the host,
do not compile; eight warps compile and are not specialised (`aot.py` looks for the registers'
re-division). So every tile is masked here, where the plain kernel has loops without a mask. Source
of the structure: Shah et al. 2024 (2407.08608, FlashAttention-3), section 3.1.

The compiler gives every vector load that the products depend on to the producer, and then fails on
it. So documents do not come in as a vector of starts: a bit for each token says that a document
starts there, and scalars of 16 bits are turned into the starts by arithmetic.

The accelerator fills what is outside a tensor with zeros, so ragged lengths and head dimensions
that are no power of two need no masks on loads. It wants addresses in multiples of 16 bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unimm_kernels.attention_kernels import seen_keys, store_rows
from unimm_kernels.backend import tl, triton
from unimm_kernels.tuning import Tiles

# "triton-ws" is the warp-specialised kernel, "triton-tma" the same code without the split of warps.
VARIANTS = ("triton-tma", "triton-ws")
# Tokens that one integer tells of: their bits are exact in float32.
BITS = 16
WORD: tl.constexpr = tl.constexpr(BITS)  # pyright: ignore[reportCallIssue]


def refusal(q: Tensor, k: Tensor, v: Tensor, packed: bool, causal: bool) -> str | None:
    """Why the kernel cannot run on these inputs, or None: it can."""
    if q.element_size() != 2:
        return f"needs half precision, these tensors are {q.dtype}"
    if packed and not causal:
        return "reads packed documents under a causal mask alone"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] != 9:
        return "is written for sm_90, the chips H100 and H200"
    for name, x in (("q", q), ("k", k), ("v", v)):
        steps = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3]))
        if x.stride(3) != 1 or any(step % 16 for step in steps):
            return f"needs {name} and its strides in multiples of 16 bytes"
    return None


def tma_tiles(head_dim: int, specialized: bool) -> Tiles:
    """Tiles without spills on sm_90: specialised, four warps become three groups of four."""
    warps = 4 if specialized else 8
    return Tiles(128, 128, warps, 2) if head_dim <= 128 else Tiles(128, 32, warps, 2)


def boundary_words(starts: Tensor) -> Tensor:
    """int32 (B, ceil(T / 16)): bit b of word w is set where token 16 w + b starts a document.

    `starts` is int32 (B, T), the start of each token's document.
    """
    batch, length = starts.shape
    own = torch.arange(length, dtype=torch.int32, device=starts.device)
    bits = torch.nn.functional.pad((starts == own).int(), (0, -length % BITS))
    place = torch.arange(BITS, dtype=torch.int32, device=starts.device)
    return (bits.view(batch, -1, BITS) << place).sum(-1, dtype=torch.int32)


def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that a launch makes on the device."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    scale: float,
    window: int,
    modes: dict[str, Any],
    tiles: Tiles,
    specialized: bool,
) -> None:
    """Run the kernel; `scale` holds log2(e), `modes` the constants that all kernels share."""
    length, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    words = lse if starts is None else boundary_words(starts)
    triton.set_allocator(scratch)
    tma_forward_kernel[(triton.cdiv(length, tiles.queries), heads, q.shape[0])](
        q, k, v, out, lse, lse if starts is None else starts, words,
        scale, window, length, keys, heads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        **modes, BLOCK_M=tiles.queries, BLOCK_N=tiles.keys, SPECIALIZED=specialized,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@triton.jit
def document_starts(i, one, own, WORDS, length, BLOCK_M: tl.constexpr):
    """Start of the document of each token i of a tile from token `one` on, whose own is `own`."""
    first = i * 0 + own
    for part in tl.static_range(BLOCK_M // WORD):
        base = one + part * WORD
        word = tl.load(WORDS + part, mask=base < length, other=0)
        lane = i - base
        # The starts up to token i; the exponent of a float is the place of the highest bit.
        kept = word & ((2 << tl.minimum(tl.maximum(lane, 0), WORD - 1)) - 1)
        kept = tl.where(lane >= 0, kept, 0)
        highest = (kept.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        first = tl.where(kept > 0, base + highest, first)
    return first


@triton.jit
def tma_forward_kernel(
    Q, K, V, O, LSE, STARTS, WORDS,  # noqa: E741
    scale, window, length, keys, heads,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sob, sot, soh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head, the last tile first; arguments as `forward_kernel`'s."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    one = tile * BLOCK_M
    i = one + tl.arange(0, BLOCK_M)
    last = tl.minimum(one + BLOCK_M, length) - 1
    # Documents need a causal mask here, so that their ends bound nothing.
    first, end = seen_keys(i, STARTS, STARTS, length, keys, window, CAUSAL, WINDOWED, False)
    low, _ = seen_keys(one, STARTS, STARTS, length, keys, window, CAUSAL, WINDOWED, False)
    _, high = seen_keys(last, STARTS, STARTS, length, keys, window, CAUSAL, WINDOWED, False)
    if PACKED:
        own = tl.load(STARTS + batch * length + one)
        low = tl.maximum(low, own)
        WORDS += batch * tl.cdiv(length, WORD) + one // WORD
        first = tl.maximum(first, document_starts(i, one, own, WORDS, length, BLOCK_M))
    low = tl.maximum(low, 0) // BLOCK_N * BLOCK_N

    queries = tl.make_tensor_descriptor(
        Q + batch * sqb + head * sqh, [length, D], [sqt, 1], [BLOCK_M, BLOCK_D]
    )
    key_tiles = tl.make_tensor_descriptor(
        K + batch * skb + head // GROUP * skh, [keys, D], [skt, 1], [BLOCK_N, BLOCK_D]
    )
    value_tiles = tl.make_tensor_descriptor(
        V + batch * svb + head // GROUP * svh, [keys, D], [svt, 1], [BLOCK_N, BLOCK_D]
    )
    q = queries.load([one, 0])
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Finite, so that a tile of which a query sees nothing gives no -inf - -inf; such weights of 1
    # are multiplied by 2^-1e30 = 0 at the first key that it sees, and every query sees one.
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(low, high, BLOCK_N, warp_specialize=SPECIALIZED):
        j = start + tl.arange(0, BLOCK_N)
        s = tl.dot(q, key_tiles.load([start, 0]).T, input_precision=PRECISION) * scale
        seen = (j[None, :] >= first[:, None]) & (j[None, :] < end[:, None])
        s = tl.where(seen, s, -1.0e30)
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.math.exp2(s - new[:, None])
        shrink = tl.math.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = value_tiles.load([start, 0])
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new
    # Rows behind the end may have seen nothing; they are not stored.
    total = tl.where(total == 0.0, 1.0, total)
    store_rows(O + batch * sob + head * soh, i, sot, length, acc / total[:, None], D, BLOCK_D)
    tl.store(LSE + (batch * heads + head) * length + i, top + tl.math.log2(total), mask=i < length)
