"""SwiGLU against float64."""

import pytest
import torch
from torch import Tensor

from unimm_kernels import swiglu
from unimm_kernels.testing import poisoned_memory, relative_error

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (63, 123), (2, 3, 257), (1, 2050)])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_against_float64(
    shape: tuple[int, ...], dtype: torch.dtype, implementation: str, device: str
) -> None:
    both = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype) * 3
    leaves = [t.detach().requires_grad_() for t in both.chunk(2, -1)]
    grad = torch.randn(shape, device=device).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = wide[0] / (1 + (-wide[0]).exp()) * wide[1]
    want_grads = torch.autograd.grad(want, wide, grad.double())
    with poisoned_memory():
        got = swiglu(*leaves, implementation=implementation)
        got_grads = torch.autograd.grad(got, leaves, grad)
    assert got.dtype == dtype
    for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
        assert relative_error(a, b) < TOLERANCE[dtype]


def test_opcheck_and_compile(device: str) -> None:
    gate = torch.randn(5, 24, device=device, requires_grad=True)
    up = torch.randn(5, 24, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.unimm.swiglu.default, (gate, up))

    def step(gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate * 2, up, implementation="triton").sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(gate, up), (gate, up))
    for a, b in zip(got, torch.autograd.grad(step(gate, up), (gate, up)), strict=True):
        assert relative_error(a, b) < 1e-6


def test_errors() -> None:
    with pytest.raises(ValueError, match="differ"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="differ in dtype"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 3).half())
