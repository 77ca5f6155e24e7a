"""The loss and its gradients against float64 logits held whole."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from unimm_kernels import LinearCrossEntropy, linear_cross_entropy
from unimm_kernels.testing import poisoned_memory, relative_error

# Of the losses, and of the gradients relative to their largest element. Half precision rounds the
# logits (up to 16 here, half a unit of 2^-7 in bfloat16) before the softmax.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
IMPLEMENTATIONS = ["torch", "triton"]


@pytest.fixture(params=[None, 4000], ids=["one-chunk", "chunks"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 4,000 bytes of logits each chunk holds a few rows, the last one fewer."""
    if request.param is not None:
        module = importlib.import_module("unimm_kernels.linear_cross_entropy")
        monkeypatch.setattr(module, "LOGIT_BYTES", {"cpu": request.param, "cuda": request.param})


def problem(
    n: int, width: int, vocabulary: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(n, 2 * width, device=device).to(dtype)[:, ::2]
    weight = torch.randn(width, vocabulary, device=device).to(dtype).T
    targets = torch.randint(0, vocabulary, (n,), device=device)
    return hidden.detach().requires_grad_(), weight.detach().requires_grad_(), targets


def expected(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weight: Tensor | None = None,
    ranges: Tensor | None = None,
    z_loss: float = 0.0,
) -> LinearCrossEntropy:
    logits = hidden @ weight.T
    if ranges is not None:
        ids = torch.arange(weight.shape[0], device=logits.device)
        outside = (ids < ranges[:, :1]) | (ids >= ranges[:, 1:])
        logits = logits.masked_fill(outside, float("-inf"))
    lse = logits.logsumexp(1)
    kept = targets != -100
    own = logits.gather(1, targets.where(kept, 0)[:, None]).squeeze(1)
    nll = (lse - own).where(kept, torch.zeros_like(own))
    w = kept.double() if loss_weight is None else loss_weight.double() * kept
    loss = (w * (nll + z_loss * lse.square())).sum() / w.sum()
    return LinearCrossEntropy(loss, nll, lse)


def check(
    dtype: torch.dtype,
    implementation: str,
    device: str,
    size: tuple[int, int, int] = (63, 33, 257),
    ranges: Tensor | None = None,
    targets: Tensor | None = None,
    **options: Any,
) -> None:
    hidden, weight, drawn = problem(*size, dtype, device)
    targets = drawn if targets is None else targets
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = expected(wide[0], wide[1], targets, ranges=ranges, **options)
    want_grads = torch.autograd.grad(want.loss * 3, wide)
    with poisoned_memory():
        got = linear_cross_entropy(
            hidden, weight, targets, ranges=ranges, implementation=implementation, **options
        )
        grads = torch.autograd.grad(got.loss * 3, (hidden, weight))
    assert {t.dtype for t in got} == {torch.float32}
    assert not got.nll.requires_grad
    assert not got.lse.requires_grad
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < TOLERANCE[dtype]
    for a, b, leaf in zip(grads, want_grads, (hidden, weight), strict=True):
        assert a.dtype == leaf.dtype
        assert relative_error(a * size[0], b * size[0]) < TOLERANCE[dtype]


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_plain(dtype: torch.dtype, implementation: str, device: str) -> None:
    check(dtype, implementation, device)


@pytest.mark.parametrize("size", [(1, 1, 2), (1, 123, 5000), (123, 8, 63)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sizes(size: tuple[int, int, int], implementation: str, device: str) -> None:
    check(torch.float32, implementation, device, size)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_z_loss_and_ignored_rows(implementation: str, device: str) -> None:
    targets = torch.randint(0, 257, (63,), device=device)
    targets[::5] = -100
    weights = torch.rand(63, device=device)
    weights[1] = 0
    check(
        torch.float32,
        implementation,
        device,
        targets=targets,
        loss_weight=weights,
        z_loss=0.1,
    )


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ranges(dtype: torch.dtype, implementation: str, device: str) -> None:
    """Rows of three ranges, one a single id, in any order; ignored rows keep a range."""
    kinds = torch.tensor([[0, 100], [100, 257], [7, 8]])
    ranges = kinds[torch.arange(63) % 3]
    targets = ranges[:, 0] + (torch.rand(63) * (ranges[:, 1] - ranges[:, 0])).long()
    targets[3] = targets[4] = -100
    check(
        dtype,
        implementation,
        device,
        ranges=ranges.to(device),
        targets=targets.to(device),
        z_loss=0.01,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_left_is_zero(implementation: str, device: str) -> None:
    hidden, weight, targets = problem(5, 8, 16, torch.float32, device)
    got = linear_cross_entropy(
        hidden, weight, torch.full_like(targets, -100), implementation=implementation
    )
    got.loss.backward()
    assert got.loss == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_keeps_the_softmax_in_float32(implementation: str, device: str) -> None:
    hidden, weight, targets = problem(63, 32, 257, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, targets, implementation=implementation)
    got.loss.backward()
    want = expected(hidden.double(), weight.double(), targets)
    assert got.loss.dtype == torch.float32
    assert relative_error(got.loss, want.loss) < 1e-2
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_without_gradients(device: str) -> None:
    hidden, weight, targets = problem(5, 8, 16, torch.float32, device)
    with torch.no_grad():
        got = linear_cross_entropy(hidden, weight, targets)
    assert not got.loss.requires_grad
    assert relative_error(got.loss, expected(hidden.double(), weight.double(), targets).loss) < 1e-5


def test_a_second_backward_gives_the_same_again(device: str) -> None:
    leaves = problem(5, 8, 16, torch.float32, device)
    loss = linear_cross_entropy(*leaves).loss
    first = torch.autograd.grad(loss, leaves[:2], retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, leaves[:2]), first, strict=True):
        assert torch.equal(a, b)


def test_only_the_head_is_trained(device: str) -> None:
    hidden, weight, targets = problem(5, 8, 16, torch.float32, device)
    linear_cross_entropy(hidden.detach(), weight, targets).loss.backward()
    assert weight.grad is not None


def test_opcheck_and_compile(device: str) -> None:
    hidden, weight, targets = problem(9, 8, 17, torch.float32, device)
    weights = torch.rand(9, device=device)
    op = torch.ops.unimm.linear_cross_entropy.default
    for implementation in IMPLEMENTATIONS:
        args = (hidden, weight, targets, weights, None, 0.1, -100, True, implementation)
        torch.library.opcheck(op, args)

        def step(hidden: Tensor, weight: Tensor, name: str = implementation) -> Tensor:
            return linear_cross_entropy(hidden * 2, weight, targets, implementation=name).loss

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
        want = torch.autograd.grad(step(hidden, weight), (hidden, weight))
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < 1e-6


def test_errors() -> None:
    hidden, weight = torch.zeros(3, 4), torch.zeros(10, 4)
    targets = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match=r"weight \(10, 5\)"):
        linear_cross_entropy(hidden, torch.zeros(10, 5), targets)
    with pytest.raises(ValueError, match=r"must be \(3,\)"):
        linear_cross_entropy(hidden, weight, targets[:2])
    with pytest.raises(ValueError, match="target 10 is outside the vocabulary of 10 ids"):
        linear_cross_entropy(hidden, weight, targets + 7)
    ranges = torch.tensor([[0, 5], [0, 5], [0, 3]])
    with pytest.raises(ValueError, match=r"target 3 of row 2 is outside its range \[0, 3\]"):
        linear_cross_entropy(hidden, weight, targets, ranges=ranges)
    with pytest.raises(ValueError, match=r"range \[0, 11\) is empty or outside"):
        linear_cross_entropy(hidden, weight, targets, ranges=ranges.new_tensor([[0, 11]] * 3))
    with pytest.raises(ValueError, match="differ in dtype"):
        linear_cross_entropy(hidden, weight.half(), targets)
