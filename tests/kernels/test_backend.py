"""Which implementation runs, on which machine."""

import subprocess
import sys
import weakref

import pytest
import torch

from unimm_kernels.backend import Remembered, resolve, rows

CPU = torch.zeros(2)


def test_the_device_chooses() -> None:
    assert resolve(None, CPU) == "torch"
    assert resolve("torch", CPU) == "torch"


def test_what_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unimm_kernels.backend.INTERPRETED", False)
    with pytest.raises(ValueError, match="needs CUDA tensors, these are on cpu"):
        resolve("triton", CPU)
    monkeypatch.setattr("unimm_kernels.backend.HAS_TRITON", False)
    with pytest.raises(ValueError, match="triton, which is not installed"):
        resolve("triton", CPU)
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        resolve("cuda", CPU)


def test_rows_keeps_views() -> None:
    x = torch.zeros(4, 6, 16)
    assert rows(x[..., :8]).data_ptr() == x.data_ptr()
    assert rows(x.transpose(1, 2)).stride(-1) == 1


def test_without_triton_the_torch_path_works() -> None:
    """As on a Mac: the package is hidden, every op imports and runs, asking for it is an error."""
    code = """
import importlib.util, torch
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find_spec(name, *a)
import unimm_kernels as u, unimm_kernels.backend
q = torch.randn(1, 5, 2, 8, requires_grad=True)
at = torch.zeros(3, 1, 5)
w = torch.ones(8)
q2, k2 = u.qk_norm_rotary(q, q, w, w, at, bases=(10., 10., 10.))
y = u.attention(u.rotary(q2, at, bases=(10., 10., 10.)), k2, q)
y = u.swiglu(u.rms_norm(y, w), y).reshape(-1, 8)
u.linear_cross_entropy(y, torch.randn(11, 8), torch.arange(10)).loss.backward()
u.decode_attention(q[:, :1], q, q, torch.tensor([5]))
codes = u.nearest_code(y, torch.randn(4, 8))
u.code_sums(y, codes, 4), u.residual_nearest_code(y, torch.randn(2, 4, 8))
try:
    u.swiglu(w, w, implementation="triton")
except ValueError as error:
    print(error)
assert not u.backend.HAS_TRITON
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "needs the package triton" in done.stdout


def test_what_is_remembered_goes_with_its_tensor() -> None:
    made = []

    def double(x: torch.Tensor, times: int) -> torch.Tensor:
        made.append(times)
        return x * times

    remembered = Remembered(double)
    x = torch.ones(3)
    first = remembered(x, 2)
    assert remembered(x, 2) is first
    assert remembered(x, 3) is not first
    assert remembered(torch.ones(3), 3) is not first
    result = weakref.ref(remembered(x, 2))
    del x, first
    assert result() is None
    assert made == [2, 3, 3, 2]
