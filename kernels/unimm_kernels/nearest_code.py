"""Nearest code: argmin_j |x - c_j|^2 or argmax_j cos(x, c_j), without the N x K matrix.

The score is |c_j|^2 / 2 - x . c_j, which orders the codes of one x as the squared distance does;
for cosine it is -x . c_j / |c_j|. Scores are float32 (float64 for float64 inputs); equal scores go
to the lowest index. Source: van den Oord et al. 2017 (1711.00937), equation 1; cosine: Yu et al.
2022 (2110.04627), section 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unimm_kernels.backend import adjacent, as_op, resolve, tl, triton

# Scores held at once on a CPU: 2 MiB, which stays in a core's cache. Measured on an AMD EPYC core
# at d = 8: 0.26 ns a score in the product for 1024 x 512 tiles, 0.65 for 256 x 2048.
TILE_ROWS, TILE_CODES = 1024, 512
# Scores up to which one product and one argmin are cheaper than the tiles' twenty small steps.
FEW_SCORES = 2**16


class ScoredCodes(NamedTuple):
    """What makes a score of a vector x: bias - x . code.

    Args:
        codes: (..., K, d); of unit length for the metric "cosine".
        bias: (..., K).
    """

    codes: Tensor
    bias: Tensor


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    implementation: str | None = None,
    scored: ScoredCodes | None = None,
) -> Tensor:
    """Index of the nearest code of each row; no gradient.

    Args:
        x: (N, d), floating.
        codebook: (K, d), floating.
        metric: "euclidean", or "cosine" (a zero vector in x gets index 0).
        implementation: "triton", "torch" or None (by device).
        scored: `scored_codes` of this codebook, which plain torch code makes anew where it is None.

    Returns:
        int64 (N,), the lowest index among equally near codes. Memory O(N + K d).
    """
    check_codes("nearest_code", x, codebook, 2, metric)
    chosen, cosine = resolve(implementation, x), metric == "cosine"
    if as_op(chosen):
        return search_op(x, codebook, cosine, chosen)
    with torch.no_grad():
        return search(*widened(x, scored or scored_codes(codebook, cosine)))


def check_codes(op: str, x: Tensor, codebook: Tensor, ndim: int, metric: str) -> None:
    """ValueError for shapes that do not fit and for an unknown metric."""
    if x.ndim != 2 or codebook.ndim != ndim or x.shape[-1] != codebook.shape[-1]:
        wanted = "(K, d)" if ndim == 2 else "(L, K, d)"
        raise ValueError(
            f"{op}: x {tuple(x.shape)} must be (N, d), the codes {tuple(codebook.shape)} {wanted}"
        )
    if codebook.shape[-2] == 0:
        raise ValueError(f"{op}: the codebook {tuple(codebook.shape)} holds no code")
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f'{op}: metric is {metric!r}: give "euclidean" or "cosine"')


def search_codes(x: Tensor, codebook: Tensor, cosine: bool, implementation: str) -> Tensor:
    """`nearest_code` with all its choices made."""
    with torch.no_grad():
        scored = scored_codes(codebook, cosine)
        if implementation == "triton":
            # Products of half-precision inputs are exact in float32: nothing is gained by widening.
            half = x.dtype == codebook.dtype and x.element_size() == 2 and not cosine
            return launch(x, codebook, scored.bias) if half else launch(x.float(), *scored)
        return search(*widened(x, scored))


search_op = torch.library.custom_op("unimm::nearest_code", search_codes, mutates_args=())


@search_op.register_fake
def _(x: Tensor, codebook: Tensor, cosine: bool, implementation: str) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.int64)


def scored_codes(codebook: Tensor, cosine: bool) -> ScoredCodes:
    """What scores are made of, for many searches of the same codes.

    Args:
        codebook: (..., K, d), floating.
        cosine: for the metric "cosine".

    Returns:
        float32, or float64 where the codes are.
    """
    codes = codebook.to(torch.float64 if codebook.dtype == torch.float64 else torch.float32)
    if cosine:
        codes = F.normalize(codes, dim=-1)
        return ScoredCodes(codes, codes.new_zeros(codes.shape[:-1]))
    return ScoredCodes(codes, codes.square().sum(-1) / 2)


def widened(x: Tensor, scored: ScoredCodes) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, codes and biases of one dtype, the wider one."""
    wide = torch.promote_types(x.dtype, scored.codes.dtype)
    return x.to(wide), scored.codes.to(wide), scored.bias.to(wide)


