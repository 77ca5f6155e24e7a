"""On a device: real sizes, every layout that ships, and equal bits in every run.

The interpreter runs one program after another, so a race shows here alone. One command runs these
first and then, on the device, what the other files test in the interpreter elsewhere:

    python -m pytest tests/kernels -m "not slow"
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unimm_kernels as ops
from unimm_kernels.testing import relative_error

pytestmark = pytest.mark.gpu
REPEATS = 100
HALF = torch.bfloat16


def draw(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="warp specialisation is written for sm_90",
)


@hopper
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("mode", ["causal", "full", "window", "packed"])
def test_warp_specialisation_changes_nothing(dim: int, mode: str) -> None:
    """Off and on against float64, and on for `REPEATS` times: its groups share a ring of tiles."""
    torch.manual_seed(0)
    q, k, v = (draw(2, 2049, heads, dim) for heads in (4, 2, 2))
    options: dict[str, Any] = {"causal": mode != "full"}
    if mode == "window":
        options["window"] = 300
    if mode == "packed":
        options["segment_ids"] = (torch.arange(2049, device="cuda") // 300).expand(2, 2049)
    with torch.no_grad():
        wide = [t.double() for t in (q, k, v)]
        want = ops.attention(wide[0], wide[1], wide[2], implementation="torch", **options)
        for name in ("triton-tma", "triton-ws"):
            got = ops.attention(q, k, v, implementation=name, **options)
            assert relative_error(got, want) < 1e-2, name
            for _ in range(REPEATS - 1):
                again = ops.attention(q, k, v, implementation=name, **options)
                assert torch.equal(again, got), name


@hopper
def test_gradients_behind_the_specialised_kernel() -> None:
    """The backward kernels read the normaliser that it leaves."""
    torch.manual_seed(0)
    leaves = [draw(2, 1025, heads, 128) for heads in (4, 2, 2)]
    grad = torch.randn(2, 1025, 4, 128, device="cuda", dtype=HALF)
    both = [
        torch.autograd.grad(ops.attention(*leaves, implementation=name), leaves, grad)
        for name in ("triton-ws", "triton-tma")
    ]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = torch.autograd.grad(ops.attention(*wide, implementation="torch"), wide, grad.double())
    for a, b, c in zip(*both, want, strict=True):
        assert relative_error(a, c) < 2e-2
        assert relative_error(b, c) < 2e-2


def run_attention() -> tuple[Tensor, ...]:
    q, k, v = draw(2, 1000, 8, 128), draw(2, 1000, 2, 128), draw(2, 1000, 2, 128)
    ids = (torch.arange(1000, device="cuda") // 300).expand(2, 1000)
    out = ops.attention(q, k, v, segment_ids=ids, window=200)
    return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def run_wide_attention() -> tuple[Tensor, ...]:
    """Every tile of the largest head dimension, which the kernels of gradients hardly hold."""
    q, k, v = draw(1, 700, 4, 256), draw(1, 700, 2, 256), draw(1, 700, 2, 256)
    out = ops.attention(q, k, v)
    return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def run_decode() -> tuple[Tensor, ...]:
    q, k, v = draw(4, 1, 16, 128), draw(4, 4096, 4, 128), draw(4, 4096, 4, 128)
    lengths = torch.tensor([1, 100, 4000, 4096], device="cuda")
    return (ops.decode_attention(q, k, v, lengths),)


def run_rotary() -> tuple[Tensor, ...]:
    q, k = draw(2, 1000, 16, 128), draw(2, 1000, 4, 128)
    weights = draw(128, dtype=torch.float32), draw(128, dtype=torch.float32)
    at = torch.arange(1000, device="cuda").expand(3, 2, 1000)
    a, b = ops.qk_norm_rotary(q, k, *weights, at, bases=(1e4, 1e3, 1e3))
    grads = torch.autograd.grad((a, b), (q, k, *weights), (torch.ones_like(a), torch.ones_like(b)))
    return a, b, *grads


def run_norm() -> tuple[Tensor, ...]:
    x, residual, weight = draw(4000, 2048), draw(4000, 2048), draw(2048, dtype=torch.float32)
    y, total = ops.rms_norm(x, weight, residual=residual)
    grads = torch.autograd.grad((y, total), (x, residual, weight), (total, y))
    return y, total, *grads


def run_swiglu() -> tuple[Tensor, ...]:
    gate, up = draw(4000, 5000), draw(4000, 5000)
    y = ops.swiglu(gate, up)
    return y, *torch.autograd.grad(y, (gate, up), torch.ones_like(y))


def run_loss() -> tuple[Tensor, ...]:
    hidden, weight = draw(3000, 512), draw(65536, 512)
    targets = torch.randint(0, 65536, (3000,), device="cuda")
    out = ops.linear_cross_entropy(hidden, weight, targets, z_loss=1e-4)
    return *out, *torch.autograd.grad(out.loss, (hidden, weight))


def run_loss_by_range() -> tuple[Tensor, ...]:
    hidden, weight = draw(3000, 512), draw(20000, 512)
    first = torch.randint(0, 3, (3000,), device="cuda") * 5000
    targets = first + torch.randint(0, 5000, (3000,), device="cuda")
    ranges = torch.stack([first, first + 5000], 1)
    out = ops.linear_cross_entropy(hidden, weight, targets, ranges=ranges)
    return *out, *torch.autograd.grad(out.loss, (hidden, weight))


def run_codes() -> tuple[Tensor, ...]:
    x, codebooks = draw(20000, 64, dtype=torch.float32), draw(4, 1024, 64, dtype=torch.float32)
    index = ops.nearest_code(x, codebooks[0])
    every = ops.residual_nearest_code(x, codebooks)
    return index, every, *ops.code_sums(x, index, 1024)


RUNS = [
    run_attention,
    run_wide_attention,
    run_decode,
    run_rotary,
    run_norm,
    run_swiglu,
    run_loss,
    run_loss_by_range,
    run_codes,
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__.removeprefix("run_"))
def test_equal_bits_in_every_run(run: Callable[[], tuple[Tensor, ...]]) -> None:
    results = []
    for _ in range(REPEATS):
        torch.manual_seed(0)
        results.append([t.detach() for t in run()])
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_real_lengths(dim: int, dtype: torch.dtype, causal: bool) -> None:
    torch.manual_seed(0)
    leaves = [draw(2, 2049, heads, dim, dtype=dtype) for heads in (4, 2, 2)]
    grad = torch.randn(2, 2049, 4, dim, device="cuda", dtype=dtype)
    got = ops.attention(leaves[0], leaves[1], leaves[2], causal=causal)
    grads = torch.autograd.grad(got, leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = ops.attention(wide[0], wide[1], wide[2], causal=causal, implementation="torch")
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, HALF: 2e-2}[dtype]
    want_grads = torch.autograd.grad(want, wide, grad.double())
    for a, b in zip((got, *grads), (want, *want_grads), strict=True):
        assert relative_error(a, b) < tolerance


@pytest.mark.parametrize("d", [4, 8, 64, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_nearest_code_of_a_large_codebook(d: int, dtype: torch.dtype, metric: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3000, d, device="cuda").to(dtype)
    codebook = torch.randn(16384, d, device="cuda").to(dtype)
    index = ops.nearest_code(x, codebook, metric=metric)
    a, b = x.double(), codebook.double()
    if metric == "cosine":
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    far = torch.cdist(a, b).square()
    excess = far.gather(1, index[:, None]).squeeze(1) - far.amin(1)
    assert float(excess.max()) <= 4e-6 * float(b.square().sum(1).max())
