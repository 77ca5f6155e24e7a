"""Losses are zero at equality, positive elsewhere, and pull the right way."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unimm_tokenizers import CodecOutput
from unimm_tokenizers.audio import SoundStreamCodec, SoundStreamConfig
from unimm_tokenizers.losses import (
    LeCam,
    Lpips,
    MelSpectrumObjective,
    MultiResolutionSTFT,
    Objective,
    PictureObjective,
    SemanticDistillation,
    SpectrumObjective,
    StructuralDistance,
    WaveformObjective,
    discriminator_hinge,
    feature_distance,
    generator_hinge,
    pack_lpips,
    r1_penalty,
)
from unimm_tokenizers.losses.objectives import total

OBJECTIVES: dict[str, tuple[Objective, tuple[int, ...]]] = {
    "picture": (PictureObjective(cosine=0.5), (2, 3, 17, 12)),
    "one pixel": (PictureObjective(cosine=0.5), (2, 3, 1, 1)),
    "film": (PictureObjective(), (2, 3, 4, 9, 8)),
    "waveform": (WaveformObjective(), (2, 1, 1600)),
    "mel": (WaveformObjective(mel=1.0, sample_rate=8000), (1, 1, 2400)),
    "mel spectrum": (MelSpectrumObjective(sample_rate=8000, window=64, bands=(5,)), (2, 33, 20)),
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


def test_lecam_holds_scores_near_the_others_average() -> None:
    """Equation 6 of the paper, with averages that follow slowly."""
    regularizer = LeCam(decay=0.5)
    real, fake = torch.full((4,), 3.0), torch.full((4,), -1.0)
    for _ in range(30):
        penalty = regularizer(real, fake)
    torch.testing.assert_close(regularizer.real, torch.tensor(3.0))
    torch.testing.assert_close(regularizer.fake, torch.tensor(-1.0))
    torch.testing.assert_close(penalty, torch.tensor(2 * 4.0**2))
    assert float(regularizer(torch.full((4,), -5.0), torch.full((4,), 5.0))) < 40
    scores = torch.tensor([3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(regularizer(scores, fake), scores)
    assert float(gradient) > 0  # pulled down to the made ones


def test_r1_is_the_squared_slope_at_real_signals() -> None:
    score = nn.Linear(6, 1)
    real = torch.randn(5, 1, 6)
    penalty = r1_penalty(lambda x: score(x), real)
    torch.testing.assert_close(penalty, 0.5 * score.weight.square().sum())
    penalty.backward()
    torch.testing.assert_close(score.weight.grad, score.weight.detach())


# Perceptual distances


def test_lpips_reads_a_named_file(lpips_files: tuple[Path, str]) -> None:
    path, digest = lpips_files
    distance = Lpips(str(path), digest)
    assert not distance.state_dict()  # checkpoints hold no copy of it
    real = torch.rand(2, 3, 32, 24) * 2 - 1
    made = (real + 0.1 * torch.randn_like(real)).requires_grad_()
    far = real.flip(0)
    assert float(distance(real, real)) == 0
    near = distance(made, real)
    assert 0 < float(near.detach()) < float(distance(far, real))
    (gradient,) = torch.autograd.grad(near, made)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) > 0
    assert float(distance(far[:, :1], real[:, :1])) > 0  # grey
    objective = PictureObjective(perceptual=distance, perceptual_weight=0.5)
    assert objective.note == "perceptual distance: LPIPS"
    terms = objective(output_of(made.detach(), real))
    torch.testing.assert_close(terms["perceptual"], 0.5 * near.detach())
    assert "none learned" in PictureObjective().note


def test_lpips_is_what_its_authors_compute(lpips_files: tuple[Path, str]) -> None:
    """Written out plainly: unit features, squared differences, heads, mean over positions."""
    path, digest = lpips_files
    distance = Lpips(str(path), digest)
    folder = path.parent
    vgg, heads = (torch.load(folder / name, weights_only=True) for name in ("vgg16.pth", "vgg.pth"))
    layers: list[nn.Module] = []
    for place in range(30):
        weight = vgg.get(f"features.{place}.weight")
        if weight is not None:
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            layer.load_state_dict({k: vgg[f"features.{place}.{k}"] for k in ("weight", "bias")})
            layers.append(layer)
        else:
            layers.append(nn.MaxPool2d(2) if place in (4, 9, 16, 23) else nn.ReLU())
    x, y = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    shift, scale = (
        torch.tensor(v).view(3, 1, 1) for v in ([-0.03, -0.088, -0.188], [0.458, 0.448, 0.45])
    )
    a, b, expected, depth = (x - shift) / scale, (y - shift) / scale, torch.zeros(2), 0
    for place, layer in enumerate(layers):
        a, b = layer(a), layer(b)
        if place in (3, 8, 15, 22, 29):
            units = [v / (v.square().sum(1, keepdim=True).sqrt() + 1e-10) for v in (a, b)]
            head = heads[f"lin{depth}.model.1.weight"]
            expected = expected + nn.functional.conv2d((units[0] - units[1]).square(), head).mean(
                (1, 2, 3)
            )
            depth += 1
    torch.testing.assert_close(distance(x, y), expected.mean())


def test_bad_lpips_files_are_named(lpips_files: tuple[Path, str], tmp_path: Path) -> None:
    path, digest = lpips_files
    with pytest.raises(ValueError, match=f"{path}: sha256 is {digest}, expected 00"):
        Lpips(str(path), "00")
    with pytest.raises(ValueError, match="absent: no such file"):
        Lpips(str(tmp_path / "absent"), digest)
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"empty.pth: tensor 'features.0.weight' is missing"):
        pack_lpips(tmp_path / "empty.pth", path.parent / "vgg.pth", tmp_path / "out")
    with pytest.raises(ValueError, match=r"empty.pth: tensor 'lin0.model.1.weight' is missing"):
        pack_lpips(path.parent / "vgg16.pth", tmp_path / "empty.pth", tmp_path / "out")


def test_cosine_transforms_are_orthonormal_before_their_weights() -> None:
    distance = StructuralDistance(cosine=1.0)
    frequency = torch.arange(8.0)
    weight = 1 / (1 + frequency[:, None] + frequency)
    basis = (distance.kernels.view(8, 8, 64) / weight[..., None]).flatten(0, 1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(64), rtol=0, atol=1e-5)
    terms = distance(torch.rand(1, 3, 9, 5), torch.rand(1, 3, 9, 5))
    assert terms.keys() == {"gradient", "cosine"}


def test_feature_matching_counts_each_layer_by_its_own_size() -> None:
    real = [torch.tensor([1.0, -3.0]), torch.tensor([100.0, 100.0])]
    made = [torch.tensor([2.0, -3.0]), torch.tensor([100.0, 150.0])]
    assert float(feature_distance(made, real)) == pytest.approx((0.5 / 2 + 25 / 100) / 2)
    assert float(feature_distance(real, real)) == 0


class Loudness(nn.Module):
    """A teacher: smoothed energy and its opposite, at a frame rate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        energy = nn.functional.avg_pool1d(x.square(), 40)
        return self.gain * torch.cat([energy, -energy], dim=1)


