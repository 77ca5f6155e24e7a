"""Quantizers: nearest codes, k-means at the first training batch alone, straight-through."""

import math

import pytest
import torch
from torch import Tensor

from unimm_tokenizers.quantize import FiniteScalarQuantizer, Quantizer, ResidualVectorQuantizer
from unimm_tokenizers.quantize.base import code_usage

DIM = 6


def quantizers() -> dict[str, Quantizer]:
    return {
        "plain": ResidualVectorQuantizer(DIM, 16),
        "residual": ResidualVectorQuantizer(DIM, 16, num_codebooks=3),
        "cosine": ResidualVectorQuantizer(DIM, 16, codebook_dim=4, cosine=True),
        "projected": ResidualVectorQuantizer(DIM, 16, num_codebooks=2, codebook_dim=4),
        "finite": FiniteScalarQuantizer(DIM, (4, 3, 5)),
    }


@pytest.fixture(params=quantizers())
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    return quantizers()[request.param]


def codebooks_of(quantizer: ResidualVectorQuantizer) -> Tensor:
    """(K, codebook_size, dim)."""
    books = quantizer.vq.codebooks
    assert isinstance(books, Tensor)
    return books.clone()


def state_of(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def changed(quantizer: Quantizer, before: dict[str, Tensor]) -> set[str]:
    return {
        name
        for name, tensor in quantizer.state_dict().items()
        if not torch.equal(tensor, before[name])
    }


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 4)])
def test_shapes_on_every_grid(quantizer: Quantizer, grid: tuple[int, ...]) -> None:
    latents = torch.randn(2, DIM, *grid)
    for training in (True, False):
        quantized, codes, loss = quantizer.train(training)(latents)
        assert quantized.shape == latents.shape
        assert codes.shape == (2, quantizer.num_codebooks, *grid)
        assert codes.dtype == torch.int64
        assert 0 <= int(codes.min()) <= int(codes.max()) < quantizer.codebook_size
        assert loss.shape == ()
        assert loss.dtype == torch.float32


@torch.no_grad()
def test_lookup_gives_what_the_codes_stand_for(quantizer: Quantizer) -> None:
    quantizer.eval()
    for grid in ((7,), (3, 4)):
        quantized, codes, _ = quantizer(torch.randn(2, DIM, *grid))
        torch.testing.assert_close(quantizer.lookup(codes), quantized, rtol=0, atol=1e-5)


@torch.no_grad()
def test_codes_are_the_nearest() -> None:
    quantizer = ResidualVectorQuantizer(DIM, 32).eval()
    latents = torch.randn(1, DIM, 50)
    codebook = quantizer.lookup(torch.arange(32)[None, None])[0].T
    nearest = torch.cdist(latents[0].T, codebook).argmin(1)
    assert torch.equal(quantizer(latents).codes[0, 0], nearest)


@torch.no_grad()
def test_levels_code_what_is_left() -> None:
    """Algorithm 1 of SoundStream, section III.C."""
    quantizer = ResidualVectorQuantizer(DIM, 16, num_codebooks=3).train()
    quantizer(torch.randn(4, DIM, 100))
    latents = torch.randn(1, DIM, 20)
    codes = quantizer.eval()(latents).codes[0]
    residual, books = latents[0].T, codebooks_of(quantizer)
    assert books.shape == (3, 16, DIM)
    for level, book in enumerate(books):
        assert torch.equal(torch.cdist(residual, book).argmin(1), codes[level])
        before, residual = residual, residual - book[codes[level]]
        assert residual.norm() < before.norm()
    torch.testing.assert_close(latents[0].T - residual, quantizer.lookup(codes[None])[0].T)


