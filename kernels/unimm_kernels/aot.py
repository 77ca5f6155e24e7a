"""Compile the kernels for a GPU that this machine does not have, and say what each would use.

    python -m unimm_kernels.aot 90            # sm_90: every op in the configurations that ship
    python -m unimm_kernels.aot 80 rotary    # those whose name begins so

Each op is called as a user calls it, on CPU tensors; what it would launch is caught, with the very
arguments, and compiled by Triton's own compiler and ptxas (both in the wheel). So what is checked
is what runs. A report a line, JSON: registers, spills, shared memory, tensor-core instructions, and
`problems`: what would fail or is known to go wrong on the chip. Needs TRITON_INTERPRET unset.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

import unimm_kernels as ops

# Bytes of shared memory that one block can have (CUDA programming guide, table of capabilities).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
# Bytes of spills that are let through. Measured at most 204 on Hopper; a tile that does not fit
# shows thousands. float32 attention, which no matrix unit computes in full, is not meant for speed.
# The tiles were chosen on sm_80 and sm_90: on sm_100 the keys' gradient spills up to 768 bytes.
SPILL_LIMIT = {80: 256, 90: 256, 100: 1024}
FLOAT32_ATTENTION_SPILL_LIMIT = 8192
# Kernels that use mma.sync on sm_90 too: wgmma needs 64 rows, which these do not have to offer,
# or which would spill (measured: 456 to 680 bytes for the keys' gradient at 256 channels).
WITHOUT_WGMMA = {
    ("decode", "split_kernel"),
    ("codes", "residual_kernel"),
    ("attention-256", "key_gradient_kernel"),
}


# Configurations of attention_tma.py, which run on sm_90 alone.
HOPPER_ALONE = ("specialized", "descriptors")
SPECIALIZED_MODES: dict[str, dict[str, Any]] = {
    "causal": {"implementation": "triton-ws"},
    "full": {"implementation": "triton-ws", "causal": False},
    "window": {"implementation": "triton-ws", "window": 100},
    "packed": {"implementation": "triton-ws", "packed": True},
    "packed-window": {"implementation": "triton-ws", "packed": True, "window": 100},
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one compiled kernel uses."""

    op: str
    kernel: str
    arch: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    specialized: bool
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Launch:
    """A caught launch: the kernel and its arguments in order, options apart."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


def launches(op: Callable[[], object]) -> list[Launch]:
    """What `op` launches on CPU tensors; nothing is run, and its result means nothing."""
    caught: list[Launch] = []

    def catch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        arguments |= {k: v for k, v in kwargs.items() if k in self.arg_names}
        caught.append(Launch(self, arguments, options))

    with (
        patch("unimm_kernels.backend.INTERPRETED", True),
        patch.object(JITFunction, "run", catch),
        # What is never written is used as an index by the op that follows.
        patch.object(torch, "empty", torch.zeros),
    ):
        op()
    return caught


def compiled(name: str, launch: Launch, arch: int) -> Report:
    """The launch's kernel compiled for sm_`arch`, specialised as Triton would at the launch."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...] | str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    ptx = str(kernel.asm["ptx"])
    registers, spills = _resources(kernel.asm["cubin"])
    wgmma, mma = len(re.findall(r"wgmma\.mma_async", ptx)), len(re.findall(r"\bmma\.sync", ptx))
    shared = int(kernel.metadata.shared)
    problems = [
        f"trans of a product stored to shared memory: {hit}"
        for hit in _transposed_products(str(kernel.asm["ttgir"]))
    ]
    if shared > SHARED_LIMIT[arch]:
        problems.append(f"{shared} bytes of shared memory, {SHARED_LIMIT[arch]} exist")
    limit = SPILL_LIMIT[arch]
    if name.startswith("attention") and name.endswith("fp32"):
        limit = FLOAT32_ATTENTION_SPILL_LIMIT
    if spills > limit:
        problems.append(f"{spills} bytes of spills")
    function = launch.kernel.fn.__name__
    meant = all(not (name.startswith(op) and function == k) for op, k in WITHOUT_WGMMA)
    if arch == 90 and mma and not wgmma and meant:
        problems.append("mma.sync where wgmma exists")
    # Only a warp-specialised kernel divides the registers anew between its warp groups.
    specialized = "setmaxnreg" in ptx
    if launch.arguments.get("SPECIALIZED") and not specialized:
        problems.append("not warp-specialised")
    return Report(
        op=name,
        kernel=function,
        arch=arch,
        warps=int(kernel.metadata.num_warps),
        registers=registers,
        spill_bytes=spills,
        shared_bytes=shared,
        wgmma=wgmma,
        mma=mma,
        specialized=specialized,
        problems=tuple(problems),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread.

    The stack holds spills, and 32 bytes where tl.sin and tl.cos reduce large angles.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        command = [str(tool), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


def _transposed_products(ttgir: str) -> list[str]:
    """Products (#mma) transposed and put into shared memory: wrong on sm_90 in Triton 3.4 to 3.6.

    Source: fla-org/flash-linear-attention#640 and its pull request 826.
    """
    found = re.finditer(r"(%[\w#]+) = tt\.trans [^\n]*?#mma\d*> -> tensor<[^>]*#linear\d*>", ttgir)
    return [
        hit[0][:100]
        for hit in found
        if re.search(rf"ttg\.local_alloc {re.escape(hit[1])}\b", ttgir)
    ]


def _attention(
    head_dim: int,
    dtype: torch.dtype,
    packed: bool = False,
    implementation: str = "triton",
    **options: Any,
) -> Callable[[], object]:
    def run() -> None:
        q = torch.zeros(1, 256, 8, head_dim, dtype=dtype, requires_grad=True)
        k = torch.zeros(1, 256, 2, head_dim, dtype=dtype, requires_grad=True)
        ids = torch.zeros(1, 256, dtype=torch.int64) if packed else None
        out = ops.attention(q, k, k, segment_ids=ids, implementation=implementation, **options)
        if implementation == "triton":  # The other variants are forward passes alone.
            out.sum().backward()

    return run


def _decode(head_dim: int, dtype: torch.dtype) -> Callable[[], object]:
    def run() -> None:
        q = torch.zeros(4, 1, 8, head_dim, dtype=dtype)
        cache = torch.zeros(4, 8192, 2, head_dim, dtype=dtype)
        ops.decode_attention(q, cache, cache, torch.ones(4).long(), implementation="triton")

    return run


def _rotary() -> None:
    q = torch.zeros(1, 64, 16, 128, dtype=torch.bfloat16, requires_grad=True)
    k = torch.zeros(1, 64, 4, 80, dtype=torch.bfloat16, requires_grad=True)
    at = torch.zeros(3, 1, 64)
    for x in (q, k):
        weight = torch.ones(x.shape[-1], requires_grad=True)
        a, b = ops.qk_norm_rotary(
            x, x, weight, weight, at, bases=(1e4, 1e4, 1e4), implementation="triton"
        )
        (a.sum() + b.sum()).backward()
        ops.rotary(x, at, bases=(1e4, 1e4, 1e4), implementation="triton").sum().backward()


def _rows() -> None:
    for width in (768, 4096, 16384):
        x = torch.zeros(16, width, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.ones(width, requires_grad=True)
        y, total = ops.rms_norm(x, weight, residual=x, implementation="triton")
        (y + total + ops.rms_norm(x, weight, implementation="triton")).sum().backward()
    ops.swiglu(x, x, implementation="triton").sum().backward()


def _loss(dtype: torch.dtype) -> Callable[[], object]:
    def run() -> None:
        hidden = torch.zeros(64, 128, dtype=dtype, requires_grad=True)
        weight = torch.zeros(8192, 128, dtype=dtype)
        targets = torch.zeros(64, dtype=torch.int64)
        ops.linear_cross_entropy(hidden, weight, targets, implementation="triton")
        with torch.no_grad():
            ops.linear_cross_entropy(hidden, weight, targets, implementation="triton")

    return run


def _codes(d: int, dtype: torch.dtype) -> Callable[[], object]:
    def run() -> None:
        x, codebook = torch.zeros(256, d, dtype=dtype), torch.zeros(1024, d, dtype=dtype)
        ops.nearest_code(x, codebook, implementation="triton")
        ops.code_sums(x, torch.zeros(256, dtype=torch.int64), 1024, implementation="triton")
        ops.residual_nearest_code(x, codebook[None], implementation="triton")

    return run


def configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every op by name, in the shapes and types that change what is compiled."""
    half, full = torch.bfloat16, torch.float32
    for d in (64, 80, 96, 128, 256):
        yield f"attention-{d}-bf16", _attention(d, half)
    yield "attention-128-fp16", _attention(128, torch.float16)
    yield "attention-128-bf16-full", _attention(128, half, causal=False)
    yield "attention-128-bf16-window", _attention(128, half, window=512)
    yield "attention-128-bf16-packed", _attention(128, half, packed=True)
    yield "attention-64-fp32", _attention(64, full)
    yield "attention-128-fp32", _attention(128, full)
    for d in (64, 80, 128, 256):
        for name, options in SPECIALIZED_MODES.items():
            yield f"specialized-{d}-{name}", _attention(d, half, **options)
    yield "descriptors-128", _attention(128, half, implementation="triton-tma")
    for d in (64, 128, 256):
        yield f"decode-{d}-bf16", _decode(d, half)
    yield "rotary", _rotary
    yield "rows", _rows
    yield "loss-bf16", _loss(half)
    yield "loss-fp32", _loss(full)
    for d in (8, 64, 128, 256):
        yield f"codes-{d}-bf16", _codes(d, half)
        yield f"codes-{d}-fp32", _codes(d, full)


def reports(arch: int, *wanted: str) -> Iterator[Report]:
    """A report for each kernel of each configuration, or of those whose name begins as wanted."""
    for name, op in configurations():
        if arch != 90 and name.startswith(HOPPER_ALONE):
            continue
        if not wanted or name.startswith(wanted):
            for launch in launches(op):
                yield compiled(name, launch, arch)


if __name__ == "__main__":
    for report in reports(int(sys.argv[1]), *sys.argv[2:]):
        print(json.dumps(asdict(report)), flush=True)
