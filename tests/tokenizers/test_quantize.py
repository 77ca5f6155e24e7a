"""Quantizers: nearest codes, k-means at the first training batch alone, straight-through."""

import math

import pytest
import torch
from torch import Tensor

from unimm_tokenizers.quantize import (
    BinaryQuantizer,
    FactorizedResidualQuantizer,
    FiniteScalarQuantizer,
    IndexBackpropagationQuantizer,
    Quantizer,
    ResidualVectorQuantizer,
    SimVectorQuantizer,
    UsageCounter,
    code_usage,
)

DIM = 6


def quantizers() -> dict[str, Quantizer]:
    return {
        "plain": ResidualVectorQuantizer(DIM, 16),
        "residual": ResidualVectorQuantizer(DIM, 16, num_codebooks=3),
        "cosine": ResidualVectorQuantizer(DIM, 16, codebook_dim=4, cosine=True),
        "projected": ResidualVectorQuantizer(DIM, 16, num_codebooks=2, codebook_dim=4),
        "factorized": FactorizedResidualQuantizer(DIM, 16, num_codebooks=3, codebook_dim=4),
        "finite": FiniteScalarQuantizer(DIM, (4, 3, 5)),
        "simvq": SimVectorQuantizer(DIM, 16),
        "simvq projected": SimVectorQuantizer(DIM, 16, 4),
        "lookup-free": BinaryQuantizer(DIM, 4),
        "spherical": BinaryQuantizer(DIM, 6, spherical=True),
        "index": IndexBackpropagationQuantizer(DIM, 16),
        "index projected": IndexBackpropagationQuantizer(DIM, 16, 4),
    }


@pytest.fixture(params=quantizers())
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    """One that has started: k-means has had enough vectors."""
    started = quantizers()[request.param].train()
    started(torch.randn(4, DIM, 30))
    return started


@pytest.fixture(params=quantizers())
def fresh(request: pytest.FixtureRequest) -> Quantizer:
    return quantizers()[request.param]


def codebooks_of(quantizer: ResidualVectorQuantizer) -> Tensor:
    """(K, codebook_size, dim)."""
    return quantizer.codebooks.codes.clone()


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
    assert "codebooks.codes" in changed(quantizer, before)
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
    second(100 + torch.randn(1, DIM, 40))
    moved = (codebooks_of(second) - codebooks_of(first)).norm(dim=-1)
    assert int((moved > 50).sum()) < 16  # k-means would have put every code among the four


def test_warming_up_passes_latents_through(fresh: Quantizer) -> None:
    """No code and no loss, in training alone; the codebooks start when it is over."""
    quantizer = fresh
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
        quantizer, ResidualVectorQuantizer | FactorizedResidualQuantizer
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
    """Once, whatever the number of levels."""
    for levels in (1, 3):
        quantizer = ResidualVectorQuantizer(DIM, 16, num_codebooks=levels)
        latents = torch.randn(2, DIM, 20, requires_grad=True)
        output = quantizer.train()(latents)
        assert int(output.codes.min()) >= 0
        weights = torch.randn_like(latents)
        (gradient,) = torch.autograd.grad((output.quantized * weights).sum(), latents)
        torch.testing.assert_close(gradient, weights)


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


def test_dropout_gives_each_row_its_own_levels_in_training_alone() -> None:
    quantizer = ResidualVectorQuantizer(DIM, 16, num_codebooks=4, dropout=1.0).train()
    quantizer(torch.randn(4, DIM, 30))
    output = quantizer(torch.randn(30, DIM, 4))
    levels = (output.codes[:, :, 0] >= 0).sum(1)
    assert set(levels.tolist()) == {1, 2, 3, 4}
    for row, count in enumerate(levels.tolist()):
        assert bool((output.codes[row, :count] >= 0).all())
        assert bool((output.codes[row, count:] == -1).all())
    assert int(quantizer.eval()(torch.randn(30, DIM, 4)).codes.min()) >= 0


@torch.no_grad()
def test_levels_left_out_add_nothing() -> None:
    quantizer = ResidualVectorQuantizer(DIM, 16, num_codebooks=3).eval()
    codes = quantizer(torch.randn(2, DIM, 5)).codes
    coarse = codes.clone()
    coarse[:, 1:] = -1
    first = quantizer.codebooks.codes[0][codes[:, 0]].transpose(1, 2)
    torch.testing.assert_close(quantizer.lookup(coarse), first)


