"""Which implementation an op runs, and the one place that knows whether Triton is installed.

Every public op takes `implementation=None | "triton" | "torch"`. `None` means "triton" for CUDA
tensors and "torch" for all others; a name that cannot run is an error, never replaced in silence.
Triton has wheels for Linux alone: elsewhere the names `triton` and `tl` below are stand-ins that
let the op files be imported, and asking for "triton" is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

Implementation = Literal["triton", "torch"]

HAS_TRITON = find_spec("triton") is not None


class _Absent:
    """Stands for a module that is not installed: has any attribute, its decorators do nothing."""

    def __getattr__(self, name: str) -> Any:
        return _Absent()

    def __call__(self, function: Any = None, *_: Any, **__: Any) -> Any:
        return function


if TYPE_CHECKING:
    # A kernel's decorators and builtins have no types that a checker could follow.
    triton: Any = None

    class tl(Any):
        """The language of kernels, where only the annotation has a meaning outside of them."""

        constexpr: TypeAlias = Any

elif HAS_TRITON:
    import triton
    import triton.language as tl
else:
    triton = tl = _Absent()

# Triton fixes this when a kernel is decorated, so it is read once, at the same time.
INTERPRETED: bool = HAS_TRITON and bool(triton.knobs.runtime.interpret)


def resolve(implementation: str | None, tensor: Tensor) -> Implementation:
    """The implementation to run on `tensor`'s device; ValueError if the one asked for cannot."""
    if implementation is None:
        return "triton" if tensor.is_cuda and HAS_TRITON else "torch"
    if implementation == "torch":
        return "torch"
    if implementation != "triton":
        raise ValueError(f'implementation is {implementation!r}: give None, "triton" or "torch"')
    if not HAS_TRITON:
        raise ValueError(
            'implementation "triton" needs the package triton, which is not installed: '
            'install it (Linux only) or give "torch"'
        )
    if not (tensor.is_cuda or INTERPRETED):
        raise ValueError(
            f'implementation "triton" needs CUDA tensors, these are on {tensor.device}: move them, '
            'give "torch", or set TRITON_INTERPRET=1 before the import to interpret the kernels'
        )
    if tensor.dtype == torch.float64:
        raise ValueError(
            'implementation "triton" computes in float32: cast the float64 tensors or give "torch"'
        )
    return "triton"


def as_op(implementation: Implementation) -> bool:
    """Whether to call an op without gradients as a custom op, one node under `torch.compile`.

    Eager torch code runs as it is: the first custom op of a process imports the compiler, seconds
    that the first encoding of a short program would pay for.
    """
    return implementation == "triton" or torch.compiler.is_compiling()


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on, as matrix products take them.

    Custom ops have no autocast rule of their own. Integer and float64 tensors stay as they are.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    low = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if t.dtype in low else t for t in tensors)


def same_dtype(op: str, **tensors: Tensor) -> None:
    """ValueError that names the tensors whose dtypes differ."""
    if len({t.dtype for t in tensors.values()}) > 1:
        listed = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise ValueError(f"{op}: tensors differ in dtype ({listed}): cast them to one")


def precision(dtype: torch.dtype) -> str:
    """Triton's input precision for products of `dtype`: float32 is not cut to TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def adjacent(*tensors: Tensor) -> list[Tensor]:
    """Copies where the last dimension has a stride: the kernels stride over the others alone."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


@lru_cache
def programs(device: torch.device) -> int:
    """How many programs share a reduction on `device`: four for each multiprocessor of a GPU.

    The number fixes the order of sums, so it depends on the device alone.
    """
    if device.type != "cuda":
        return 8
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


class Remembered:
    """A function of a CPU tensor that keeps its last result, for the layers of a model.

    They ask for the same of one tensor, one after the other. The result goes when the tensor does,
    and is made again where the tensor was written to through torch.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._last: tuple[weakref.ref[Tensor], tuple[Any, ...], Any] | None = None

    def __call__(self, tensor: Tensor, *rest: Hashable) -> Any:
        """`make(tensor, *rest)`."""
        # On a device the result could belong to a CUDA graph; a compiled graph keeps its own.
        if torch.compiler.is_compiling() or tensor.device.type != "cpu" or tensor.is_inference():
            return self._make(tensor, *rest)
        key = (tensor._version, *rest)
        last = self._last
        if last is not None and last[0]() is tensor and last[1] == key:
            return last[2]
        result = self._make(tensor, *rest)
        self._last = (weakref.ref(tensor, self._forget), key, result)
        return result

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last[0] is gone:
            self._last = None


def rows(x: Tensor) -> Tensor:
    """`x` (..., D) as (N, D) with adjacent channels: a view where its strides allow one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
