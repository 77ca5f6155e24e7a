import math

import pytest
import torch
import torchaudio
from torch import Tensor

from unimm.evaluation import metrics

SEED = 0


def _noise(*shape: int, seed: int = SEED) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _sine(hz: float, phase: float = 0.0, rate: int = 8000, count: int = 8000) -> Tensor:
    return torch.sin(2 * math.pi * hz * torch.arange(count) / rate + phase)[None, None].double()


def test_psnr_of_a_constant_error_is_its_formula() -> None:
    real = _noise(2, 3, 16, 16)
    made = real.clone()
    made[0] += 0.1
    expected = 10 * math.log10(2.0**2 / 0.1**2)
    found = metrics.psnr(made, real, data_range=2.0)
    assert found.tolist() == pytest.approx([expected, metrics.CEILING], abs=1e-4)


def test_psnr_averages_the_error_of_a_film_and_never_over_the_batch() -> None:
    real = torch.zeros(2, 1, 2, 4, 4)
    made = real.clone()
    made[0, :, 0] = 0.2  # one of two frames
    made[1] = 0.2
    one, two = metrics.psnr(made, real, data_range=2.0).tolist()
    assert one - two == pytest.approx(10 * math.log10(2))


def test_ssim_of_two_flat_pictures_is_its_luminance_term() -> None:
    a, b, c1 = 0.5, 0.25, (0.01 * 2.0) ** 2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    flat = torch.ones(1, 1, 16, 16)
    assert float(metrics.ssim(flat * a, flat * b, data_range=2.0)) == pytest.approx(expected)


def test_ssim_and_psnr_agree_with_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    real = _noise(3, 3, 24, 40)
    made = (real + 0.3 * _noise(3, 3, 24, 40, seed=1)).clamp(-1, 1)
    _, windows = functional.structural_similarity_index_measure(
        made.double(), real.double(), data_range=2.0, return_full_image=True
    )
    # The original and scikit-image leave out windows that reach over the border; torchmetrics 1.9
    # reflects the border and counts them (0.792 for 0.807 on the first of these small pictures).
    trusted = windows[..., 5:-5, 5:-5].flatten(1).mean(dim=1)
    assert torch.allclose(metrics.ssim(made, real, data_range=2.0), trusted, atol=1e-6)
    trusted = functional.peak_signal_noise_ratio(
        made, real, data_range=2.0, reduction="none", dim=(1, 2, 3)
    )
    assert torch.allclose(metrics.psnr(made, real, data_range=2.0).float(), trusted, atol=1e-3)


def test_a_wrong_data_range_inflates_both_so_it_has_no_default() -> None:
    real = _noise(1, 1, 32, 32)
    made = real * 0.8
    right, wrong = (metrics.psnr(made, real, data_range=r) for r in (2.0, 4.0))
    assert float(wrong - right) == pytest.approx(6.0206, abs=1e-3)
    assert float(metrics.ssim(made, real, data_range=4.0)) > float(
        metrics.ssim(made, real, data_range=2.0)
    )
    with pytest.raises(TypeError, match="data_range"):
        metrics.psnr(made, real)  # type: ignore[call-arg]


def test_ssim_of_a_film_is_the_mean_of_its_frames() -> None:
    real, made = _noise(1, 3, 4, 16, 16), _noise(1, 3, 4, 16, 16, seed=1)
    frames = [metrics.ssim(made[:, :, t], real[:, :, t], data_range=2.0) for t in range(4)]
    film = metrics.ssim(made, real, data_range=2.0)
    assert float(film) == pytest.approx(float(torch.stack(frames).mean()))
    assert metrics.ssim(real, real, data_range=2.0).tolist() == pytest.approx([1.0])


def test_a_picture_smaller_than_the_window_has_no_ssim() -> None:
    small = torch.zeros(2, 3, 10, 64)
    assert metrics.ssim(small, small, data_range=2.0).isnan().tolist() == [True, True]


def test_motion_psnr_sees_flicker_and_not_a_constant_shift() -> None:
    real = _noise(1, 1, 6, 8, 8) * 0.5
    flicker = torch.tensor([0.1, -0.1] * 3).view(1, 1, 6, 1, 1)
    shifted = metrics.motion_psnr(real + 0.1, real, data_range=2.0)
    flickering = metrics.motion_psnr(real + flicker, real, data_range=2.0)
    assert float(shifted) == metrics.CEILING
    assert float(flickering) == pytest.approx(10 * math.log10(4.0**2 / 0.2**2), abs=1e-3)
    assert math.isnan(float(metrics.motion_psnr(real[:, :, :1], real[:, :, :1], data_range=2.0)))


