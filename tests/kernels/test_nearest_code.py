"""Nearest codes, residual codes and their sums against float64 distances."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unimm_kernels import (
    ScoredCodes,
    code_sums,
    nearest_code,
    residual_nearest_code,
    scored_codes,
)
from unimm_kernels.testing import poisoned_memory

IMPLEMENTATIONS = ["torch", "triton"]
METRICS = ["euclidean", "cosine"]


def distances(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    x, codebook = x.double(), codebook.double()
    if metric == "cosine":
        x, codebook = F.normalize(x, dim=1), F.normalize(codebook, dim=1)
    return torch.cdist(x, codebook, compute_mode="donot_use_mm_for_euclid_dist").square()


def assert_nearest(index: Tensor, x: Tensor, codebook: Tensor, metric: str) -> None:
    """Right wherever the two nearest codes differ by more than float32 can tell apart."""
    far = distances(x, codebook, metric)
    assert index.dtype == torch.int64
    assert index.shape == x.shape[:1]
    scale = 1.0 if metric == "cosine" else float(codebook.double().square().sum(1).max())
    excess = far.gather(1, index[:, None]).squeeze(1) - far.amin(1)
    assert float(excess.max()) <= 4e-6 * scale


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "size", "d"), [(1, 1, 4), (63, 64, 8), (123, 257, 33), (5, 257, 130), (2, 63, 512)]
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nearest(
    n: int, size: int, d: int, dtype: torch.dtype, metric: str, implementation: str, device: str
) -> None:
    x = torch.randn(n, 2 * d, device=device).to(dtype)[:, ::2]
    codebook = torch.randn(d, size, device=device).to(dtype).T
    with poisoned_memory():
        index = nearest_code(x, codebook, metric=metric, implementation=implementation)
    assert_nearest(index, x, codebook, metric)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_rows_and_float32_codes(implementation: str, device: str) -> None:
    x, codebook = torch.randn(63, 8, device=device).bfloat16(), torch.randn(257, 8, device=device)
    index = nearest_code(x, codebook, implementation=implementation)
    assert_nearest(index, x, codebook, "euclidean")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_go_to_the_lowest_index(metric: str, implementation: str, device: str) -> None:
    """Each code appears four times, in one tile and in others.

    Codes of 16 signs have the norm 4: every score is exact, whatever order a product is summed in.
    """
    signs = torch.arange(300, device=device)[:, None] >> torch.arange(16, device=device)
    codes = (signs % 2 * 2 - 1).float()
    codebook = torch.cat([codes, codes, codes.flip(0), codes])
    index = nearest_code(codes, codebook, metric=metric, implementation=implementation)
    assert torch.equal(index, torch.arange(300, device=device))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_rows_get_a_valid_index(implementation: str, device: str) -> None:
    x = torch.full((3, 8), float("nan"), device=device)
    index = nearest_code(x, torch.randn(70, 8, device=device), implementation=implementation)
    assert ((index >= 0) & (index < 70)).all()


def test_many_tiles(device: str) -> None:
    x, codebook = torch.randn(2500, 5, device=device), torch.randn(1300, 5, device=device)
    assert_nearest(nearest_code(x, codebook), x, codebook, "euclidean")


def test_float64(device: str) -> None:
    """Codes that float32 cannot tell apart."""
    codebook = torch.tensor([[1.0], [1.0 + 1e-6]], dtype=torch.float64, device=device)
    index = nearest_code(codebook, codebook, implementation="torch")
    assert index.tolist() == [0, 1]


def test_autocast_does_not_round_the_scores() -> None:
    x, codebook = torch.randn(63, 8), torch.randn(300, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = nearest_code(x, codebook)
    assert torch.equal(rounded, nearest_code(x, codebook))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("n", "levels", "size", "d"), [(1, 1, 1, 4), (63, 3, 70, 8), (17, 2, 33, 128), (9, 2, 20, 200)]
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_residual(
    n: int, levels: int, size: int, d: int, metric: str, implementation: str, device: str
) -> None:
    x = torch.randn(n, 2 * d, device=device)[:, ::2]
    codebooks = torch.randn(levels, size, d, device=device) * 0.7
    with poisoned_memory():
        index = residual_nearest_code(x, codebooks, metric=metric, implementation=implementation)
    assert index.shape == (n, levels)
    residual = x
    for level in range(levels):
        assert_nearest(index[:, level], residual, codebooks[level], metric)
        residual = residual - codebooks[level][index[:, level]]


@pytest.mark.parametrize("metric", METRICS)
def test_scores_may_be_made_before(metric: str) -> None:
    """One search of many rows, searches of few, and searches with scores that were kept."""
    x, codebooks = torch.randn(300, 8), torch.randn(3, 700, 8)
    scored = scored_codes(codebooks, metric == "cosine")
    whole = residual_nearest_code(x, codebooks, metric=metric)
    parts = [
        residual_nearest_code(part, codebooks, metric=metric, scored=scored) for part in x.split(7)
    ]
    assert torch.equal(torch.cat(parts), whole)
    first = nearest_code(
        x, codebooks[0], metric=metric, scored=ScoredCodes(scored.codes[0], scored.bias[0])
    )
    assert torch.equal(first, whole[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "size", "d"), [(1, 1, 1), (63, 7, 65), (257, 63, 8)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sums(
    n: int, size: int, d: int, dtype: torch.dtype, implementation: str, device: str
) -> None:
    x = torch.randn(n, 2 * d, device=device).to(dtype)[:, ::2]
    codes = torch.randint(0, size, (n,), device=device)
    one_hot = F.one_hot(codes, size).double()
    with poisoned_memory():
        counts, sums = code_sums(x, codes, size, implementation=implementation)
    assert counts.dtype == sums.dtype == torch.float32
    assert torch.equal(counts.double(), one_hot.sum(0))
    torch.testing.assert_close(sums.double(), one_hot.T @ x.double(), rtol=1e-5, atol=1e-5)


def test_opcheck_and_compile(device: str) -> None:
    x, codebooks = torch.randn(9, 4, device=device), torch.randn(2, 5, 4, device=device)
    codes = torch.randint(0, 5, (9,), device=device)
    ops = torch.ops.unimm
    for name in IMPLEMENTATIONS:
        torch.library.opcheck(ops.nearest_code.default, (x, codebooks[0], True, name))
        torch.library.opcheck(ops.residual_nearest_code.default, (x, codebooks, False, name))
        torch.library.opcheck(ops.code_sums.default, (x, codes, 5, name))

        def step(x: Tensor, name: str = name) -> tuple[Tensor, ...]:
            one = nearest_code(x * 2, codebooks[0], implementation=name)
            all_levels = residual_nearest_code(x, codebooks, implementation=name)
            return one, all_levels, *code_sums(x, one, 5, implementation=name)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(x), step(x), strict=True):
            assert torch.equal(a, b)


def test_errors() -> None:
    x, codebook = torch.zeros(3, 4), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="metric is 'dot'"):
        nearest_code(x, codebook, metric="dot")
    with pytest.raises(ValueError, match=r"codes \(5, 3\) \(K, d\)"):
        nearest_code(x, codebook[:, :3])
    with pytest.raises(ValueError, match="holds no code"):
        nearest_code(x, codebook[:0])
    with pytest.raises(ValueError, match=r"\(L, K, d\)"):
        residual_nearest_code(x, codebook)
    with pytest.raises(ValueError, match=r"codes \(2,\) \(N,\)"):
        code_sums(x, torch.zeros(2, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match=r"codes span 0\.\.7, outside the 5 codes"):
        code_sums(x, torch.tensor([0, 7, 1]), 5)
    with pytest.raises(ValueError, match="float64"):
        nearest_code(x.double(), codebook.double(), implementation="triton")