def test_cosine_codes_have_unit_length_from_the_start() -> None:
    quantizer = ResidualVectorQuantizer(8, 16, cosine=True).eval()
    codes = quantizer.lookup(torch.arange(16)[None, None])[0]
    torch.testing.assert_close(codes.norm(dim=0), torch.ones(16))
    quantizer.train()(torch.randn(2, 8, 64))
    codes = quantizer.eval().lookup(torch.arange(16)[None, None])[0]
    torch.testing.assert_close(codes.norm(dim=0), torch.ones(16))
    with pytest.raises(ValueError, match=r"cosine codes have unit length .* use K = 1"):
        ResidualVectorQuantizer(8, 16, num_codebooks=2, cosine=True)


# K-means and updates


def test_evaluation_changes_nothing(quantizer: Quantizer) -> None:
    quantizer.eval()
    before = state_of(quantizer)
    first = quantizer(torch.full((2, DIM, 40), 3.0)).codes
    for _ in range(3):
        quantizer(torch.randn(2, DIM, 40))
    assert changed(quantizer, before) == set()
    assert torch.equal(quantizer(torch.full((2, DIM, 40), 3.0)).codes, first)


@pytest.mark.parametrize("name", ["plain", "residual", "cosine", "projected"])
def test_the_first_training_batch_starts_the_codebooks(name: str) -> None:
    """Four far clusters: k-means finds them at once, wherever the random codes were."""
    quantizer = quantizers()[name]
    centres = 20 * torch.eye(DIM)[:4]
    latents = centres.repeat(25, 1) + 0.01 * torch.randn(100, DIM)
    quantizer.eval()(latents.T[None])
    before = state_of(quantizer)
    quantized, codes, _ = quantizer.train()(latents.T[None])
    assert {n for n in changed(quantizer, before) if n.endswith("embed")}
    groups = codes[0, 0].view(25, 4).T
    assert len({frozenset(group.tolist()) for group in groups}) == 4
    assert all(
        not set(one.tolist()) & set(other.tolist())
        for i, one in enumerate(groups)
        for other in groups[:i]
    )
    if name in ("plain", "residual"):
        quantized = quantizer.eval()(latents.T[None]).quantized
        assert float((quantized[0].T - latents).abs().max()) < 1


def test_the_start_is_remembered() -> None:
    """A loaded codebook is not started again by the next training batch."""
    first = ResidualVectorQuantizer(DIM, 16).train()
    first(torch.randn(2, DIM, 100))
    second = ResidualVectorQuantizer(DIM, 16).train()
    second.load_state_dict(first.state_dict())
    second(100 + torch.randn(1, DIM, 4))
    moved = (codebooks_of(second) - codebooks_of(first)).norm(dim=-1)
    assert int((moved > 50).sum()) < 16  # k-means would have put every code among the four


def test_warming_up_passes_latents_through(quantizer: Quantizer) -> None:
    """No code and no loss, in training alone; the codebooks start when it is over."""
    quantizer.train().warming_up = True
    before = state_of(quantizer)
    latents = torch.randn(2, DIM, 40)
    quantized, codes, loss = quantizer(latents)
    assert torch.equal(quantized, latents)
    assert codes.shape == (2, quantizer.num_codebooks, 40)
    assert bool((codes == -1).all())
    assert float(loss) == 0
    assert changed(quantizer, before) == set()
    assert int(quantizer.eval()(latents).codes.min()) >= 0
    quantizer.train().warming_up = False
    assert int(quantizer(latents).codes.min()) >= 0
    assert ("started" in changed(quantizer, before)) == isinstance(
        quantizer, ResidualVectorQuantizer
    )


def test_restarted_statistics_keep_the_codes() -> None:
    """As after loading: every code as if used once, none thrown out as dead by the next batch."""
    quantizer = ResidualVectorQuantizer(DIM, 16).train()
    quantizer(torch.randn(2, DIM, 200))
    books = codebooks_of(quantizer)
    quantizer.restart_statistics()
    assert torch.equal(codebooks_of(quantizer), books)
    quantizer(torch.randn(2, DIM, 200))
    moved = (codebooks_of(quantizer) - books).norm(dim=-1)
    assert float(moved.max()) < 1.0


