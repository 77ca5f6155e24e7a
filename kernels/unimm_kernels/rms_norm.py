"""Root-mean-square norm, optionally of a sum with the residual stream.

y = h / sqrt(mean(h^2) + eps) * weight with h = x, or h = x + residual rounded to residual's dtype,
as the two steps apart would compute it. Backward, with r = 1 / sqrt(mean(h^2) + eps), n = h r,
g = dy weight: dh = r (g - n mean(g n)), and d weight is the sum of dy n over the rows.
Source: Zhang and Sennrich 2019 (1910.07467), section 3, equation 4.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from unimm_kernels.backend import programs, resolve, rows, tl, triton

# Channels of the widest row that one program holds in registers.
MAX_CHANNELS = 16384


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: None = None,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Norm over the last dimension, in float32; differentiable in x, weight and residual.

    Args:
        x: (..., D), floating.
        weight: (D,).
        residual: (..., D) in any float dtype, added to x before the norm.
        eps: added to the mean square.
        implementation: "triton", "torch" or None (by device).

    Returns:
        (..., D) in x's dtype; with `residual` a pair of it and the sum x + residual, which has
        residual's dtype and continues the residual stream.

    Raises:
        ValueError: shapes do not go together, or D is more than "triton" takes.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} must be ({x.shape[-1]},)")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"rms_norm: residual {tuple(residual.shape)} must have x's shape {tuple(x.shape)}"
        )
    if resolve(implementation, x) == "torch":
        return _reference(x, weight, residual, eps)
    if x.shape[-1] > MAX_CHANNELS:
        raise ValueError(
            f'rms_norm: {x.shape[-1]} channels are more than the {MAX_CHANNELS} of "triton": '
            'give implementation="torch"'
        )
    y, total = _rms_norm(x, weight, residual, eps)
    return y if residual is None else (y, total)


def _reference(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> Tensor | tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x if residual is None else (x.to(wide) + residual.to(wide)).to(residual.dtype)
    h, weight = total.to(wide), weight.to(wide)
    if torch.compiler.is_compiling():
        y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight
    elif torch.is_grad_enabled():
        y = EagerNorm.apply(h, weight, eps)
    else:
        y = (h * inverse_rms(h, eps)).mul_(weight)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), total)


class EagerNorm(torch.autograd.Function):
    """The norm of h (..., D) where nothing fuses the formula: few passes over memory each way.

    Measured on one core of an AMD EPYC (Zen 5), forward and backward of float32 (4096, 128):
    1.2 ms by autograd of the formula, 0.45 ms so.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, eps: float) -> Tensor:
        """H (..., D) and weight (D,) of one dtype, float32 at least."""
        scale = inverse_rms(h, eps)
        ctx.save_for_backward(h, weight, scale)
        return (h * scale).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of h and weight."""
        h, weight, scale = ctx.saved_tensors
        return *norm_gradient(grad, h, weight, scale), None


def inverse_rms(h: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(h^2) + eps) of (..., D), as (..., 1)."""
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    # Few calls: a row of 256 took 8.1 us with sums and quotients by Python numbers, 5.3 us so, on
    # one core of an AMD EPYC (Zen 5).
    least = torch.scalar_tensor(eps, dtype=h.dtype, device=h.device)
    return torch.addcmul(least, norm, norm, value=1 / h.shape[-1]).rsqrt_()


def norm_gradient(grad: Tensor, h: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of h and weight in h * scale * weight, scale being `inverse_rms` of h (..., D).

    Both sums over products grad * h are matrix-vector products, which need no temporaries.
    """
    width = h.shape[-1]
    product = (grad * h).reshape(-1, width)
    dweight = scale.reshape(-1) @ product
    # r^3 / D sum(dy w h) h: how the row's own scale moves.
    share = (product @ weight).view_as(scale) * scale.pow(3) / width
    return (grad * weight).mul_(scale).addcmul_(h, share, value=-1), dweight


@triton.jit
def forward_kernel(
    X, RESIDUAL, WEIGHT, Y, TOTAL, eps, sx, sr,
    D: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    h = tl.load(X + row * sx + column, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        h += tl.load(RESIDUAL + row * sr + column, mask=inside, other=0.0).to(tl.float32)
        total = h.to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + row * D + column, total, mask=inside)
        h = total.to(tl.float32)
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(tl.float32)
    y = h * tl.rsqrt(tl.sum(h * h, 0) / D + eps) * weight
    tl.store(Y + row * D + column, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    DY, DTOTAL, H, WEIGHT, DH, DWEIGHT, eps, n, share, sd, st, sh,
    D: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """`share` rows; DWEIGHT holds one row of float32 sums for each program."""
    column = tl.arange(0, BLOCK)
    inside = column < D
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * share
    for row in tl.range(first, tl.minimum(first + share, n)):
        h = tl.load(H + row * sh + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * sd + column, mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(h * h, 0) / D + eps)
        normed = h * r
        g = dy * weight
        dh = r * (g - normed * (tl.sum(g * normed, 0) / D))
        if ADDED:
            dh += tl.load(DTOTAL + row * st + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(DH + row * D + column, dh.to(DH.dtype.element_ty), mask=inside)
        dweight += dy * normed
    tl.store(DWEIGHT + tl.program_id(0) * D + column, dweight, mask=inside)


def warps(block: int) -> int:
    """Warps for a row of `block` channels: up to 16 elements a thread."""
    return min(32, max(1, block // 512))


@torch.library.custom_op("unimm::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm and the sum; the sum is empty without `residual`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    added = residual is not None
    total = torch.empty(
        x.shape if added else (0,), dtype=residual.dtype if added else x.dtype, device=x.device
    )
    flat, other = rows(x), rows(x if residual is None else residual)
    n, width = flat.shape
    block = triton.next_power_of_2(width)
    forward_kernel[(n,)](
        flat, other, weight.contiguous(), y, total, eps, flat.stride(0), other.stride(0),
        D=width, BLOCK=block, ADDED=added, num_warps=warps(block),
    )  # fmt: skip
    return y, total


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    total = x.new_empty((0,)) if residual is None else residual.new_empty(residual.shape)
    return x.new_empty(x.shape), total


@torch.library.custom_op("unimm::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: Tensor, grad_total: Tensor | None, h: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of h, in its dtype, and of weight."""
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grads, flat = rows(grad), rows(h)
    totals = grads if grad_total is None else rows(grad_total)
    n, width = flat.shape
    count = max(1, min(n, programs(h.device)))
    partial = torch.empty(count, width, dtype=torch.float32, device=h.device)
    block = triton.next_power_of_2(width)
    backward_kernel[(count,)](
        grads, totals, flat, weight.contiguous(), dh, partial, eps, n, triton.cdiv(n, count),
        grads.stride(0), totals.stride(0), flat.stride(0),
        D=width, BLOCK=block, ADDED=grad_total is not None, num_warps=warps(block),
    )  # fmt: skip
    return dh, partial.sum(0).to(weight.dtype)


@_rms_norm_backward.register_fake
def _(
    grad: Tensor, grad_total: Tensor | None, h: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, residual, ctx.eps = inputs
    ctx.dtype, ctx.added = x.dtype, residual is not None
    ctx.save_for_backward(output[1] if ctx.added else x, weight)


def _backward(
    ctx: Any, grad: Tensor, grad_total: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, None]:
    h, weight = ctx.saved_tensors
    dh, dweight = _rms_norm_backward(grad, grad_total if ctx.added else None, h, weight, ctx.eps)
    return dh.to(ctx.dtype), dweight, dh if ctx.added else None, None


_rms_norm.register_autograd(_backward, setup_context=_setup)