def test_the_first_level_follows_a_teacher() -> None:
    """Its cosine with the teacher rises, by gradients that reach the encoder through the codes."""
    config = SoundStreamConfig(
        sample_rate=1000, channels=4, strides=(4, 4), dilations=(1,), latent_channels=8,
        num_codebooks=2, codebook_size=16,
    )  # fmt: skip
    codec = SoundStreamCodec(config).train()
    distillation = SemanticDistillation(Loudness(), 2, 8, weight=2.0)
    sound = torch.randn(4, 1, 1600) * torch.sin(torch.arange(1600) / 100) * 0.3
    codec(sound)  # starts the codebooks
    parameters = [*codec.parameters(), *distillation.projection.parameters()]
    optimizer = torch.optim.Adam(parameters, 3e-3)
    losses = []
    for _ in range(40):
        loss = distillation(codec, sound, codec(sound))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 1.2  # log 2 is no agreement at all
    assert losses[-1] < 0.9  # 0.63 is perfect
    assert codec.encoder[0].conv.weight.grad.abs().max() > 0  # type: ignore[union-attr]
    assert distillation.teacher.gain.grad is None  # type: ignore[union-attr]
    codec.quantizer.warming_up = True
    assert torch.isfinite(distillation(codec, sound, codec(sound)))


def test_a_teacher_of_another_shape_is_refused() -> None:
    codec = SoundStreamCodec(SoundStreamConfig(channels=2, strides=(4,), latent_channels=4))
    output = codec(torch.zeros(1, 1, 80))
    with pytest.raises(ValueError, match=r"the teacher gave \(1, 80\), expected \(batch, 2"):
        SemanticDistillation(lambda x: x[:, 0], 2, 4)(codec, torch.zeros(1, 1, 80), output)
    with pytest.raises(ValueError, match="without latents"):
        SemanticDistillation(lambda x: x, 1, 4)(
            codec, torch.zeros(1, 1, 80), output._replace(latents=None)
        )