def test_gradients_go_straight_through() -> None:
    """Once for every level: each one's residual leads back to the latents."""
    for levels in (1, 3):
        quantizer = ResidualVectorQuantizer(DIM, 16, num_codebooks=levels)
        latents = torch.randn(2, DIM, 9, requires_grad=True)
        output = quantizer.train()(latents)
        weights = torch.randn_like(latents)
        (gradient,) = torch.autograd.grad((output.quantized * weights).sum(), latents)
        torch.testing.assert_close(gradient, levels * weights)


def test_gradients_reach_latents_through_any(quantizer: Quantizer) -> None:
    latents = torch.randn(2, DIM, 9, requires_grad=True)
    output = quantizer.train()(latents)
    (output.quantized.square().sum() + output.loss).backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().max()) > 0


def test_the_loss_pulls_latents_to_their_codes() -> None:
    quantizer = ResidualVectorQuantizer(DIM, 16).train()
    quantizer(torch.randn(2, DIM, 100))
    latents = torch.randn(2, DIM, 30, requires_grad=True)
    output = quantizer(latents)
    (gradient,) = torch.autograd.grad(output.loss, latents)
    pull = latents.detach() - quantizer.eval()(latents.detach()).quantized
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), pull.flatten(), dim=0)
    assert float(cosine) > 0.9


def test_search_runs_in_float32_under_autocast(quantizer: Quantizer) -> None:
    latents = torch.randn(2, DIM, 40)
    plain = quantizer.eval()(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quantizer(latents)
    assert torch.equal(cast.codes, plain.codes)
    assert cast.quantized.dtype == torch.float32


def test_dropout_leaves_out_fine_levels_in_training_alone() -> None:
    quantizer = ResidualVectorQuantizer(DIM, 16, num_codebooks=4, dropout=True).train()
    latents = torch.randn(2, DIM, 40)
    counts = {int((quantizer(latents).codes[0, :, 0] >= 0).sum()) for _ in range(30)}
    assert counts <= {1, 2, 3, 4}
    assert len(counts) > 1
    assert int(quantizer.eval()(latents).codes.min()) >= 0


# Finite scalars


@torch.no_grad()
def test_finite_scalars_cover_their_codebook() -> None:
    quantizer = FiniteScalarQuantizer(3, (4, 3, 5)).eval()
    assert quantizer.codebook_size == 60
    assert quantizer.num_codebooks == 1
    values = quantizer.lookup(torch.arange(60)[None, None])
    assert values.shape == (1, 3, 60)
    assert len(values[0].T.unique(dim=0)) == 60
    assert len(quantizer(4 * torch.randn(1, 3, 3000)).codes.unique()) > 50


@pytest.mark.parametrize("levels", [(), (4, 2), (4, 1)])
def test_finite_scalars_need_a_middle(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="levels must each be 3 or more"):
        FiniteScalarQuantizer(3, levels)


# Figures


def test_code_usage() -> None:
    even = torch.arange(8).repeat(4).view(2, 1, 16)
    usage, perplexity, entropy = code_usage(even, 16)
    assert usage.tolist() == [0.5]
    assert perplexity.tolist() == pytest.approx([8.0])
    assert entropy.tolist() == pytest.approx([3.0])
    levels = torch.stack([torch.zeros(10), torch.tensor([0.0] * 9 + [1])]).long()[None]
    figures = code_usage(levels, 4)
    assert figures.usage.tolist() == [0.25, 0.5]
    assert figures.perplexity[0] == pytest.approx(1.0)
    nats = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert figures.perplexity[1] == pytest.approx(math.exp(nats), rel=1e-5)
    assert figures.entropy[1] == pytest.approx(nats / math.log(2), rel=1e-5)


def test_padding_counts_for_nothing() -> None:
    codes = torch.tensor([[[0, 1, -1, -1]], [[0, 1, 0, 1]]])
    assert code_usage(codes, 4).entropy.tolist() == pytest.approx([1.0])
    empty = code_usage(torch.full((1, 1, 3), -1), 4)
    assert [float(figure) for figure in empty] == pytest.approx([0.0, 1.0, 0.0])
