"""What `kernels.py` measures: every op at the sizes of its goals, by unimm and by its rivals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import unimm_kernels as ops
from unimm_kernels import attention_tma
from unimm_kernels.rotary import rotation

HALF = torch.bfloat16


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
            for name in attention_tma.VARIANTS:

                def variant(inputs: Any = inputs, name: str = name) -> Callable[[], object]:
                    leaves = inputs()
                    return lambda: ops.attention(*leaves, implementation=name)

                yield Case(op="attention", size=size, by=name, make=variant, flops=flops)
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
    dense = 4 * 4 * 16 * 8192 * 8192 * 128 / 2

    def make(segment_ids: Tensor | None, back: bool) -> Callable[[], object]:
        leaves = tuple(
            torch.randn(4, 8192, 16, 128, device="cuda", dtype=HALF).requires_grad_()
            for _ in range(3)
        )
        if back:
            return backward_of(ops.attention(*leaves, segment_ids=segment_ids), leaves)
        return lambda: ops.attention(*leaves, segment_ids=segment_ids)

    def flex(back: bool) -> Callable[[], object]:
        leaves = tuple(
            torch.randn(4, 16, 8192, 128, device="cuda", dtype=HALF).requires_grad_()
            for _ in range(3)
        )
        row = ids[0]

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (row[i] == row[j])

        mask = create_block_mask(seen, None, None, 8192, 8192, device="cuda")
        compiled = torch.compile(flex_attention)

        def run() -> Tensor:
            q, k, v = leaves
            out = compiled(q, k, v, block_mask=mask)
            assert isinstance(out, Tensor)
            return out

        return backward_of(run(), leaves) if back else run

    for back, op in ((False, "packed"), (True, "packed backward")):
        factor = 2.5 if back else 1.0
        for by, call, part in (
            ("unimm", lambda back=back: make(ids, back), 16),
            ("FlexAttention compiled", lambda back=back: flex(back), 16),
            ("unimm, one document", lambda back=back: make(None, back), 1),
        ):
            yield Case(op=op, size=size, by=by, make=call, flops=factor * dense / part)


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

        def unmasked(inputs: Any = inputs) -> Callable[[], object]:
            q, k, v = (t.transpose(1, 2) for t in inputs()[:3])
            return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        def flash(inputs: Any = inputs) -> Callable[[], object]:
            from flash_attn import (  # pyright: ignore[reportMissingImports]
                flash_attn_with_kvcache,
            )

            q, k, v, lengths = inputs()
            return lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths.int())

        moved = 2 * batch * 8192 * 8 * 128 * 2
        yield Case(op="decode", size=size, by="unimm", make=ours, bytes=moved)
        yield Case(op="decode", size=size, by="plain torch", make=torchs, bytes=moved)
        by = "torch SDPA, whole cache"
        yield Case(op="decode", size=size, by=by, make=unmasked, bytes=moved)
        by = "flash_attn"
        yield Case(op="decode", size=size, by=by, make=flash, bytes=moved, needs=by)


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


def row_cases() -> Iterator[Case]:
    """Norm and gated product at the widths of a model of 2,048 channels."""

    def norm(by: str, back: bool) -> Callable[[], object]:
        x = torch.randn(16384, 2048, device="cuda", dtype=HALF).requires_grad_()
        w = torch.ones(2048, device="cuda", dtype=HALF).requires_grad_()
        if by == "Liger":
            from liger_kernel.ops.rms_norm import (  # pyright: ignore[reportMissingImports]
                LigerRMSNormFunction,
            )

            def call() -> Any:
                return LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)
        elif by == "torch.compile":
            call = torch.compile(lambda: ops.rms_norm(x, w, implementation="torch"))
        else:

            def call() -> Any:
                return ops.rms_norm(x, w)

        return backward_of(call(), (x, w)) if back else call

    def gated(by: str, back: bool) -> Callable[[], object]:
        a, b = (
            torch.randn(16384, 5504, device="cuda", dtype=HALF).requires_grad_() for _ in range(2)
        )
        if by == "Liger":
            from liger_kernel.ops.swiglu import (  # pyright: ignore[reportMissingImports]
                LigerSiLUMulFunction,
            )

            def call() -> Any:
                return LigerSiLUMulFunction.apply(a, b)
        elif by == "torch.compile":
            call = torch.compile(lambda: ops.swiglu(a, b, implementation="torch"))
        else:

            def call() -> Any:
                return ops.swiglu(a, b)

        return backward_of(call(), (a, b)) if back else call

    # Tensors of the size that a pass reads and writes, forward and backward.
    for op, size, make, tensors, width in (
        ("rms norm", "N16384 D2048", norm, (2, 3), 2048),
        ("swiglu", "N16384 D5504", gated, (3, 5), 5504),
    ):
        for back in (False, True):
            moved = tensors[back] * 16384 * width * 2
            for by in ("unimm", "torch.compile", "Liger"):
                yield Case(
                    op=f"{op} backward" if back else op,
                    size=size,
                    by=by,
                    make=lambda make=make, by=by, back=back: make(by, back),
                    bytes=moved,
                    needs="liger_kernel" if by == "Liger" else None,
                )


def cpu_cases() -> Iterator[Case]:
    """A layer's ops in the shape of the smallest recipe, forward and backward, bfloat16."""
    rows, length, heads, dim = 32, 128, 2, 64
    ids = (torch.arange(length) // 40).expand(rows, length).contiguous()
    at = torch.arange(length).expand(3, rows, length).contiguous()
    size = f"B{rows} T{length} H{heads} G1 D{dim}, documents of 40"

    def attention(by: str) -> Callable[[], object]:
        q = torch.randn(rows, length, heads, dim, dtype=HALF).requires_grad_()
        k, v = (torch.randn(rows, length, 1, dim, dtype=HALF).requires_grad_() for _ in range(2))
        grad = torch.randn_like(q)
        seen = (ids[:, :, None] == ids[:, None, :]).tril()[:, None]

        def run() -> object:
            if by == "unimm":
                out = ops.attention(q, k, v, segment_ids=ids)
            else:
                out = F.scaled_dot_product_attention(
                    *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=seen, enable_gqa=True
                ).transpose(1, 2)
            return torch.autograd.grad(out, (q, k, v), grad)

        return run

    def turned(by: str) -> Callable[[], object]:
        q = torch.randn(rows, length, heads, dim, dtype=HALF).requires_grad_()
        k = torch.randn(rows, length, 1, dim, dtype=HALF).requires_grad_()
        w = torch.ones(dim).requires_grad_()
        grads = torch.randn_like(q), torch.randn_like(k)
        turn = rotation(at, dim, (1e4, 1e4, 1e4))

        def formula(x: Tensor) -> Tensor:
            h = F.rms_norm(x.float(), (dim,), w, 1e-6)
            return (h * turn.cos + h.roll(dim // 2, -1) * turn.sin).to(x.dtype)

        def run() -> object:
            if by == "unimm":
                out = ops.qk_norm_rotary(q, k, w, w, at, bases=(1e4, 1e4, 1e4))
            else:
                out = formula(q), formula(k)
            return torch.autograd.grad(out, (q, k, w), grads)

        return run

    def norm(by: str) -> Callable[[], object]:
        x, w = torch.randn(4096, 128).requires_grad_(), torch.ones(128).requires_grad_()
        grad = torch.randn_like(x)

        def run() -> object:
            out = ops.rms_norm(x, w) if by == "unimm" else F.rms_norm(x, (128,), w, 1e-6)
            return torch.autograd.grad(out, (x, w), grad)

        return run

    # Bytes of a pass over inputs, output and their gradients.
    half = rows * length * (heads + 1) * dim * 2
    flops = 3.5 * 4 * rows * heads * length * length * dim / 2
    for name in ("unimm", "torch SDPA, masked"):
        make = lambda name=name: attention(name)  # noqa: E731
        yield Case(op="attention, packed", size=size, by=name, make=make, flops=flops)
    for name in ("unimm", "autograd of the formula"):
        make = lambda name=name: turned(name)  # noqa: E731
        yield Case(op="qk norm + rotary", size=size, by=name, make=make, bytes=5 * half)
    for name in ("unimm", "F.rms_norm"):
        make = lambda name=name: norm(name)  # noqa: E731
        yield Case(op="rms norm", size="N4096 D128", by=name, make=make, bytes=5 * 4096 * 128 * 4)


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
            from vector_quantize_pytorch.vector_quantize_pytorch import cdist

            x, c = (t.float()[None] for t in inputs())

            def run() -> Tensor:
                index = (-cdist(x, c)).argmax(-1)
                return F.one_hot(index, c.shape[1]).type(x.dtype)

            return run

        def plain(inputs: Any = inputs) -> Callable[[], object]:
            x, c = (t.float() for t in inputs())
            return lambda: torch.cdist(x, c).argmin(1)

        size, flops = f"N{n} K{k} d{d}", 2.0 * n * k * d
        op, needs = "nearest code", "vector_quantize_pytorch"
        yield Case(op=op, size=size, by="unimm", make=ours, flops=flops)
        by = "vector-quantize-pytorch"
        yield Case(op=op, size=size, by=by, make=library, flops=flops, needs=needs)
        yield Case(op=op, size=size, by="cdist().argmin()", make=plain, flops=flops)
        if device == "cuda":

            def compiled(inputs: Any = inputs) -> Callable[[], object]:
                x, c = (t.float() for t in inputs())
                search = torch.compile(lambda: torch.cdist(x, c).argmin(1))
                return search

            by = "cdist().argmin(), compiled"
            yield Case(op=op, size=size, by=by, make=compiled, flops=flops)


def residual_cases() -> Iterator[Case]:
    n, levels, k, d = 2**20, 8, 1024, 128

    def inputs() -> tuple[Tensor, Tensor]:
        return torch.randn(n, d, device="cuda"), torch.randn(levels, k, d, device="cuda")

    def ours() -> Callable[[], object]:
        x, books = inputs()
        return lambda: ops.residual_nearest_code(x, books)

    def by_level() -> Callable[[], object]:
        x, books = inputs()

        def run() -> Tensor:
            rest = x
            for book in books:
                rest = rest - book[torch.cdist(rest, book).argmin(1)]
            return rest

        return run

    size, flops = f"N{n} L{levels} K{k} d{d}", 2.0 * n * levels * k * d
    for by, make in (("unimm", ours), ("cdist().argmin() by level", by_level)):
        yield Case(op="residual nearest code", size=size, by=by, make=make, flops=flops)


def cases(device: str) -> Iterator[Case]:
    if device == "cuda":
        yield from attention_cases()
        yield from packed_cases()
        yield from decode_cases()
        yield from rotary_cases()
        yield from row_cases()
        yield from residual_cases()
    else:
        yield from cpu_cases()
    yield from loss_cases(device)
    yield from code_cases(device)
