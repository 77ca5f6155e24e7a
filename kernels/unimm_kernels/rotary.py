"""Rotary position embedding over several axes, alone or fused with the norm of queries and keys.

Channel pair p of P = D / 2 is (p, p + P), the half-split layout of GPT-NeoX and Llama; it turns by
positions[a] * bases[a] ** (-i / n), p being pair i of the n pairs of axis a. The P pairs are split
over the axes as even as it goes, in order, the rest to the first axis. With one axis and base b
this is plain rotary embedding, angle pos * b ** (-2 i / D).
Sources: Su et al. 2021 (2104.09864), section 3.2; several axes: Wang et al. 2024 (2409.12191),
section 2.1; norm of queries and keys: Dehghani et al. 2023 (2302.05442), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unimm_kernels.backend import Remembered, adjacent, programs, resolve, tl, triton
from unimm_kernels.rms_norm import inverse_rms, norm_gradient


def rotary(
    x: Tensor,
    positions: Tensor,
    *,
    bases: Sequence[float],
    inplace: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Turn the channel pairs of `x` by their positions; differentiable in x.

    Args:
        x: (B, T, H, D), D even, floating.
        positions: (A, B, T), integers or floats: for A = 3 the axes are t, h, w.
        bases: A floats, the base of each axis.
        inplace: write over x and return it; only where no gradient is recorded.
        implementation: "triton", "torch" or None (by device).

    Returns:
        (B, T, H, D) in x's dtype; angles and products are in float32.
    """
    _check("rotary", x, positions, bases)
    if inplace:
        _check_inplace("rotary", x)
    if resolve(implementation, x) == "torch":
        y = _reference(x, None, remembered_rotation(positions, x.shape[-1], tuple(bases)), 0.0)
        return x.copy_(y) if inplace else y
    numbers = [float(base) for base in bases]
    if inplace:
        _inplace(x, None, positions, numbers, 0.0)
        return x
    return _rotary(x, positions, numbers, False)


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    *,
    bases: Sequence[float],
    eps: float = 1e-6,
    inplace: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm of each head, times a weight, then rotary embedding; differentiable.

    Args:
        q: (B, T, H, D), D even, floating.
        k: (B, T, G, D).
        q_weight: (D,), shared by the query heads.
        k_weight: (D,), shared by the key heads.
        positions: (A, B, T), integers or floats.
        bases: A floats, the base of each axis.
        eps: added to the mean square.
        inplace: write over q and k and return them; only where no gradient is recorded.
        implementation: "triton", "torch" or None (by device).

    Returns:
        q (B, T, H, D) and k (B, T, G, D) in their own dtypes; the arithmetic is float32.

    Raises:
        ValueError: shapes do not go together, or `inplace` where a gradient is recorded.
    """
    _check("qk_norm_rotary", q, positions, bases)
    _check("qk_norm_rotary", k, positions, bases)
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"qk_norm_rotary: q {tuple(q.shape)} and k {tuple(k.shape)} must have as many channels"
        )
    for name, x, weight in (("q_weight", q, q_weight), ("k_weight", k, k_weight)):
        if weight.shape != x.shape[-1:]:
            raise ValueError(
                f"qk_norm_rotary: {name} {tuple(weight.shape)} must be ({x.shape[-1]},)"
            )
    if inplace:
        _check_inplace("qk_norm_rotary", q, k)
    if resolve(implementation, q) == "torch":
        turn = remembered_rotation(positions, q.shape[-1], tuple(bases))
        normed = _reference_pair(q, k, q_weight, k_weight, turn, eps)
        return (q.copy_(normed[0]), k.copy_(normed[1])) if inplace else normed
    numbers = [float(base) for base in bases]
    if inplace:
        _inplace(q, q_weight, positions, numbers, eps)
        _inplace(k, k_weight, positions, numbers, eps)
        return q, k
    return (
        _norm_rotary(q, q_weight, positions, numbers, eps),
        _norm_rotary(k, k_weight, positions, numbers, eps),
    )


def pairs_per_axis(head_dim: int, axes: int) -> list[int]:
    """How many of a head's `head_dim` / 2 channel pairs each of `axes` axes turns.

    As even as it goes, the rest to the first.
    """
    share = head_dim // 2 // axes
    return [head_dim // 2 - share * (axes - 1), *[share] * (axes - 1)]


def pair_speeds(bases: tuple[float, ...], head_dim: int) -> tuple[list[float], list[int]]:
    """Angle of each channel pair at position 1, and the axis that the pair turns with."""
    speeds: list[float] = []
    axes: list[int] = []
    for axis, (base, n) in enumerate(zip(bases, pairs_per_axis(head_dim, len(bases)), strict=True)):
        speeds += [float(base) ** (-i / n) for i in range(n)]
        axes += [axis] * n
    return speeds, axes


def _check(op: str, x: Tensor, positions: Tensor, bases: Sequence[float]) -> None:
    if x.ndim != 4 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"{op}: x {tuple(x.shape)} must be floating (B, T, H, D) with D even")
    if positions.shape != (len(bases), *x.shape[:2]):
        raise ValueError(
            f"{op}: positions {tuple(positions.shape)} must be "
            f"({len(bases)}, {x.shape[0]}, {x.shape[1]}), a row for each of the {len(bases)} bases"
        )
    if x.shape[-1] // 2 < len(bases):
        raise ValueError(f"{op}: {x.shape[-1]} channels are too few for {len(bases)} axes")


def _check_inplace(op: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            f"{op}: inplace=True would write over what the gradient needs: "
            "call it under torch.no_grad() or leave inplace out"
        )


class Rotation(NamedTuple):
    """y = x * cos + swapped(x) * sin, for halves (a, b) of the channels: swapped is (b, a)."""

    cos: Tensor
    """float32 (B, T, 1, D), (cos, cos)."""
    sin: Tensor
    """float32 (B, T, 1, D), (-sin, sin)."""


def rotation(positions: Tensor, head_dim: int, bases: tuple[float, ...]) -> Rotation:
    """The rotation of positions (A, B, T)."""
    speeds, axes = pair_speeds(bases, head_dim)
    position = positions.float()[torch.tensor(axes, device=positions.device)].movedim(0, -1)
    angle = (position * torch.tensor(speeds, device=positions.device))[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    return Rotation(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))


remembered_rotation = Remembered(rotation)


def swapped(x: Tensor) -> Tensor:
    """The halves of the channels in each other's place."""
    return x.roll(x.shape[-1] // 2, -1)


def _reference_pair(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, turn: Rotation, eps: float
) -> tuple[Tensor, Tensor]:
    """`_reference` of queries (B, T, H, D) and keys (B, T, G, D).

    Without gradients in one go, since calls are what a decoding step takes: one token of 4 and 4
    heads of 64 takes 25 us on one core of an AMD EPYC (Zen 5), 31 us one after the other; 1,024
    tokens take the same either way.
    """
    apart = torch.compiler.is_compiling() or torch.is_grad_enabled()
    if apart or q.dtype != k.dtype or q_weight.dtype != k_weight.dtype:
        return _reference(q, q_weight, turn, eps), _reference(k, k_weight, turn, eps)
    heads, groups = q.shape[2], k.shape[2]
    weight = torch.cat([q_weight.expand(heads, -1), k_weight.expand(groups, -1)])
    both = _reference(torch.cat([q, k], 2), weight, turn, eps)
    return both.narrow(2, 0, heads), both.narrow(2, heads, groups)


def _reference(x: Tensor, weight: Tensor | None, turn: Rotation, eps: float) -> Tensor:
    """Norm (with a weight (D,) or, without gradients, (H, D)) and rotation of x (B, T, H, D)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = None if weight is None else weight.to(wide.dtype)
    if not torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            return EagerRotary.apply(wide, weight, *turn, eps).to(x.dtype)
        if weight is not None:
            wide = (wide * inverse_rms(wide, eps)).mul_(weight)
        return (wide * turn.cos).addcmul_(swapped(wide), turn.sin).to(x.dtype)
    if weight is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
    return (wide * turn.cos + swapped(wide) * turn.sin).to(x.dtype)


class EagerRotary(torch.autograd.Function):
    """Norm and rotation where nothing fuses the formulas: few passes over memory each way.

    Measured on one core of an AMD EPYC (Zen 5), forward and backward of bfloat16 q (32, 128, 2, 64)
    and k (32, 128, 1, 64): 5.0 ms by autograd of the formulas, 3.5 ms so.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float
    ) -> Tensor:
        """X (B, T, H, D) and weight (D,) of one dtype, float32 at least; cos, sin: `Rotation`."""
        if weight is None:
            ctx.save_for_backward(cos, sin)
            return (x * cos).addcmul_(swapped(x), sin)
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(cos, sin, x, weight, scale)
        x = (x * scale).mul_(weight)
        return (x * cos).addcmul_(swapped(x), sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """A rotation's gradient is the rotation back; then the norm's."""
        cos, sin, *normed = ctx.saved_tensors
        back = (grad * cos).addcmul_(swapped(grad), sin, value=-1)
        gradients = norm_gradient(back, *normed) if normed else (back, None)
        return *gradients, None, None, None


@triton.jit
def angles_of(POSITIONS, SPEEDS, AXES, token, tokens, p, P: tl.constexpr):
    """cos and sin of the angles of the pairs p at one token."""
    axis = tl.load(AXES + p, mask=p < P, other=0)
    position = tl.load(POSITIONS + axis * tokens + token)
    angle = position * tl.load(SPEEDS + p, mask=p < P, other=0.0)
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def forward_kernel(
    X, WEIGHT, Y, POSITIONS, SPEEDS, AXES, eps, length, tokens, heads, sb, st, sh, tb, tt, th,
    P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
    NORMED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """All heads of one token, whose angles are made once. Y may be X: a pair is read, then
    written."""
    token = tl.program_id(0)
    p = tl.arange(0, BLOCK_P)
    cos, sin = angles_of(POSITIONS, SPEEDS, AXES, token, tokens, p, P)
    if INVERSE:
        sin = -sin
    X += (token // length).to(tl.int64) * sb + (token % length) * st
    Y += (token // length).to(tl.int64) * tb + (token % length) * tt
    for start in tl.range(0, heads, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)
        mask = (head < heads)[:, None] & (p < P)[None, :]
        x = X + head[:, None] * sh + p[None, :]
        a = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + P, mask=mask, other=0.0).to(tl.float32)
        if NORMED:
            r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * P) + eps)[:, None]
            a *= r * tl.load(WEIGHT + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
            b *= r * tl.load(WEIGHT + P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
        y = Y + head[:, None] * th + p[None, :]
        dtype = Y.dtype.element_ty
        tl.store(y, (a * cos[None, :] - b * sin[None, :]).to(dtype), mask=mask)
        tl.store(y + P, (b * cos[None, :] + a * sin[None, :]).to(dtype), mask=mask)


@triton.jit
def norm_backward_kernel(
    DY, X, WEIGHT, DX, DWEIGHT, POSITIONS, SPEEDS, AXES,
    eps, length, tokens, share, heads, sdb, sdt, sdh, sb, st, sh,
    P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """`share` tokens: the turn undone, then the norm's gradient as in rms_norm.py. DX is dense;
    DWEIGHT holds one row of float32 sums for each program."""
    p = tl.arange(0, BLOCK_P)
    weight_a = tl.load(WEIGHT + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
    weight_b = tl.load(WEIGHT + P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
    sum_a = tl.zeros([BLOCK_P], tl.float32)
    sum_b = tl.zeros([BLOCK_P], tl.float32)
    first = tl.program_id(0).to(tl.int64) * share
    for token in tl.range(first, tl.minimum(first + share, tokens)):
        cos, sin = angles_of(POSITIONS, SPEEDS, AXES, token, tokens, p, P)
        batch = token // length
        own = token % length
        for start in tl.range(0, heads, BLOCK_H):
            head = start + tl.arange(0, BLOCK_H)
            mask = (head < heads)[:, None] & (p < P)[None, :]
            dy = DY + batch * sdb + own * sdt + head[:, None] * sdh + p[None, :]
            da = tl.load(dy, mask=mask, other=0.0).to(tl.float32)
            db = tl.load(dy + P, mask=mask, other=0.0).to(tl.float32)
            x = X + batch * sb + own * st + head[:, None] * sh + p[None, :]
            a = tl.load(x, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(x + P, mask=mask, other=0.0).to(tl.float32)
            turned = da * cos[None, :] + db * sin[None, :]
            db = db * cos[None, :] - da * sin[None, :]
            da = turned
            r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * P) + eps)[:, None]
            a *= r
            b *= r
            sum_a += tl.sum(da * a, 0)
            sum_b += tl.sum(db * b, 0)
            da *= weight_a
            db *= weight_b
            mean = ((tl.sum(da * a, 1) + tl.sum(db * b, 1)) / (2 * P))[:, None]
            dx = DX + token * heads * (2 * P) + head[:, None] * (2 * P) + p[None, :]
            tl.store(dx, (r * (da - a * mean)).to(DX.dtype.element_ty), mask=mask)
            tl.store(dx + P, (r * (db - b * mean)).to(DX.dtype.element_ty), mask=mask)
    out = DWEIGHT + tl.program_id(0) * (2 * P) + p
    tl.store(out, sum_a, mask=p < P)
    tl.store(out + P, sum_b, mask=p < P)


@lru_cache
def _tables(bases: tuple[float, ...], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`pair_speeds` on the device: float32 and int32 (P,)."""
    speeds, axes = pair_speeds(bases, head_dim)
    return (
        torch.tensor(speeds, dtype=torch.float32, device=device),
        torch.tensor(axes, dtype=torch.int32, device=device),
    )


def _blocks(x: Tensor) -> dict[str, int]:
    """Pairs, their power of two, and heads at once: at most 4,096 pairs in registers."""
    pairs = x.shape[-1] // 2
    block = triton.next_power_of_2(pairs)
    heads = min(triton.next_power_of_2(x.shape[2]), max(1, 4096 // block))
    return {"P": pairs, "BLOCK_P": block, "BLOCK_H": heads}


def _launch_forward(
    x: Tensor,
    weight: Tensor | None,
    positions: Tensor,
    bases: list[float],
    eps: float,
    back: bool,
    inplace: bool = False,
) -> Tensor:
    (x,) = adjacent(x)
    y = x if inplace else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, length, heads, head_dim = x.shape
    forward_kernel[(batch * length,)](
        x, x if weight is None else weight.contiguous(), y, positions.float().contiguous(),
        *_tables(tuple(bases), head_dim, x.device), eps, length, batch * length, heads,
        *x.stride()[:3], *y.stride()[:3], **_blocks(x),
        NORMED=weight is not None, INVERSE=back, num_warps=4,
    )  # fmt: skip
    return y


@torch.library.custom_op("unimm::norm_rotary_", mutates_args=("x",))
def _inplace(
    x: Tensor, weight: Tensor | None, positions: Tensor, bases: list[float], eps: float
) -> None:
    """Norm (with a weight) and rotation written over x."""
    if x.stride(-1) == 1:
        _launch_forward(x, weight, positions, bases, eps, False, inplace=True)
    else:
        x.copy_(_launch_forward(x, weight, positions, bases, eps, False))


@_inplace.register_fake
def _(x: Tensor, weight: Tensor | None, positions: Tensor, bases: list[float], eps: float) -> None:
    return None


@torch.library.custom_op("unimm::rotary", mutates_args=())
def _rotary(x: Tensor, positions: Tensor, bases: list[float], inverse: bool) -> Tensor:
    return _launch_forward(x, None, positions, bases, 0.0, inverse)


@_rotary.register_fake
def _(x: Tensor, positions: Tensor, bases: list[float], inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _rotary_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, ctx.bases, ctx.inverse = inputs
    ctx.save_for_backward(positions)


def _rotary_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    """A rotation's gradient is the rotation back."""
    return _rotary(grad, *ctx.saved_tensors, ctx.bases, not ctx.inverse), None, None, None


_rotary.register_autograd(_rotary_backward, setup_context=_rotary_setup)


@torch.library.custom_op("unimm::norm_rotary", mutates_args=())
def _norm_rotary(
    x: Tensor, weight: Tensor, positions: Tensor, bases: list[float], eps: float
) -> Tensor:
    return _launch_forward(x, weight, positions, bases, eps, False)


@_norm_rotary.register_fake
def _(x: Tensor, weight: Tensor, positions: Tensor, bases: list[float], eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("unimm::norm_rotary_backward", mutates_args=())
def _norm_rotary_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, positions: Tensor, bases: list[float], eps: float
) -> tuple[Tensor, Tensor]:
    grad, x = adjacent(grad, x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, length, heads, head_dim = x.shape
    tokens = batch * length
    count = max(1, min(tokens, programs(x.device)))
    partial = torch.empty(count, head_dim, dtype=torch.float32, device=x.device)
    norm_backward_kernel[(count,)](
        grad, x, weight.contiguous(), dx, partial, positions.float().contiguous(),
        *_tables(tuple(bases), head_dim, x.device), eps, length, tokens,
        triton.cdiv(tokens, count), heads, *grad.stride()[:3], *x.stride()[:3], **_blocks(x),
        num_warps=4,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


@_norm_rotary_gradient.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, positions: Tensor, bases: list[float], eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, positions, ctx.bases, ctx.eps = inputs
    ctx.save_for_backward(x, weight, positions)


def _norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _norm_rotary_gradient(grad, *ctx.saved_tensors, ctx.bases, ctx.eps)
    return (*grads, None, None, None)


_norm_rotary.register_autograd(_norm_backward, setup_context=_norm_setup)