def test_each_level_pulls_the_latents() -> None:
    """The commitment of every level has a gradient: in EnCodec's first version only the first's."""
    quantizer = ResidualVectorQuantizer(DIM, 16, num_codebooks=2).train()
    quantizer(torch.randn(4, DIM, 30))
    latents = torch.randn(1, DIM, 20, requires_grad=True)
    output = quantizer.eval()(latents)
    (gradient,) = torch.autograd.grad(output.loss, latents)
    rows = latents.detach()[0].T
    first = quantizer.codebooks.codes[0][output.codes[0, 0]]
    both = first + quantizer.codebooks.codes[1][output.codes[0, 1]]
    expected = 0.25 * 2 * ((rows - first) + (rows - both)) / rows.numel()
    torch.testing.assert_close(gradient[0].T, expected)


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


def test_a_counter_adds_up_batches() -> None:
    counter = UsageCounter(2, 8)
    batches = [torch.randint(8, (3, 2, 5)) for _ in range(4)]
    batches[0][0, 0, 0] = -1
    for batch in batches:
        counter.update(batch)
    expected = code_usage(torch.cat(batches), 8)
    for found, figure in zip(counter.finish(), expected, strict=True):
        torch.testing.assert_close(found, figure)
    assert counter.finish().usage.tolist() == [0, 0]
    assert not counter.state_dict()


# Sign codes


@torch.no_grad()
@pytest.mark.parametrize("spherical", [False, True])
def test_signs_are_the_nearest_codes(spherical: bool) -> None:
    quantizer = BinaryQuantizer(5, 5, spherical=spherical).eval()
    values = quantizer.lookup(torch.arange(32)[None, None])[0].T
    assert len(values.unique(dim=0)) == 32
    latents = torch.randn(1, 5, 50)
    nearest = torch.cdist(latents[0].T, values).argmin(1)
    assert torch.equal(quantizer(latents).codes[0, 0], nearest)
    if spherical:
        torch.testing.assert_close(values.norm(dim=1), torch.ones(32))


@torch.no_grad()
def test_the_penalty_is_that_of_the_softmax_over_all_codes() -> None:
    """Channel by channel, against the 2^bits-sized softmax; of the mean choice an upper bound."""
    for spherical in (False, True):
        quantizer = BinaryQuantizer(4, 4, spherical=spherical, entropy=1.0, temperature=0.7)
        rows = torch.randn(1, 20, 4, dtype=torch.float64)
        values = quantizer.lookup(torch.arange(16)[None, None])[0].T.double()
        soft = (2 * rows[0] @ values.T / 0.7).softmax(-1)
        own = -(soft * soft.log()).sum(-1).mean()
        mean = soft.mean(0)
        spread = -(mean * mean.log()).sum()
        penalty = quantizer._penalty(rows)
        shares = soft @ (values > 0).double()
        bound = torch.special.entr(torch.stack([shares.mean(0), 1 - shares.mean(0)])).sum()
        torch.testing.assert_close(penalty, own - bound, rtol=1e-4, atol=1e-6)
        assert float(bound) >= float(spread) - 1e-9


def test_bits_are_checked() -> None:
    for bits in (0, 25):
        with pytest.raises(ValueError, match="binary codes need 1 to 24 bits"):
            BinaryQuantizer(4, bits)


# Index backpropagation


def test_every_code_gets_a_gradient() -> None:
    quantizer = IndexBackpropagationQuantizer(DIM, 64).train()
    output = quantizer(torch.randn(2, DIM, 10))
    output.quantized.square().sum().backward()
    assert quantizer.codebook.grad is not None
    assert bool((quantizer.codebook.grad.abs().sum(1) > 0).all())


