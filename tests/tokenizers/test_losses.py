"""Losses are zero at equality, positive elsewhere, and pull the right way."""

import pytest
import torch
from torch import Tensor

from unimm_tokenizers import CodecOutput
from unimm_tokenizers.losses import (
    MultiResolutionSTFT,
    Objective,
    PictureObjective,
    SpectrumObjective,
    WaveformObjective,
    discriminator_hinge,
    generator_hinge,
)
from unimm_tokenizers.losses.objectives import total

OBJECTIVES: dict[str, tuple[Objective, tuple[int, ...]]] = {
    "picture": (PictureObjective(), (2, 3, 17, 12)),
    "one pixel": (PictureObjective(), (2, 3, 1, 1)),
    "film": (PictureObjective(), (2, 3, 4, 9, 8)),
    "waveform": (WaveformObjective(), (2, 1, 1600)),
    "stereo": (WaveformObjective(windows=(64, 128)), (2, 2, 400)),
    "spectrum": (SpectrumObjective(), (2, 33, 20)),
}


def output_of(made: Tensor, real: Tensor) -> CodecOutput:
    return CodecOutput(made, real, torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(()))


@pytest.fixture(params=OBJECTIVES)
def case(request: pytest.FixtureRequest) -> tuple[Objective, Tensor, Tensor]:
    objective, shape = OBJECTIVES[request.param]
    return objective, torch.rand(shape) * 2 - 1, torch.rand(shape) * 2 - 1


def test_equal_signals_cost_nothing(case: tuple[Objective, Tensor, Tensor]) -> None:
    objective, real, _ = case
    made = real.clone().requires_grad_()
    terms = objective(output_of(made, real))
    assert all(term.shape == () and float(term.detach()) == 0 for term in terms.values())
    total(terms).backward()
    assert made.grad is not None
    assert bool(made.grad.isfinite().all())


def test_different_signals_cost_and_descend(case: tuple[Objective, Tensor, Tensor]) -> None:
    objective, real, other = case
    losses = []
    made = other.clone().requires_grad_()
    for _ in range(3):
        loss = total(objective(output_of(made, real)))
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, made)
        assert bool(gradient.isfinite().all())
        step = 1e-3 * gradient / gradient.abs().max()
        made = (made - step).detach().requires_grad_()
    assert losses[0] > losses[1] > losses[2] > 0


def test_halves_are_compared_in_float32(case: tuple[Objective, Tensor, Tensor]) -> None:
    objective, real, other = case
    terms = objective(output_of(other.bfloat16(), real.bfloat16()))
    assert all(term.dtype == torch.float32 for term in terms.values())
    rounded = objective(output_of(other.bfloat16().float(), real.bfloat16().float()))
    for name, term in terms.items():
        torch.testing.assert_close(term, rounded[name])


def test_weights_weigh() -> None:
    made, real = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    one = PictureObjective(l1=1, l2=1, gradient=1)(output_of(made, real))
    other = PictureObjective(l1=2, l2=0, gradient=0.5)(output_of(made, real))
    assert set(one) == {"l1", "l2", "gradient"}
    torch.testing.assert_close(one["l1"], (made - real).abs().mean())
    torch.testing.assert_close(one["l2"], (made - real).square().mean())
    torch.testing.assert_close(other["l1"], 2 * one["l1"])
    assert float(other["l2"]) == 0
    torch.testing.assert_close(other["gradient"], 0.5 * one["gradient"])
    torch.testing.assert_close(total(one), one["l1"] + one["l2"] + one["gradient"])


def test_the_gradient_term_asks_for_edges_not_for_brightness() -> None:
    real = torch.rand(1, 1, 16, 16)
    terms = PictureObjective()(output_of(real + 0.25, real))
    assert float(terms["gradient"]) < 1e-6
    assert float(terms["l1"]) == pytest.approx(0.25, rel=1e-5)
    blurred = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
    assert float(PictureObjective()(output_of(blurred, real))["gradient"]) > 0.1


def test_loud_bins_count_for_more() -> None:
    real = torch.zeros(1, 10, 5)
    real[:, 0] = 4.0  # one loud bin
    wrong = torch.zeros_like(real)
    wrong[:, 0] = 1.0
    loud = SpectrumObjective()(output_of(real + wrong, real))["l1"]
    quiet = SpectrumObjective()(output_of(real + wrong.roll(5, 1), real))["l1"]
    assert float(loud / quiet) == pytest.approx(4.0)
    flat = SpectrumObjective(loudness=1.0)(output_of(real + wrong, real))["l1"]
    assert float(flat) == pytest.approx(0.1)


def test_spectral_distance_hears_pitch_and_not_phase() -> None:
    distance = MultiResolutionSTFT((128, 256))
    time = torch.arange(2000) / 2000
    sine = torch.sin(2 * torch.pi * 200 * time).view(1, 1, -1)
    shifted = torch.cos(2 * torch.pi * 200 * time).view(1, 1, -1)
    other = torch.sin(2 * torch.pi * 300 * time).view(1, 1, -1)
    assert float(distance(shifted, sine)) < 0.5 * float(distance(other, sine))
    assert float(distance(sine, sine)) == 0
    assert float(distance(torch.zeros_like(sine), torch.zeros_like(sine))) == 0
    assert torch.isfinite(distance(sine, torch.zeros_like(sine)))


def test_hinge() -> None:
    """Lim and Ye, equations 3 and 4: scores past the margin cost nothing."""
    sure = torch.full((3, 2), 2.0)
    assert float(discriminator_hinge(sure, -sure)) == 0
    assert float(discriminator_hinge(torch.zeros(3), torch.zeros(3))) == 1
    assert float(discriminator_hinge(-sure, sure)) == 3
    assert float(generator_hinge(sure)) == -2
    assert discriminator_hinge(sure.half(), sure.half()).dtype == torch.float32
