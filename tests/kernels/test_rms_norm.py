"""The norm against float64, alone and with the residual stream."""

import pytest
import torch
from torch import Tensor

from unimm_kernels import rms_norm
from unimm_kernels.testing import poisoned_memory, relative_error

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def normed(h: Tensor, weight: Tensor) -> Tensor:
    return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (3, 5, 123), (63, 64), (2, 1030)])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, implementation: str, device: str) -> None:
    x = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)[..., : shape[-1]]
    x = x.detach().requires_grad_()
    weight = torch.randn(shape[-1], device=device).requires_grad_()
    grad = torch.randn(shape, device=device).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = normed(*wide)
    want_grads = torch.autograd.grad(want, wide, grad.double())
    with poisoned_memory():
        got = rms_norm(x, weight, eps=1e-5, implementation=implementation)
        got_grads = torch.autograd.grad(got, (x, weight), grad)
    assert got.dtype == dtype
    for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
        assert relative_error(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_norm_of_a_sum(
    dtype: torch.dtype, stream: torch.dtype, implementation: str, device: str
) -> None:
    x = torch.randn(63, 123, device=device).to(dtype).requires_grad_()
    residual = torch.randn(63, 123, device=device).to(stream).requires_grad_()
    weight = torch.randn(123, device=device).requires_grad_()
    grads = [torch.randn(63, 123, device=device).to(t) for t in (dtype, stream)]
    wide = [t.detach().double().requires_grad_() for t in (x, residual, weight)]
    total = wide[0] + wide[1]
    want = (normed(total, wide[2]), total)
    want_grads = torch.autograd.grad(want, wide, [g.double() for g in grads])
    with poisoned_memory():
        got = rms_norm(x, weight, residual=residual, eps=1e-5, implementation=implementation)
        got_grads = torch.autograd.grad(got, (x, residual, weight), grads)
    assert [t.dtype for t in got] == [dtype, stream]
    tolerance = max(TOLERANCE[dtype], TOLERANCE[stream])
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        assert relative_error(a, b) < tolerance


def test_the_sum_is_the_stream_as_it_is_stored(device: str) -> None:
    """Fused or apart, the next layer reads the same number."""
    x, residual = torch.randn(2, 5, 64, device=device).bfloat16()
    weight = torch.ones(64, device=device)
    for implementation in ("torch", "triton"):
        y, total = rms_norm(x, weight, residual=residual, implementation=implementation)
        assert torch.equal(total, x + residual)
        assert torch.equal(y, rms_norm(x + residual, weight, implementation=implementation))


def test_opcheck_and_compile(device: str) -> None:
    x = torch.randn(5, 24, device=device, requires_grad=True)
    residual = torch.randn(5, 24, device=device, requires_grad=True)
    weight = torch.randn(24, device=device, requires_grad=True)
    op = torch.ops.unimm.rms_norm.default
    torch.library.opcheck(op, (x, weight, None, 1e-6))
    torch.library.opcheck(op, (x, weight, residual, 1e-6))

    for name in ("torch", "triton"):

        def step(x: Tensor, residual: Tensor, weight: Tensor, name: str = name) -> Tensor:
            y, total = rms_norm(x * 2, weight, residual=residual, implementation=name)
            return (y * total).sum() + rms_norm(y, weight, implementation=name).sum()

        leaves = (x, residual, weight)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(*leaves), leaves)
        for a, b in zip(got, torch.autograd.grad(step(*leaves), leaves), strict=True):
            assert relative_error(a, b) < 1e-6


def test_errors() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight \(4,\) must be \(8,\)"):
        rms_norm(x, torch.ones(4))
    with pytest.raises(ValueError, match="residual"):
        rms_norm(x, torch.ones(8), residual=torch.zeros(1, 8))
    with pytest.raises(ValueError, match="more than the 16384"):
        rms_norm(torch.zeros(1, 16385), torch.ones(16385), implementation="triton")
