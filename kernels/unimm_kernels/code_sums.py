"""Sums for a moving-average codebook: how often each code was chosen, and the sum of its vectors.

n_j = sum_i [i_i = j], m_j = sum_i [i_i = j] x_i. Source: van den Oord et al. 2017 (1711.00937),
appendix A.1. Without a one-hot matrix, which holds N K numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unimm_kernels.backend import adjacent, as_op, resolve, tl, triton

BLOCK_ROWS, BLOCK_D = 32, 64


def code_sums(
    x: Tensor, codes: Tensor, num_codes: int, *, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """Counts and sums per code; no gradient.

    Args:
        x: (N, d), floating.
        codes: int64 (N,) in 0..num_codes - 1.
        num_codes: K. Codes outside it are an error, except under "triton", where checking would
            wait for the device: there they are left out.
        implementation: "triton", "torch" or None (by device).

    Returns:
        counts, float32 (K,), and sums, float32 (K, d); repeated calls give equal bits on a CPU and
        under "triton".
    """
    if x.ndim != 2 or codes.shape != x.shape[:1]:
        raise ValueError(
            f"code_sums: x {tuple(x.shape)} must be (N, d) and codes {tuple(codes.shape)} (N,)"
        )
    chosen = resolve(implementation, x)
    run = _sums_op if as_op(chosen) else _code_sums
    return run(x.detach(), codes, num_codes, chosen)


def _code_sums(
    x: Tensor, codes: Tensor, num_codes: int, implementation: str
) -> tuple[Tensor, Tensor]:
    if implementation == "triton":
        return _sorted_sums(x, codes, num_codes)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < num_codes:
        raise ValueError(
            f"code_sums: codes span {int(codes.min())}..{int(codes.max())}, "
            f"outside the {num_codes} codes"
        )
    counts = torch.bincount(codes, minlength=num_codes).float()
    sums = torch.zeros(num_codes, x.shape[1], device=x.device)
    return counts, sums.index_add_(0, codes, x.float())


_sums_op = torch.library.custom_op("unimm::code_sums", _code_sums, mutates_args=())


@_sums_op.register_fake
def _(x: Tensor, codes: Tensor, num_codes: int, implementation: str) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(num_codes, dtype=torch.float32),
        x.new_empty((num_codes, x.shape[1]), dtype=torch.float32),
    )


@triton.jit
def sums_kernel(
    X, ORDER, BOUNDS, SUMS, sx,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_D channels of one code: its rows lie together in ORDER and are added in that order."""
    code = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(BOUNDS + code + 1)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(tl.load(BOUNDS + code), end, BLOCK_ROWS):
        place = start + tl.arange(0, BLOCK_ROWS)
        row = tl.load(ORDER + place, mask=place < end, other=0)
        mask = (place < end)[:, None] & (d < D)[None, :]
        x = tl.load(X + row[:, None] * sx + d[None, :], mask=mask, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    tl.store(SUMS + code * D + d, total, mask=d < D)


def _sorted_sums(x: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Sorting instead of atomics: the order of each sum is fixed, and nothing waits for a host."""
    (x,) = adjacent(x)
    ordered, order = codes.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(num_codes + 1, device=x.device))
    sums = torch.empty(num_codes, x.shape[1], dtype=torch.float32, device=x.device)
    sums_kernel[(num_codes, triton.cdiv(x.shape[1], BLOCK_D))](
        x, order, bounds.int(), sums, x.stride(0),
        D=x.shape[1], BLOCK_ROWS=BLOCK_ROWS, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return bounds.diff().float(), sums