def search(x: Tensor, codes: Tensor, bias: Tensor) -> Tensor:
    """Plain torch search: tiles of scores, of which only new best rows are looked at twice."""
    # Autocast leaves products with `out` as they are.
    if len(x) * len(codes) <= FEW_SCORES:
        scores = codes.new_empty(len(x), len(codes))
        return torch.addmm(bias, x, codes.T, alpha=-1, out=scores).argmin(1)
    index = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    scores = codes.new_empty(min(TILE_ROWS, x.shape[0]) * min(TILE_CODES, codes.shape[0]))
    for row in range(0, x.shape[0], TILE_ROWS):
        rows, found = x[row : row + TILE_ROWS], index[row : row + TILE_ROWS]
        best = rows.new_full((rows.shape[0],), float("inf"))
        for first in range(0, codes.shape[0], TILE_CODES):
            tile = codes[first : first + TILE_CODES]
            out = scores[: rows.shape[0] * tile.shape[0]].view(rows.shape[0], tile.shape[0])
            torch.addmm(bias[first : first + TILE_CODES], rows, tile.T, alpha=-1, out=out)
            # amin runs in vector registers, argmin does not (0.05 and 0.58 ns a score).
            lowest = out.amin(1)
            better = (lowest < best).nonzero().squeeze(1)
            found[better] = out[better].argmin(1) + first
            best = torch.minimum(best, lowest)
    return index


@triton.jit
def best_of_tile(score, best, block, start):
    """Lane by lane minimum and the tile it came from; the earlier tile wins a tie."""
    better = score < best
    return tl.where(better, score, best), tl.where(better, start, block)


@triton.jit
def lowest_index(best, block, BLOCK_N: tl.constexpr):
    """Index of each row's minimum over the lanes, the lowest one of a tie."""
    index = block + tl.arange(0, BLOCK_N)[None, :]
    tied = best == tl.min(best, 1)[:, None]
    found = tl.min(tl.where(tied, index, 0x7FFFFFFF), 1)
    return tl.where(found == 0x7FFFFFFF, 0, found)  # A row of NaN equals nothing.


@triton.jit
def search_kernel(
    X, CODES, BIAS, INDEX, n, K, sx, sc,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows against all codes; SPLIT: D goes through in parts of BLOCK_D."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    X += row.to(tl.int64)[:, None] * sx
    d = tl.arange(0, BLOCK_D)
    kept = (row < n)[:, None]
    best = tl.full([BLOCK_M, BLOCK_N], float("inf"), tl.float32)
    block = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    x = tl.load(X + d[None, :], mask=kept & (d < D)[None, :], other=0.0)
    for start in tl.range(0, K, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        C = CODES + j[:, None] * sc + d[None, :]
        inside = (j < K)[:, None]
        if SPLIT:
            product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for part in tl.range(0, D, BLOCK_D):
                column = (d + part < D)[None, :]
                xs = tl.load(X + part + d[None, :], mask=kept & column, other=0.0)
                c = tl.load(C + part, mask=inside & column, other=0.0)
                product = tl.dot(xs, tl.trans(c), product, input_precision=PRECISION)
        else:
            c = tl.load(C, mask=inside & (d < D)[None, :], other=0.0)
            product = tl.dot(x, tl.trans(c), input_precision=PRECISION)
        bias = tl.load(BIAS + j, mask=j < K, other=float("inf"))
        best, block = best_of_tile(bias[None, :] - product, best, block, start)
    tl.store(INDEX + row, lowest_index(best, block, BLOCK_N).to(tl.int64), mask=row < n)


def tile_of(d: int, element_size: int) -> tuple[int, int, int, bool]:
    """Rows, codes and channels of a tile, and whether the channels are split."""
    block_d = max(16, triton.next_power_of_2(d))
    if element_size == 4:
        # Three TF32 products for one float32 product: twice the operands in registers.
        return 64, 64, min(block_d, 32), block_d > 32
    return 128, 128, min(block_d, 128), block_d > 128


def launch(x: Tensor, codes: Tensor, bias: Tensor) -> Tensor:
    """The Triton search."""
    x, codes = adjacent(x, codes)
    index = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    rows, columns, block_d, split = tile_of(x.shape[1], x.element_size())
    search_kernel[(triton.cdiv(x.shape[0], rows),)](
        x, codes, bias, index, x.shape[0], codes.shape[0], x.stride(0), codes.stride(0),
        D=x.shape[1], BLOCK_D=block_d, BLOCK_M=rows, BLOCK_N=columns, SPLIT=split,
        PRECISION="tf32x3", num_warps=8, num_stages=2,
    )  # fmt: skip
    return index
