"""Rotary embedding against complex multiplication in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from unimm_kernels import pairs_per_axis, qk_norm_rotary, rotary
from unimm_kernels.testing import poisoned_memory, relative_error

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
BASES = (10_000.0, 100.0, 50.0)


def turned(x: Tensor, positions: Tensor, bases: tuple[float, ...]) -> Tensor:
    """Channel p + i (p + P) times exp(i angle)."""
    x = x.double()
    a, b = x.chunk(2, -1)
    angles = []
    for axis, n in enumerate(pairs_per_axis(x.shape[-1], len(bases))):
        speed = torch.tensor([bases[axis] ** (-i / n) for i in range(n)], dtype=torch.float64)
        angles.append(positions[axis].double()[..., None] * speed.to(x.device))
    angle = torch.cat(angles, -1)[:, :, None]
    out = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([out.real, out.imag], -1)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def positions_of(axes: int, batch: int, length: int, device: str) -> Tensor:
    """Not contiguous, as a slice of a longer row."""
    whole = torch.randint(0, 500, (axes, batch, length + 3), device=device)
    return whole[:, :, 2 : length + 2]


def heads_of(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Every second head of a wider tensor."""
    batch, length, heads, dim = shape
    wide = torch.randn(batch, length, 2 * heads, dim, device=device).to(dtype)
    return wide[:, :, ::2].detach().requires_grad_()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 17, 3, 80)])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_rotary(
    shape: tuple[int, ...], axes: int, dtype: torch.dtype, implementation: str, device: str
) -> None:
    x = heads_of(shape, dtype, device)
    positions = positions_of(axes, shape[0], shape[1], device)
    grad = torch.randn(shape, device=device).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    wide = x.detach().double().requires_grad_()
    want = turned(wide, positions, BASES[:axes])
    with poisoned_memory():
        got = rotary(x, positions, bases=BASES[:axes], implementation=implementation)
        (dx,) = torch.autograd.grad(got, x, grad)
    assert got.dtype == dtype
    # float32 angles: 500 radians are off by up to 3e-5.
    assert relative_error(got, want) < max(TOLERANCE[dtype], 5e-5)
    (want_dx,) = torch.autograd.grad(want, wide, grad.double())
    assert relative_error(dx, want_dx) < max(TOLERANCE[dtype], 5e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 17, 6, 80)])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_norm_and_rotary(
    shape: tuple[int, ...], dtype: torch.dtype, implementation: str, device: str
) -> None:
    batch, length, heads, dim = shape
    q = heads_of(shape, dtype, device)
    k = heads_of((batch, length, max(1, heads // 2), dim), dtype, device)
    weights = [torch.randn(dim, device=device).requires_grad_() for _ in range(2)]
    positions = positions_of(3, batch, length, device)
    grads = [torch.randn(t.shape, device=device).to(dtype) for t in (q, k)]
    leaves = [q, k, *weights]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = [
        turned(normed(x, w, 1e-5), positions, BASES) for x, w in zip(wide, wide[2:], strict=False)
    ]
    want_grads = torch.autograd.grad(want, wide, [g.double() for g in grads])
    options: dict[str, Any] = {"bases": BASES, "eps": 1e-5, "implementation": implementation}
    with poisoned_memory():
        got = qk_norm_rotary(q, k, weights[0], weights[1], positions, **options)
        got_grads = torch.autograd.grad(got, leaves, grads)
        with torch.no_grad():  # queries and keys in one go
            again = qk_norm_rotary(q, k, weights[0], weights[1], positions, **options)
    for a, b in zip(again, got, strict=True):
        assert a.dtype == b.dtype == dtype
        assert relative_error(a, b.detach().double()) < 1e-6
    tolerance = max(TOLERANCE[dtype], 5e-5)
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        assert relative_error(a, b) < tolerance


def test_scores_depend_on_differences_alone(device: str) -> None:
    q, k = torch.randn(2, 1, 1, 1, 32, device=device).unbind(0)
    scores = []
    for shift in (0, 17):
        at = torch.tensor([[[5 + shift]], [[3 + shift]], [[2 + shift]]], device=device)
        a, b = (rotary(t, p, bases=BASES) for t, p in ((q, at), (k, at - 2)))
        scores.append((a * b).sum())
    assert relative_error(scores[1], scores[0]) < 1e-4


def test_pairs_per_axis() -> None:
    assert pairs_per_axis(64, 1) == [32]
    assert pairs_per_axis(64, 3) == [12, 10, 10]
    assert pairs_per_axis(128, 3) == [22, 21, 21]


def test_one_axis_is_plain_rotary(device: str) -> None:
    """Channel i and i + D / 2 turn by pos * base^(-2 i / D), the layout of Llama checkpoints."""
    x = torch.zeros(1, 1, 1, 8, device=device)
    x[..., 1] = 1.0
    got = rotary(x, torch.full((1, 1, 1), 3, device=device), bases=(10_000.0,))
    angle = 3 * 10_000.0 ** (-2 / 8)
    assert got[0, 0, 0, 1] == pytest.approx(math.cos(angle))
    assert got[0, 0, 0, 5] == pytest.approx(math.sin(angle))


def test_opcheck_and_compile(device: str) -> None:
    x = torch.randn(1, 5, 2, 16, device=device, requires_grad=True)
    weight = torch.ones(16, device=device, requires_grad=True)
    positions = positions_of(3, 1, 5, device)
    bases = list(BASES)
    torch.library.opcheck(torch.ops.unimm.rotary.default, (x, positions, bases, False))
    torch.library.opcheck(torch.ops.unimm.norm_rotary.default, (x, weight, positions, bases, 1e-6))

    torch.library.opcheck(
        torch.ops.unimm.norm_rotary_.default,
        (x.detach().clone(), weight.detach(), positions, bases, 1e-6),
    )
    for name in ("torch", "triton"):

        def both(x: Tensor, weight: Tensor, name: str = name) -> Tensor:
            q, k = qk_norm_rotary(
                x, x * 2, weight, weight, positions, bases=BASES, implementation=name
            )
            return rotary(q + k, positions, bases=BASES, implementation=name).sum()

        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(x, weight), (x, weight))
        want = torch.autograd.grad(both(x, weight), (x, weight))
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("layout", ["heads-of-a-wider-tensor", "channels-apart"])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_in_place(layout: str, implementation: str, device: str) -> None:
    q, k = (heads_of((2, 17, n, 80), torch.float32, device).detach() for n in (3, 1))
    if layout == "channels-apart":
        q, k = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k))
    w = torch.randn(80, device=device)
    positions = positions_of(3, 2, 17, device)
    options: dict[str, Any] = {"bases": BASES, "implementation": implementation}
    want = qk_norm_rotary(q, k, w, w, positions, **options)
    turned_again = rotary(want[0], positions, **options)
    got = qk_norm_rotary(q, k, w, w, positions, inplace=True, **options)
    assert got[0] is q
    assert got[1] is k
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert rotary(q, positions, inplace=True, **options) is q
    assert torch.equal(q, turned_again)