def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that go through in parts give the loss and gradients of all at once."""
    quantizer = IndexBackpropagationQuantizer(DIM, 16).train()
    latents = torch.randn(2, DIM, 25, requires_grad=True)
    found = []
    for scores in (2**24, 16 * 7):
        monkeypatch.setattr("unimm_tokenizers.quantize.index.PART_SCORES", scores)
        output = quantizer(latents)
        loss = output.quantized.square().sum() + output.loss
        found.append([loss, *torch.autograd.grad(loss, [latents, quantizer.codebook])])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole)


@torch.no_grad()
def test_indices_are_the_same_in_training_and_after() -> None:
    quantizer = IndexBackpropagationQuantizer(DIM, 64)
    latents = torch.randn(2, DIM, 40)
    trained = quantizer.train()(latents).codes
    assert torch.equal(quantizer.eval()(latents).codes, trained)
    scores = torch.einsum("bdn,kd->bnk", latents, quantizer.codebook)
    assert torch.equal(scores.argmax(-1), trained[:, 0])


# SimVQ


def test_the_map_moves_every_code_and_the_codebook_stays() -> None:
    quantizer = SimVectorQuantizer(DIM, 32).train()
    before = quantizer.lookup(torch.arange(32)[None, None])[0].T.detach()
    frozen = quantizer.frozen.clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.1)
    quantizer(torch.randn(2, DIM, 3)).loss.backward()
    optimizer.step()
    moved = quantizer.lookup(torch.arange(32)[None, None])[0].T.detach() - before
    assert bool((moved.norm(dim=1) > 0).all())
    assert torch.equal(quantizer.frozen, frozen)


# Any of them


def test_a_few_steps_bring_codes_and_latents_together(quantizer: Quantizer) -> None:
    """An encoder of one layer learns to say what its codes can hold."""
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Conv1d(3, DIM, 1), torch.nn.Conv1d(DIM, 3, 1)
    parameters = [*encoder.parameters(), *decoder.parameters(), *quantizer.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    errors = []
    for _ in range(80):
        x = torch.randn(4, 3, 64)
        output = quantizer.train()(encoder(x))
        error = (decoder(output.quantized) - x).square().mean()
        optimizer.zero_grad()
        (error + output.loss).backward()
        optimizer.step()
        errors.append(error.item())
    assert sum(errors[-10:]) < 0.8 * sum(errors[:10])


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_share_of_the_rows_gets_fewer_levels(share: float) -> None:
    quantizer = FactorizedResidualQuantizer(DIM, 16, num_codebooks=8, dropout=share).train()
    quantizer(torch.randn(4, DIM, 30))
    codes = quantizer(torch.randn(400, DIM, 1)).codes
    whole = float((codes >= 0).all(1).float().mean())
    assert whole == pytest.approx(1 - share * 7 / 8, abs=0.08)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["residual", "factorized"])
def test_fewer_levels_are_the_first_ones(kind: str) -> None:
    quantizer = quantizers()[kind].train()
    quantizer(torch.randn(4, DIM, 30))
    latents = torch.randn(2, DIM, 9)
    whole = quantizer.eval()(latents)
    quantizer.num_codebooks = 2
    fewer = quantizer(latents)
    assert torch.equal(fewer.codes, whole.codes[:, :2])
    torch.testing.assert_close(quantizer.lookup(fewer.codes), fewer.quantized)
    assert not torch.allclose(fewer.quantized, whole.quantized)
    smaller = type(quantizer)(DIM, 16, 2, *([4] if kind == "factorized" else []))  # type: ignore[call-arg]
    smaller.load_state_dict(quantizer.first_levels(2))
    assert torch.equal(smaller.eval()(latents).codes, fewer.codes)


def test_factorized_levels_explain_more_and_more() -> None:
    """After a few hundred steps each level has taken away what the next one does not have to."""
    quantizer = FactorizedResidualQuantizer(DIM, 64, num_codebooks=3, codebook_dim=4).train()
    optimizer = torch.optim.Adam(quantizer.parameters(), 1e-2)
    data = torch.randn(8, DIM, 64)
    for _ in range(150):
        optimizer.zero_grad()
        quantizer(data).loss.backward()
        optimizer.step()
    codes = quantizer.eval()(data).codes
    left = []
    for levels in (1, 2, 3):
        quantizer.num_codebooks = levels
        left.append(float((data - quantizer.lookup(codes[:, :levels])).square().mean().detach()))
    assert left[0] < 0.7
    assert left[1] < 0.75 * left[0]
    assert left[2] < 0.9 * left[1]


def test_quantizers_without_levels_leave_none_out() -> None:
    with pytest.raises(ValueError, match="has no levels to leave out"):
        FiniteScalarQuantizer(DIM, (4, 3)).first_levels(1)
