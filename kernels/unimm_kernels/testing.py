"""What tests of the kernels need on a machine without a GPU; nothing here runs in normal use.

`repair_interpreter` mends faults of the interpreter of Triton 3.6 (TRITON_INTERPRET=1), which
computes kernels with numpy. `poisoned_memory` makes every fresh float tensor NaN, so that an
element that a kernel forgot to write, or read before it was written, shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter


def repair_interpreter() -> None:
    """Mend numpy >= 2.4 loop bounds and bfloat16 in the interpreter; call before the first kernel.

    Loop bounds: numpy 2.4 turns no one-element array into an int (triton#9171, mended after 3.6).
    bfloat16: held as uint16 bit patterns, on which tl.dot multiplies the bits as integers, and to
    which float32 is truncated instead of rounded to even (triton#11585). Only the operations that
    these kernels apply to bfloat16 are mended: loads, stores, tl.dot and casts.
    """
    patch_tensor = interpreter._patch_lang_tensor
    builder: Any = interpreter.InterpreterBuilder
    dot, cast, fp_to_fp = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return dot(self, _widened(a), _widened(b), d, precision, imprecise)

    def cast_impl(self: Any, src: Any, dst: Any) -> Any:
        if (src.dtype.scalar == tl.bfloat16) == (dst.scalar == tl.bfloat16):
            return cast(self, src, dst)
        if dst.scalar == tl.bfloat16:
            data = _bfloat16_bits(src.data.astype(np.float32))
            return interpreter.TensorHandle(data, tl.bfloat16)
        return cast(self, _widened(src), dst)

    def create_fp_to_fp(self: Any, src: Any, dst: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst.scalar):
            return cast_impl(self, src, dst)
        return fp_to_fp(self, src, dst, rounding)

    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.create_dot = create_dot
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp


def _widened(handle: Any) -> Any:
    """A bfloat16 handle as float32, others as they are."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    wide = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return interpreter.TensorHandle(wide.view(np.float32), tl.float32)


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bit patterns, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it, `torch.empty`, `torch.empty_like` and `Tensor.new_empty` hold NaN (floats)."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return filled

    with (
        patch.object(torch, "empty", poisoned(torch.empty)),
        patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        patch.object(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty)),
    ):
        yield


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest wanted magnitude, which counts as 0.1 at least.

    NaN or inf in `got` gives inf. A gradient that is zero by cancellation has rounding in it alone;
    the floor keeps that from being divided by nothing.
    """
    if got.shape != want.shape:
        raise ValueError(f"shapes differ: {tuple(got.shape)} and {tuple(want.shape)}")
    if want.numel() == 0:
        return 0.0
    if not bool(got.isfinite().all()):
        return float("inf")
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp_min(0.1))
