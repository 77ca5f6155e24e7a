"""Decoding against a float64 softmax over the valid part of the cache."""

import pytest
import torch
from torch import Tensor

from unimm_kernels import attention, decode_attention
from unimm_kernels.testing import poisoned_memory, relative_error

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def expected(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    out = torch.empty(q.shape, dtype=torch.float64)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            n = int(lengths[b]) - (q.shape[1] - 1 - i)
            for h in range(q.shape[2]):
                keys = k[b, :n, h // group].double()
                weights = (keys @ q[b, i, h].double() * scale).softmax(0)
                out[b, i, h] = weights @ v[b, :n, h // group].double()
    return out


@pytest.mark.parametrize(
    ("new", "size", "heads", "groups", "dim", "lengths"),
    [
        pytest.param(1, 1, 1, 1, 64, [1], id="first-token"),
        pytest.param(1, 257, 4, 2, 64, [257, 3, 130], id="one-new"),
        pytest.param(3, 123, 4, 1, 80, [123, 3], id="three-new"),
        pytest.param(1, 63, 2, 2, 128, [63], id="D128"),
        pytest.param(2, 63, 2, 1, 256, [40], id="D256"),
    ],
)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_against_float64(
    new: int,
    size: int,
    heads: int,
    groups: int,
    dim: int,
    lengths: list[int],
    implementation: str,
    device: str,
) -> None:
    for dtype, tolerance in TOLERANCE.items():
        batch = len(lengths)
        q = torch.randn(batch, heads, new, dim).to(dtype).transpose(1, 2)
        k, v = torch.randn(2, batch, size, groups, dim).to(dtype)
        limits = torch.tensor(lengths)
        want = expected(q, k, v, limits, dim**-0.5)
        for b, n in enumerate(lengths):
            k[b, n:] = v[b, n:] = float("nan")  # Whatever lies there must not be read.
        with poisoned_memory():
            got = decode_attention(
                *(t.to(device) for t in (q, k, v, limits)), implementation=implementation
            )
        assert got.dtype == dtype
        assert relative_error(got.cpu(), want) < tolerance, dtype


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_token_by_token_is_the_whole_row(implementation: str, device: str) -> None:
    q, k, v = torch.randn(3, 2, 17, 2, 16, device=device)
    whole = attention(q, k, v, scale=0.3)
    for n in range(1, 18):
        step = decode_attention(
            q[:, n - 1 : n],
            k,
            v,
            torch.full((2,), n, device=device),
            scale=0.3,
            implementation=implementation,
        )
        assert relative_error(step, whole[:, n - 1 : n]) < 1e-5


def test_lengths_may_grow_in_place(device: str) -> None:
    q = torch.randn(2, 1, 2, 16, device=device)
    cache = torch.randn(2, 9, 2, 16, device=device)
    lengths = torch.tensor([3, 3], device=device)
    for _ in range(3):
        got = decode_attention(q, cache, cache, lengths, implementation="torch")
        want = decode_attention(q, cache, cache, lengths.clone(), implementation="torch")
        assert torch.equal(got, want)
        lengths += torch.tensor([1, 2], device=device)


def test_opcheck_and_compile(device: str) -> None:
    q = torch.randn(1, 1, 2, 16, device=device)
    cache = torch.randn(1, 33, 1, 16, device=device)
    lengths = torch.tensor([20], device=device)
    op = torch.ops.unimm.decode_attention.default
    torch.library.opcheck(op, (q, cache, cache, lengths, 0.25))

    for name in ("torch", "triton"):

        def step(q: Tensor, name: str = name) -> Tensor:
            return decode_attention(q * 2, cache, cache, lengths, implementation=name)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(q), step(q)) < 1e-6


def test_errors() -> None:
    q, cache = torch.zeros(1, 1, 3, 16), torch.zeros(1, 8, 2, 16)
    with pytest.raises(ValueError, match="H a multiple of G"):
        decode_attention(q, cache, cache, torch.ones(1))
    with pytest.raises(ValueError, match=r"need q \(B, t, H, D\)"):
        decode_attention(q, cache, cache[:, :4], torch.ones(1))
    with pytest.raises(ValueError, match=r"lengths \(2,\)"):
        decode_attention(q[:, :, :2], cache, cache, torch.ones(2))
