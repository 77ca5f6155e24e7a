"""Adversaries score patches of whatever the codecs make, and can be trained to tell."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from unimm_tokenizers.discriminators import (
    BandDiscriminator,
    Discriminator,
    MotionDiscriminator,
    PatchDiscriminator,
    PeriodDiscriminator,
    SpectrumDiscriminator,
)
from unimm_tokenizers.losses import discriminator_hinge


@pytest.mark.parametrize(
    ("channels", "size", "scores"),
    [
        (3, (2, 3, 32, 24), (2, 1, 8, 6)),
        (1, (2, 1, 9, 13), (2, 1, 2, 3)),
        (3, (2, 3, 5, 16, 16), (10, 1, 4, 4)),  # frames of a film, each by itself
        (1, (2, 33, 20), (2, 1, 8, 5)),  # a spectrum is a picture of one channel
    ],
)
def test_patch_scores(channels: int, size: tuple[int, ...], scores: tuple[int, ...]) -> None:
    assert PatchDiscriminator(channels, channels=8)(torch.randn(size)).shape == scores


def test_more_layers_see_more() -> None:
    x = torch.randn(1, 3, 64, 64)
    shapes = [PatchDiscriminator(3, 4, layers)(x).shape[-1] for layers in (1, 2, 3)]
    assert shapes == [32, 16, 8]


def test_frames_of_a_film_are_scored_as_pictures() -> None:
    scorer = PatchDiscriminator(3, channels=8).eval()
    film = torch.randn(1, 3, 4, 16, 16)
    pictures = film[0].transpose(0, 1)
    torch.testing.assert_close(scorer(film), scorer(pictures))


def test_spectrum_scores() -> None:
    scorer = SpectrumDiscriminator(windows=(64, 128), channels=4)
    scores = scorer(torch.randn(3, 1, 1000))
    # 33 bins x 63 frames and 65 x 32, each side halved twice.
    assert scores.shape == (3, 8 * 15 + 16 * 8)
    assert scorer(torch.randn(3, 1, 500)).shape[1] < scores.shape[1]


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: PatchDiscriminator(3, channels=8), (8, 3, 16, 16)),
        (lambda: SpectrumDiscriminator(windows=(64,), channels=4), (8, 1, 400)),
        (lambda: BandDiscriminator(windows=(64,), channels=8), (8, 1, 400)),
        (lambda: PeriodDiscriminator(periods=(2, 3), channels=4, num_layers=2), (8, 1, 400)),
        (lambda: MotionDiscriminator(3, channels=8), (4, 3, 4, 16, 16)),
    ],
)
def test_it_learns_to_tell(make: Callable[[], nn.Module], size: tuple[int, ...]) -> None:
    """Noise from its smoothed self: the hinge falls, and every weight takes part."""

    def smooth(x: Tensor) -> Tensor:
        return (x + x.roll(1, -1) + x.roll(2, -1)) / 3

    torch.manual_seed(0)
    scorer = make()
    optimizer = torch.optim.Adam(scorer.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        real = torch.randn(size)
        loss = discriminator_hinge(scorer(real), scorer(smooth(torch.randn(size))))
        optimizer.zero_grad()
        loss.backward()
        assert all(
            p.grad is not None and bool(p.grad.isfinite().all()) for p in scorer.parameters()
        )
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


def test_scores_are_bounded_by_spectral_norm() -> None:
    """Every layer is 1-Lipschitz, so a score moves no more than the picture (times its kernel)."""
    scorer = PatchDiscriminator(3, channels=8).train()
    for _ in range(50):  # power iterations
        scorer(torch.randn(1, 3, 16, 16))
    scorer.eval()
    for layer in scorer.body:
        if isinstance(layer, nn.Conv2d):
            norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
            assert float(norm.detach()) == pytest.approx(1.0, abs=0.02)


def test_motion_is_seen_and_stills_are_left_to_others() -> None:
    scorer = MotionDiscriminator(3, channels=4).eval()
    film = torch.randn(2, 3, 6, 16, 16)
    assert scorer(film).shape == (2, 1, 4, 4, 4)
    assert scorer.accepts(film)
    assert not scorer.accepts(film[:, :, :2])
    assert not scorer.accepts(film[:, :, 0])
    backwards = scorer(film.flip(2)).flip(2)
    assert not torch.allclose(backwards, scorer(film))
    assert PatchDiscriminator(3).accepts(film[:, :, 0])


WAVES: list[Discriminator] = [
    SpectrumDiscriminator(windows=(64, 128), channels=4),
    BandDiscriminator(windows=(128, 64), channels=4),
    PeriodDiscriminator(periods=(2, 3, 5), channels=2, num_layers=2),
]


@pytest.mark.parametrize("scorer", WAVES, ids=lambda scorer: type(scorer).__name__)
def test_channels_of_sound_are_scored_one_by_one(scorer: Discriminator) -> None:
    scorer.eval()
    stereo = torch.randn(2, 2, 401)
    scores = scorer(stereo)
    assert len(scores) == 4
    torch.testing.assert_close(scores[1], scorer(stereo[:1, 1:])[0])
    assert scorer.accepts(stereo)
    assert not scorer.accepts(torch.randn(2, 33, 20))  # a spectrum
    assert not scorer.accepts(torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize(
    ("scorer", "count"),
    [(WAVES[0], 2 * 2), (WAVES[1], 2 * 5 * 4), (WAVES[2], 3 * 2), (PatchDiscriminator(2), 2)],
)
def test_features_are_what_each_activation_gives(scorer: Discriminator, count: int) -> None:
    scorer.eval()
    x = torch.randn(1, 2, 16, 16) if isinstance(scorer, PatchDiscriminator) else noise(400)
    *inner, scores = scorer.features(x)
    assert len(inner) == count
    torch.testing.assert_close(scores, scorer(x))


def noise(samples: int) -> Tensor:
    return torch.randn(1, 1, samples)


def test_bands_see_their_own_frequencies_alone() -> None:
    """A tone of the upper half moves the scores of the upper bands, and no lower one's."""
    scorer = BandDiscriminator(windows=(512,), channels=4).eval()
    time = torch.arange(4096.0)
    silence, tone = torch.zeros(1, 1, 4096), torch.sin(0.8 * torch.pi * time)[None, None]
    moved = [
        float((a - b).abs().max().detach())
        for a, b in zip(scorer.features(silence)[::4], scorer.features(tone)[::4], strict=True)
    ][:5]  # the first activation of each band
    assert moved[4] > 100 * max(moved[:3])
