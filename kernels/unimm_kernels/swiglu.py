"""SwiGLU's product: y = silu(gate) * up with silu(a) = a / (1 + exp(-a)).

Source: Shazeer 2020 (2002.05202), equation 6.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unimm_kernels.backend import resolve, rows, same_dtype, tl, triton

BLOCK = 1024


def swiglu(gate: Tensor, up: Tensor, *, implementation: str | None = None) -> Tensor:
    """silu(gate) * up, element by element; differentiable in both.

    Args:
        gate: (..., D), floating; halves of one product (`x.chunk(2, -1)`) are read in place.
        up: (..., D), same shape and dtype.
        implementation: "triton", "torch" or None (by device).

    Returns:
        (..., D) in gate's dtype.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    same_dtype("swiglu", gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    if resolve(implementation, gate) == "torch":
        return F.silu(gate) * up
    return _swiglu(gate, up)


@triton.jit
def forward_kernel(GATE, UP, Y, width, sg, su, BLOCK: tl.constexpr):
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(GATE + row * sg + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * su + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(Y + row * width + column, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(DY, GATE, UP, DGATE, DUP, width, sd, sg, su, BLOCK: tl.constexpr):
    """d gate = dy up (s + gate s (1 - s)), d up = dy gate s, with s = sigmoid(gate)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dy = tl.load(DY + row * sd + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * sg + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * su + column, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = dy * up * (s + gate * s * (1 - s))
    out = row * width + column
    tl.store(DGATE + out, dgate.to(DGATE.dtype.element_ty), mask=inside)
    tl.store(DUP + out, (dy * gate * s).to(DUP.dtype.element_ty), mask=inside)


@torch.library.custom_op("unimm::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gates, ups = rows(gate), rows(up)
    n, width = gates.shape
    forward_kernel[(n, triton.cdiv(width, BLOCK))](
        gates, ups, y, width, gates.stride(0), ups.stride(0), BLOCK=BLOCK, num_warps=4
    )
    return y


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("unimm::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grads, gates, ups = rows(grad), rows(gate), rows(up)
    n, width = gates.shape
    backward_kernel[(n, triton.cdiv(width, BLOCK))](
        grads, gates, ups, dgate, dup, width, grads.stride(0), gates.stride(0), ups.stride(0),
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return dgate, dup


@_swiglu_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_backward(grad, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_setup)