def test_in_place_where_a_gradient_is_recorded() -> None:
    x = torch.zeros(1, 4, 2, 16, requires_grad=True)
    with pytest.raises(ValueError, match="write over what the gradient needs"):
        rotary(x, torch.zeros(3, 1, 4), bases=BASES, inplace=True)
    with torch.no_grad():
        assert rotary(x, torch.zeros(3, 1, 4), bases=BASES, inplace=True) is x


def test_positions_that_are_written_to_turn_anew() -> None:
    """The rotation of the last positions is remembered, for the layers of a model."""
    x, positions = torch.randn(1, 4, 2, 16), torch.zeros(3, 1, 4)
    assert torch.equal(rotary(x, positions, bases=BASES), x)
    positions += 3
    moved = rotary(x, positions, bases=BASES)
    assert not torch.equal(moved, x)
    assert torch.equal(moved, rotary(x, positions.clone(), bases=BASES))
    assert not torch.equal(moved, rotary(x, positions, bases=(5.0, 5.0, 5.0)))
    with torch.inference_mode():
        assert torch.equal(moved, rotary(x, positions.clone(), bases=BASES))


def test_errors() -> None:
    x, positions = torch.zeros(1, 4, 2, 16), torch.zeros(3, 1, 4)
    with pytest.raises(ValueError, match=r"positions \(3, 1, 4\) must be \(1, 1, 4\)"):
        rotary(x, positions, bases=(1e4,))
    with pytest.raises(ValueError, match="D even"):
        rotary(torch.zeros(1, 4, 2, 15), positions, bases=BASES)
    with pytest.raises(ValueError, match="too few for 3 axes"):
        rotary(torch.zeros(1, 4, 2, 4), positions, bases=BASES)
    with pytest.raises(ValueError, match=r"k \(1, 4, 2, 8\) must have as many channels"):
        qk_norm_rotary(x, x[..., :8], torch.ones(16), torch.ones(8), positions, bases=BASES)
    with pytest.raises(ValueError, match=r"k_weight \(8,\) must be \(16,\)"):
        qk_norm_rotary(x, x, torch.ones(16), torch.ones(8), positions, bases=BASES)
