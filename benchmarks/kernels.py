"""Speed and memory of the kernels beside what a user would pick otherwise, in one run.

    python benchmarks/kernels.py [--only attention] [--out benchmarks/results]

On a CUDA device every op runs at the sizes of its goal; without one, the two ops whose CPU versions
have goals of their own. `share` is a part of the ceiling measured in the same run: a large matrix
product for the ops given in TFLOP/s, a large copy for those given in GB/s. Peak memory is what the
call took beyond its inputs. On a CPU a time is the processor time of all threads over their number,
which other programs on the machine do not lengthen. A rival that is not installed, or runs out of
memory, is said to be so.
"""

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from vector_quantize_pytorch.vector_quantize_pytorch import cdist

import unimm_kernels as ops

HALF = torch.bfloat16
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one size by one implementation; `make` gives the call with its inputs ready."""

    op: str
    size: str
    by: str
    make: Callable[[], Callable[[], object]]
    flops: float = 0.0
    bytes: float = 0.0
    needs: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured; `note` says why a time is missing."""

    op: str
    size: str
    by: str
    milliseconds: float | None
    rate: float | None
    unit: str
    share: float | None
    peak_mib: float | None
    note: str = ""


class Meter:
    """Times and peak memory on one device."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Median of as many runs as fit in the time, three at least, after a warm-up."""
        run()
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begin < self.seconds:
            times.append(self._once(run))
        return sorted(times)[len(times) // 2]

    def _once(self, run: Callable[[], object]) -> float:
        if self.device == "cpu":
            begin = time.process_time()
            run()
            return (time.process_time() - begin) * 1e3 / torch.get_num_threads()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_mib(self, run: Callable[[], object]) -> float:
        """Memory beyond what was held before the call."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / MIB
        # Linux: 5 resets the high-water mark of the process's memory.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return max(0.0, _status("VmHWM") - before)


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}: the CPU part needs Linux")


def backward_of(out: Tensor, leaves: tuple[Tensor, ...]) -> Callable[[], object]:
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def attention_cases() -> Iterator[Case]:
    for dim, heads in ((128, 16), (64, 32)):
        for length in (8192, 16384):
            batch = 32768 // length
            flops = 4 * batch * heads * length * length * dim / 2

            def inputs(
                shape: tuple[int, ...] = (batch, length, heads, dim),
            ) -> tuple[Tensor, Tensor, Tensor]:
                q, k, v = (
                    torch.randn(shape, device="cuda", dtype=HALF).requires_grad_() for _ in range(3)
                )
                return q, k, v

            def ours(inputs: Any = inputs) -> Callable[[], object]:
                leaves = inputs()
                return lambda: ops.attention(*leaves)

            def ours_back(inputs: Any = inputs) -> Callable[[], object]:
                leaves = inputs()
                return backward_of(ops.attention(*leaves), leaves)

            size = f"B{batch} T{length} H{heads} D{dim} causal"
            yield Case(op="attention", size=size, by="unimm", make=ours, flops=flops)
            yield Case(
                op="attention backward", size=size, by="unimm", make=ours_back, flops=2.5 * flops
            )
            for name, call in rivals_of_attention().items():

                def make(
                    inputs: Any = inputs, call: Any = call, back: bool = False
                ) -> Callable[[], object]:
                    leaves = inputs()
                    if back:
                        return backward_of(call(*leaves), leaves)
                    return lambda: call(*leaves)

                needs = name if name == "flash_attn" else None
                yield Case(op="attention", size=size, by=name, make=make, flops=flops, needs=needs)
                yield Case(
                    op="attention backward",
                    size=size,
                    by=name,
                    make=lambda make=make: make(back=True),
                    flops=2.5 * flops,
                    needs=needs,
                )


def rivals_of_attention() -> dict[str, Callable[..., Tensor]]:
    """Causal attention (B, T, H, D) by others."""

    def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return run

    compiled = torch.compile(flex_attention)

    @lru_cache
    def causal(n: int) -> BlockMask:
        return create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cuda")

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = causal(q.shape[1])
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = compiled(q, k, v, block_mask=mask)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

        return flash_attn_func(q, k, v, causal=True)

    return {
        "torch SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "torch SDPA cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "torch SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "FlexAttention compiled": flex,
        "flash_attn": flash,
    }


def packed_cases() -> Iterator[Case]:
    size = "B4 T8192 H16 D128, documents of 512"
    ids = torch.arange(8192, device="cuda").expand(4, -1) // 512

    def make(segment_ids: Tensor | None) -> Callable[[], object]:
        q, k, v = torch.randn(3, 4, 8192, 16, 128, device="cuda", dtype=HALF).unbind(0)
        return lambda: ops.attention(q, k, v, segment_ids=segment_ids)

    dense = 4 * 4 * 16 * 8192 * 8192 * 128 / 2
    yield Case(op="packed", size=size, by="unimm", make=lambda: make(ids), flops=dense / 16)
    yield Case(
        op="packed", size=size, by="unimm, one document", make=lambda: make(None), flops=dense
    )


def decode_cases() -> Iterator[Case]:
    for batch in (1, 16, 64):
        size = f"B{batch} S8192 H32 G8 D128"

        def inputs(batch: int = batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            q = torch.randn(batch, 1, 32, 128, device="cuda", dtype=HALF)
            k, v = torch.randn(2, batch, 8192, 8, 128, device="cuda", dtype=HALF).unbind(0)
            return q, k, v, torch.full((batch,), 8192, device="cuda")

        def ours(inputs: Any = inputs) -> Callable[[], object]:
            args = inputs()
            return lambda: ops.decode_attention(*args)

        def torchs(inputs: Any = inputs) -> Callable[[], object]:
            args = inputs()
            return lambda: ops.decode_attention(*args, implementation="torch")

        moved = 2 * batch * 8192 * 8 * 128 * 2
        yield Case(op="decode", size=size, by="unimm", make=ours, bytes=moved)
        yield Case(op="decode", size=size, by="torch SDPA, masked", make=torchs, bytes=moved)


def rotary_cases() -> Iterator[Case]:
    size = "B4 T4096 H32 G8 D128"
    moved = 2 * 4 * 4096 * (32 + 8) * 128 * 2

    def make(back: bool, implementation: str) -> Callable[[], object]:
        q = torch.randn(4, 4096, 32, 128, device="cuda", dtype=HALF).requires_grad_()
        k = torch.randn(4, 4096, 8, 128, device="cuda", dtype=HALF).requires_grad_()
        w = torch.ones(128, device="cuda").requires_grad_()
        at = torch.arange(4096, device="cuda").expand(3, 4, -1)

        def call() -> tuple[Tensor, Tensor]:
            return ops.qk_norm_rotary(
                q, k, w, w, at, bases=(1e4, 1e4, 1e4), implementation=implementation
            )

        run = torch.compile(call) if implementation == "torch" else call
        if not back:
            return run
        out = run()
        grads = tuple(torch.randn_like(t) for t in out)
        return lambda: torch.autograd.grad(out, (q, k, w), grads, retain_graph=True)

    for back, op in ((False, "qk norm + rotary"), (True, "qk norm + rotary backward")):
        for by, name in (("unimm", "triton"), ("torch.compile", "torch")):
            yield Case(
                op=op,
                size=size,
                by=by,
                make=lambda back=back, name=name: make(back, name),
                bytes=moved * (1.5 if back else 1),
            )


def loss_cases(device: str) -> Iterator[Case]:
    sizes = ((8192, 2048), (8192, 4096)) if device == "cuda" else ((2048, 256),)
    dtype = HALF if device == "cuda" else torch.float32
    for n, width in sizes:

        def inputs(n: int = n, width: int = width) -> tuple[Tensor, Tensor, Tensor]:
            hidden = torch.randn(n, width, device=device, dtype=dtype).requires_grad_()
            weight = (torch.randn(65536, width, device=device) / width**0.5).to(dtype)
            targets = torch.randint(0, 65536, (n,), device=device)
            return hidden, weight.requires_grad_(), targets

        def ours(inputs: Any = inputs) -> Callable[[], object]:
            h, w, t = inputs()
            return lambda: torch.autograd.grad(ops.linear_cross_entropy(h, w, t).loss, (h, w))

        def plain(inputs: Any = inputs) -> Callable[[], object]:
            h, w, t = inputs()
            return lambda: torch.autograd.grad(F.cross_entropy((h @ w.T).float(), t), (h, w))

        def liger(inputs: Any = inputs) -> Callable[[], object]:
            from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
                LigerFusedLinearCrossEntropyLoss,
            )

            h, w, t = inputs()
            loss = LigerFusedLinearCrossEntropyLoss()
            return lambda: torch.autograd.grad(loss(w, h, t), (h, w))

        def products(inputs: Any = inputs) -> Callable[[], object]:
            h, w, _ = (x.detach() for x in inputs())
            logits = h @ w.T
            return lambda: (torch.mm(h, w.T, out=logits), logits @ w, logits.T @ h)

        size, flops = f"N{n} H{width} V65536", 6.0 * n * width * 65536
        op = "linear cross-entropy"
        yield Case(op=op, size=size, by="unimm", make=ours, flops=flops)
        yield Case(op=op, size=size, by="torch, whole logits", make=plain, flops=flops)
        yield Case(op=op, size=size, by="its three products alone", make=products, flops=flops)
        if device == "cuda":
            needs = "liger_kernel"
            yield Case(op=op, size=size, by="Liger", make=liger, flops=flops, needs=needs)


def code_cases(device: str) -> Iterator[Case]:
    sizes = [(2**20, 16384, 8), (2**20, 16384, 256), (16384, 16384, 8)]
    if device == "cpu":
        sizes = [(2048, 16384, 8), (2048, 65536, 8), (2048, 16384, 256)]
    for n, k, d in sizes:
        dtype = HALF if device == "cuda" and d > 64 else torch.float32

        def inputs(n: int = n, k: int = k, d: int = d, dtype: Any = dtype) -> tuple[Tensor, Tensor]:
            x = torch.randn(n, d, device=device, dtype=dtype)
            return x, torch.randn(k, d, device=device, dtype=dtype)

        def ours(inputs: Any = inputs) -> Callable[[], object]:
            x, c = inputs()
            return lambda: ops.nearest_code(x, c)

        def library(inputs: Any = inputs) -> Callable[[], object]:
            """The search of its codebook's forward pass: distances, argmax, one-hot."""
            x, c = (t.float()[None] for t in inputs())

            def run() -> Tensor:
                index = (-cdist(x, c)).argmax(-1)
                return F.one_hot(index, c.shape[1]).type(x.dtype)

            return run

        def plain(inputs: Any = inputs) -> Callable[[], object]:
            x, c = (t.float() for t in inputs())
            return lambda: torch.cdist(x, c).argmin(1)

        size, flops = f"N{n} K{k} d{d}", 2.0 * n * k * d
        rivals = (("vector-quantize-pytorch", library), ("cdist().argmin()", plain))
        for by, make in (("unimm", ours), *rivals):
            yield Case(op="nearest code", size=size, by=by, make=make, flops=flops)


def cases(device: str) -> Iterator[Case]:
    if device == "cuda":
        yield from attention_cases()
        yield from packed_cases()
        yield from decode_cases()
        yield from rotary_cases()
    yield from loss_cases(device)
    yield from code_cases(device)


def ceilings(meter: Meter) -> tuple[float, float]:
    """TFLOP/s of a large product and GB/s of a large copy (read and written)."""
    n, dtype = (8192, HALF) if meter.device == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, n, n, device=meter.device).to(dtype)
    product = 2 * n**3 / meter.milliseconds(lambda: a @ b) / 1e9
    source = torch.zeros(2**28 if meter.device == "cuda" else 2**25, device=meter.device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / meter.milliseconds(lambda: target.copy_(source)) / 1e6
    return product, copy


def measure(case: Case, meter: Meter, product: float, copy: float) -> Row:
    unit = "TFLOP/s" if case.flops else "GB/s"
    empty: dict[str, Any] = dict.fromkeys(("milliseconds", "rate", "share", "peak_mib"))
    if case.needs is not None and find_spec(case.needs) is None:
        note = f"{case.needs} is not installed"
        return Row(op=case.op, size=case.size, by=case.by, unit=unit, note=note, **empty)
    try:
        run = case.make()
        milliseconds = meter.milliseconds(run)
        peak = meter.peak_mib(run)
    except torch.OutOfMemoryError:
        return Row(op=case.op, size=case.size, by=case.by, unit=unit, note="out of memory", **empty)
    rate = (case.flops / 1e9 if case.flops else case.bytes / 1e6) / milliseconds
    return Row(
        op=case.op,
        size=case.size,
        by=case.by,
        milliseconds=milliseconds,
        rate=rate,
        unit=unit,
        share=rate / (product if case.flops else copy),
        peak_mib=peak,
    )


def table(rows: list[Row]) -> str:
    lines = ["| op | size | by | ms | rate | share | peak MiB |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row.op, row.size, row.by]
        if row.milliseconds is None or row.rate is None or row.share is None:
            cells += [row.note, "", "", ""]
        else:
            cells += [f"{row.milliseconds:.3f}", f"{row.rate:.3g} {row.unit}", f"{row.share:.0%}"]
            cells.append(f"{row.peak_mib:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="ops whose name begins so")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    meter = Meter(device, arguments.seconds)
    product, copy = ceilings(meter)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu-{platform.machine()}"
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    head = (
        f"{name}{threads}, torch {torch.__version__}: product {product:.3g} TFLOP/s, "
        f"copy {copy:.3g} GB/s"
    )
    print(head, flush=True)
    rows: list[Row] = []
    for case in cases(device):
        if case.op.startswith(arguments.only):
            rows.append(measure(case, meter, product, copy))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    stem = f"{datetime.now(UTC):%Y-%m-%d}-{name.replace(' ', '-').lower()}-kernels"
    content = {"head": head, "rows": [asdict(row) for row in rows]}
    write(arguments.out / f"{stem}.json", json.dumps(content, indent=1) + "\n")
    write(arguments.out / f"{stem}.md", f"{head}\n\n{table(rows)}\n")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


if __name__ == "__main__":
    main()
