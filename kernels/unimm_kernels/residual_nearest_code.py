"""Residual vector quantization: each level codes what the levels before it left over.

r_0 = x; i_l = nearest_code(r_l, C_l); r_{l+1} = r_l - C_l[i_l].
Source: Zeghidour et al. 2021 (2107.03312), algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unimm_kernels.backend import adjacent, as_op, resolve, tl, triton
from unimm_kernels.nearest_code import (
    ScoredCodes,
    best_of_tile,
    check_codes,
    launch,
    lowest_index,
    scored_codes,
    search,
    widened,
)

# Channels whose residuals one program holds in registers; wider vectors go level by level.
FUSED_CHANNELS = 128


def residual_nearest_code(
    x: Tensor,
    codebooks: Tensor,
    *,
    metric: str = "euclidean",
    implementation: str | None = None,
    scored: ScoredCodes | None = None,
) -> Tensor:
    """Indices of all levels; no gradient.

    Args:
        x: (N, d), floating.
        codebooks: (L, K, d), floating.
        metric: "euclidean" or "cosine", how each level chooses; what is subtracted is the code
            itself in both.
        implementation: "triton", "torch" or None (by device).
        scored: `scored_codes` of these codebooks, which plain torch code makes anew where it is
            None.

    Returns:
        int64 (N, L). Residuals are float32 (float64 for float64 codebooks).
    """
    check_codes("residual_nearest_code", x, codebooks, 3, metric)
    chosen, cosine = resolve(implementation, x), metric == "cosine"
    if as_op(chosen):
        return _residual_op(x, codebooks, cosine, chosen)
    with torch.no_grad():
        return _by_level(x, codebooks, scored or scored_codes(codebooks, cosine), chosen)


def _residual_codes(x: Tensor, codebooks: Tensor, cosine: bool, implementation: str) -> Tensor:
    with torch.no_grad():
        if implementation == "triton" and x.shape[1] <= FUSED_CHANNELS:
            return _launch(x, codebooks, cosine)
        return _by_level(x, codebooks, scored_codes(codebooks, cosine), implementation)


_residual_op = torch.library.custom_op(
    "unimm::residual_nearest_code", _residual_codes, mutates_args=()
)


@_residual_op.register_fake
def _(x: Tensor, codebooks: Tensor, cosine: bool, implementation: str) -> Tensor:
    return x.new_empty((x.shape[0], codebooks.shape[0]), dtype=torch.int64)


def _by_level(x: Tensor, codebooks: Tensor, scored: ScoredCodes, implementation: str) -> Tensor:
    """The formula as it stands, one search for each level."""
    run = launch if implementation == "triton" else search
    residual, *parts = widened(x, scored)
    indices: list[Tensor] = []
    for codebook, codes, bias in zip(codebooks.unbind(), *map(torch.unbind, parts), strict=True):
        found = run(residual, codes, bias)
        indices.append(found)
        residual = residual - codebook[found]
    return torch.stack(indices, dim=1)


@triton.jit
def residual_kernel(
    X, CODES, SCORED, BIAS, INDEX, n, levels, K, sx,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All levels of one tile of rows; the residual stays in registers. CODES are what is
    subtracted, SCORED what is compared, both dense (levels, K, D)."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    kept = (row < n)[:, None] & (d < D)[None, :]
    residual = tl.load(X + row[:, None] * sx + d[None, :], mask=kept, other=0.0).to(tl.float32)
    for level in tl.range(0, levels):
        best = tl.full([BLOCK_M, BLOCK_N], float("inf"), tl.float32)
        block = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for start in tl.range(0, K, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            mask = (j < K)[:, None] & (d < D)[None, :]
            c = tl.load(SCORED + (level * K + j)[:, None] * D + d[None, :], mask=mask, other=0.0)
            product = tl.dot(residual, tl.trans(c), input_precision="tf32x3")
            bias = tl.load(BIAS + level * K + j, mask=j < K, other=float("inf"))
            best, block = best_of_tile(bias[None, :] - product, best, block, start)
        found = lowest_index(best, block, BLOCK_N)
        tl.store(INDEX + row * levels + level, found.to(tl.int64), mask=row < n)
        chosen = CODES + (level * K + found)[:, None] * D + d[None, :]
        residual -= tl.load(chosen, mask=(d < D)[None, :], other=0.0).to(tl.float32)


def tile_of(d: int) -> tuple[int, int]:
    """Rows and codes of a tile: no spills on sm_80 and sm_90, by compilation (`aot.py`)."""
    return (64, 64) if d <= 32 else (32, 64)


def _launch(x: Tensor, codebooks: Tensor, cosine: bool) -> Tensor:
    (x,), codebooks = adjacent(x), codebooks.contiguous()
    scored, bias = scored_codes(codebooks, cosine)
    levels, size, d = codebooks.shape
    index = torch.empty(x.shape[0], levels, dtype=torch.int64, device=x.device)
    rows, columns = tile_of(d)
    residual_kernel[(triton.cdiv(x.shape[0], rows),)](
        x, codebooks, scored, bias, index, x.shape[0], levels, size, x.stride(0),
        D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), BLOCK_M=rows, BLOCK_N=columns,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return index
