"""Triton kernels of attention: forward, gradient of the queries, gradient of keys and values.

Every mask here (causal, window, packed documents) lets query i see one range of keys, and the
ranges grow with i. So a tile of queries meets three runs of key tiles: some cut by the ranges'
starts, some seen by all of its queries and computed without a mask, some cut by the ranges' ends.
The forward pass is FlashAttention's (Dao 2023, 2307.08691, algorithm 1), in powers of two:
lse = log2(sum_j 2^(s_ij)), s = scale * log2(e) * q . k. The backward pass (algorithm 2) is split in
two kernels, each of which owns what it writes: no atomics, equal bits in every run.

No dot product here is transposed after it was computed: on sm_90 Triton 3.4 to 3.6 stores such a
tile in the wrong layout (fla-org/flash-linear-attention#640). The keys' gradient therefore
computes S^T and dP^T as products of their own.
"""

from unimm_kernels.backend import tl, triton


@triton.jit
def seen_keys(
    i, STARTS, ENDS, length, keys, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """First and end of the keys that query i (a number or a block) sees."""
    if PACKED:
        first = tl.load(STARTS + i, mask=i < length, other=0)
        end = tl.load(ENDS + i, mask=i < length, other=0)
    else:
        first = i * 0
        end = i * 0 + keys
    own = i + keys - length
    if CAUSAL:
        end = tl.minimum(end, own + 1)
    if WINDOWED:
        first = tl.maximum(first, own + 1 - window)
    return first, end


@triton.jit
def seeing_queries(
    j, STARTS, ENDS, length, keys, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """First and end of the queries that see key j: the inverse of `seen_keys`."""
    if PACKED:
        first = tl.load(STARTS + j, mask=j < keys, other=0)
        end = tl.load(ENDS + j, mask=j < keys, other=0)
    else:
        first = j * 0
        end = j * 0 + length
    own = j - (keys - length)
    if CAUSAL:
        first = tl.maximum(first, own)
    if WINDOWED:
        end = tl.minimum(end, own + window)
    return first, end


@triton.jit
def load_rows(
    pointer, i, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECKED: tl.constexpr
):
    """Rows i of a matrix with adjacent columns; zero behind `limit` and behind column D."""
    d = tl.arange(0, BLOCK_D)
    where = pointer + i[:, None] * stride + d[None, :]
    if CHECKED:
        return tl.load(where, mask=(i < limit)[:, None] & (d < D)[None, :], other=0.0)
    if BLOCK_D == D:
        return tl.load(where)
    return tl.load(where, mask=(d < D)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, i, stride, limit, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store the rows below `limit` and the columns below D, in the pointer's type."""
    d = tl.arange(0, BLOCK_D)
    tl.store(
        pointer + i[:, None] * stride + d[None, :],
        value.to(pointer.dtype.element_ty),
        mask=(i < limit)[:, None] & (d < D)[None, :],
    )


@triton.jit
def runs(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """Tile bounds of [low, high): where the unmasked run [full_low, full_high) begins and ends."""
    begin = low // BLOCK * BLOCK
    full_begin = tl.minimum(tl.cdiv(full_low, BLOCK) * BLOCK, tl.cdiv(high, BLOCK) * BLOCK)
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(full_begin, full_high // BLOCK * BLOCK)
    return begin, full_begin, full_end


@triton.jit
def query_tile(
    tile, STARTS, ENDS, length, keys, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Queries of a tile, the keys that each sees, the bounds of its `runs`, and their end."""
    one = tile * BLOCK_M
    i = one + tl.arange(0, BLOCK_M)
    last = tl.minimum(one + BLOCK_M, length) - 1
    first, end = seen_keys(i, STARTS, ENDS, length, keys, window, CAUSAL, WINDOWED, PACKED)
    low, full_high = seen_keys(one, STARTS, ENDS, length, keys, window, CAUSAL, WINDOWED, PACKED)
    full_low, high = seen_keys(last, STARTS, ENDS, length, keys, window, CAUSAL, WINDOWED, PACKED)
    begin, full_begin, full_end = runs(low, high, full_low, full_high, BLOCK_N)
    return i, first, end, begin, full_begin, full_end, high


@triton.jit
def forward_tiles(
    acc, top, total, q, K, V, first, end, begin, stop, sks, svs, keys, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles [begin, stop)."""
    for start in tl.range(begin, stop, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = load_rows(K, j, sks, keys, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            seen = (j[None, :] >= first[:, None]) & (j[None, :] < end[:, None])
            s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1) * scale)
        base = new
        if MASKED:  # No key seen so far: -inf - -inf would be NaN.
            base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.math.exp2(s * scale - base[:, None])
        shrink = tl.math.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(V, j, svs, keys, D, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new
    return acc, top, total


@triton.jit
def forward_kernel(
    Q, K, V, O, LSE, STARTS, ENDS,  # noqa: E741
    scale, window, length, keys, heads,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sob, sot, soh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. The last tile goes first: under a causal mask it is the
    longest, and short ones then fill the gaps at the end."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    Q += batch * sqb + head * sqh
    K += batch * skb + head // GROUP * skh
    V += batch * svb + head // GROUP * svh
    i, first, end, begin, full_begin, full_end, high = query_tile(
        tile, STARTS + batch * length, ENDS + batch * length, length, keys, window,
        CAUSAL, WINDOWED, PACKED, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    q = load_rows(Q, i, sqt, length, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if WINDOWED or PACKED:
        acc, top, total = forward_tiles(
            acc, top, total, q, K, V, first, end, begin, full_begin, skt, svt, keys, scale,
            D, BLOCK_D, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    acc, top, total = forward_tiles(
        acc, top, total, q, K, V, first, end, full_begin, full_end, skt, svt, keys, scale,
        D, BLOCK_D, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    acc, top, total = forward_tiles(
        acc, top, total, q, K, V, first, end, full_end, high, skt, svt, keys, scale,
        D, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    # Rows behind the end saw nothing; 1 keeps them from 0 / 0, and they are not stored.
    total = tl.where(total == 0.0, 1.0, total)
    O += batch * sob + head * soh  # noqa: E741
    store_rows(O, i, sot, length, acc / total[:, None], D, BLOCK_D)
    tl.store(LSE + (batch * heads + head) * length + i, top + tl.math.log2(total), mask=i < length)


@triton.jit
def query_gradient_tiles(
    dq, q, do, lse, delta, K, V, first, end, begin, stop, sks, svs, keys, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ += dS K over the key tiles [begin, stop), dS = P * (dO V^T - delta)."""
    for start in tl.range(begin, stop, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = load_rows(K, j, sks, keys, D, BLOCK_D, MASKED)
        v = load_rows(V, j, svs, keys, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.math.exp2(s * scale - lse[:, None])
        if MASKED:
            seen = (j[None, :] >= first[:, None]) & (j[None, :] < end[:, None])
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def query_gradient_kernel(
    Q, K, V, O, DO, LSE, DELTA, DQ, STARTS, ENDS,  # noqa: E741
    scale, factor, window, length, keys, heads,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sob, sot, soh, sdb, sdt, sdh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries, and delta_i = O_i . dO_i for the other kernel. DQ is (B, T, H, D),
    dense."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    Q += batch * sqb + head * sqh
    K += batch * skb + head // GROUP * skh
    V += batch * svb + head // GROUP * svh
    i, first, end, begin, full_begin, full_end, high = query_tile(
        tile, STARTS + batch * length, ENDS + batch * length, length, keys, window,
        CAUSAL, WINDOWED, PACKED, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    q = load_rows(Q, i, sqt, length, D, BLOCK_D, True)
    do = load_rows(DO + batch * sdb + head * sdh, i, sdt, length, D, BLOCK_D, True)
    o = load_rows(O + batch * sob + head * soh, i, sot, length, D, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row = (batch * heads + head) * length + i
    tl.store(DELTA + row, delta, mask=i < length)
    # Behind the end: weights 2^-inf = 0.
    lse = tl.load(LSE + row, mask=i < length, other=float("inf"))
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOWED or PACKED:
        dq = query_gradient_tiles(
            dq, q, do, lse, delta, K, V, first, end, begin, full_begin, skt, svt, keys, scale,
            D, BLOCK_D, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    dq = query_gradient_tiles(
        dq, q, do, lse, delta, K, V, first, end, full_begin, full_end, skt, svt, keys, scale,
        D, BLOCK_D, BLOCK_N, False, PRECISION,
    )  # fmt: skip
    dq = query_gradient_tiles(
        dq, q, do, lse, delta, K, V, first, end, full_end, high, skt, svt, keys, scale,
        D, BLOCK_D, BLOCK_N, True, PRECISION,
    )  # fmt: skip
    DQ += (batch * length * heads + head) * D
    store_rows(DQ, i, heads * D, length, dq * factor, D, BLOCK_D)


@triton.jit
def key_gradient_tiles(
    dk, dv, k, v, Q, DO, LSE, DELTA, first, end, begin, stop, sqt, sdt, length, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dV += P^T dO and dK += dS^T Q over the query tiles [begin, stop)."""
    for start in tl.range(begin, stop, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        q = load_rows(Q, i, sqt, length, D, BLOCK_D, MASKED)
        do = load_rows(DO, i, sdt, length, D, BLOCK_D, MASKED)
        if MASKED:
            lse = tl.load(LSE + i, mask=i < length, other=float("inf"))
            delta = tl.load(DELTA + i, mask=i < length, other=0.0)
        else:
            lse = tl.load(LSE + i)
            delta = tl.load(DELTA + i)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.math.exp2(s * scale - lse[None, :])
        if MASKED:
            seen = (i[None, :] >= first[:, None]) & (i[None, :] < end[:, None])
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def key_gradient_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, STARTS, ENDS,
    scale, factor, window, length, keys, heads,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sdb, sdt, sdh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, summed over the query heads of its group. DK and DV are
    (B, S, G, D), dense."""
    tile = tl.program_id(0)
    key_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    STARTS += batch * length
    ENDS += batch * length
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first, end = seeing_queries(j, STARTS, ENDS, length, keys, window, CAUSAL, WINDOWED, PACKED)
    one = tile * BLOCK_N
    last = tl.minimum(one + BLOCK_N, keys) - 1
    low, full_high = seeing_queries(
        one, STARTS, ENDS, length, keys, window, CAUSAL, WINDOWED, PACKED
    )
    full_low, high = seeing_queries(
        last, STARTS, ENDS, length, keys, window, CAUSAL, WINDOWED, PACKED
    )
    low = tl.maximum(low, 0)
    begin, full_begin, full_end = runs(low, high, full_low, full_high, BLOCK_M)

    k = load_rows(K + batch * skb + key_head * skh, j, skt, keys, D, BLOCK_D, True)
    v = load_rows(V + batch * svb + key_head * svh, j, svt, keys, D, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in tl.range(0, GROUP):
        head = key_head * GROUP + member
        Q_head = Q + batch * sqb + head * sqh
        DO_head = DO + batch * sdb + head * sdh
        LSE_head = LSE + (batch * heads + head) * length
        DELTA_head = DELTA + (batch * heads + head) * length
        dk, dv = key_gradient_tiles(
            dk, dv, k, v, Q_head, DO_head, LSE_head, DELTA_head, first, end, begin, full_begin,
            sqt, sdt, length, scale, D, BLOCK_D, BLOCK_M, True, PRECISION,
        )  # fmt: skip
        dk, dv = key_gradient_tiles(
            dk, dv, k, v, Q_head, DO_head, LSE_head, DELTA_head, first, end, full_begin, full_end,
            sqt, sdt, length, scale, D, BLOCK_D, BLOCK_M, False, PRECISION,
        )  # fmt: skip
        dk, dv = key_gradient_tiles(
            dk, dv, k, v, Q_head, DO_head, LSE_head, DELTA_head, first, end, full_end, high,
            sqt, sdt, length, scale, D, BLOCK_D, BLOCK_M, True, PRECISION,
        )  # fmt: skip
    key_heads = heads // GROUP
    base = (batch * keys * key_heads + key_head) * D
    store_rows(DK + base, j, key_heads * D, keys, dk * factor, D, BLOCK_D)
    store_rows(DV + base, j, key_heads * D, keys, dv, D, BLOCK_D)