def test_si_sdr_of_an_orthogonal_error_is_the_ratio_of_energies() -> None:
    real, error = _sine(440), _sine(440, phase=math.pi / 2)
    for gain in (1.0, 0.01):  # the scale of the answer does not matter
        assert float(metrics.si_sdr(gain * (real + 0.1 * error), real)) == pytest.approx(20.0)
    assert float(metrics.si_sdr(real + 0.5, real)) == metrics.CEILING  # nor does an offset


def test_si_sdr_agrees_with_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.audio")
    real, made = _noise(3, 1, 4000), _noise(3, 1, 4000, seed=1) + _noise(3, 1, 4000)
    trusted = functional.scale_invariant_signal_distortion_ratio(
        made.double(), real.double(), zero_mean=True
    )
    assert torch.allclose(metrics.si_sdr(made, real), trusted[:, 0], atol=1e-4)


def test_si_sdr_at_the_edges() -> None:
    silence, sound = torch.zeros(1, 1, 100), _sine(500, count=100)
    assert math.isnan(float(metrics.si_sdr(sound, silence)))
    assert float(metrics.si_sdr(silence.double(), sound)) == -metrics.CEILING
    stereo = torch.cat([sound, sound], dim=1)
    half_silent = torch.cat([sound, torch.zeros_like(sound)], dim=1)
    assert float(metrics.si_sdr(half_silent, stereo)) == 0.0  # the mean of +100 and -100


@pytest.mark.parametrize(("rate", "window", "bands"), [(8000, 512, 20), (24000, 2048, 80)])
def test_mel_filters_agree_with_torchaudio(rate: int, window: int, bands: int) -> None:
    trusted = torchaudio.functional.melscale_fbanks(
        window // 2 + 1, 0.0, rate / 2, bands, rate, norm="slaney", mel_scale="slaney"
    )
    found = metrics.mel_filters(rate, window, bands)
    assert found.shape == (bands, window // 2 + 1)
    assert torch.allclose(found.float(), trusted.T, atol=1e-6)


def test_a_gain_of_ten_moves_each_spectral_distance_by_its_definition() -> None:
    real = _noise(2, 1, 16000) * 0.05
    made = real * 10
    # One unit of log10 in every cell above the floor; Slaney's filters put noise at 24 kHz there.
    found = metrics.log_spectral_distance(made, real)
    assert found.tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    loud = metrics.mel_distance(made, real, sample_rate=24000)
    # Empty filters (more bands than bins) stand at the floor in both and add nothing.
    cells = []
    for size, bands in metrics._MEL_SCALES:
        level = metrics.mel_filters(24000, size, bands) @ metrics.magnitudes(real, size)
        ratio = (10 * level).clamp_min(1e-5) / level.clamp_min(1e-5)
        cells.append(ratio.log10().flatten(1).mean(dim=1))
    assert torch.allclose(loud, torch.stack(cells).sum(dim=0))
    assert 4 < float(loud[0]) <= 7
    assert float(metrics.mel_distance(real, real, sample_rate=24000).abs().max()) == 0.0


def test_sounds_too_short_for_a_spectrum_are_not_defined() -> None:
    short = torch.zeros(2, 1, 200)
    assert metrics.mel_distance(short, short, sample_rate=8000).isnan().all()
    assert metrics.log_spectral_distance(short, short).isnan().all()


def test_bits_count_codes_and_leave_out_padding() -> None:
    codes = torch.tensor([[[5, 7, -1, -1]], [[1, 2, 3, 4]]])
    bits = metrics.code_bits(codes, 1024)
    assert bits.tolist() == [20.0, 40.0]
    assert metrics.bits_per_pixel(bits, torch.zeros(2, 3, 4, 5)).tolist() == [1.0, 2.0]
    # EnCodec at 24 kHz with 8 levels of 1024 codes, 75 frames a second: 6 kbit/s.
    sound = metrics.code_bits(torch.zeros(1, 8, 75, dtype=torch.int64), 1024)
    rate = metrics.kilobits_per_second(sound, torch.zeros(1, 1, 24000), 24000)
    assert rate.tolist() == [6.0]


def test_usage_is_taken_over_all_samples_whatever_their_grid() -> None:
    found = metrics.usage([torch.tensor([[[[0, 1], [2, 3]]]]), torch.tensor([[[[0, 1, 2, 3]]]])], 8)
    assert found.usage.tolist() == [0.5]
    assert found.perplexity.tolist() == pytest.approx([4.0])
    assert found.entropy.tolist() == pytest.approx([2.0])


def test_signals_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        metrics.psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9), data_range=2.0)
    with pytest.raises(ValueError, match="must be positive"):
        metrics.psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), data_range=0.0)
    with pytest.raises(ValueError, match="pictures or film"):
        metrics.ssim(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), data_range=2.0)
    with pytest.raises(ValueError, match="one shape"):
        metrics.si_sdr(torch.zeros(1, 1, 0), torch.zeros(1, 1, 0))
