import math

import pytest
import torch
import torchaudio
from torch import Tensor

from unimm.evaluation import metrics
from unimm.evaluation.metrics import sound

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


def test_ssim_and_psnr_agree_with_scikit_image() -> None:
    trusted = pytest.importorskip("skimage.metrics")
    real = _noise(2, 3, 40, 33)
    made = (real + 0.2 * _noise(2, 3, 40, 33, seed=1)).clamp(-1, 1)
    for index in range(2):
        a, b = (x[index].permute(1, 2, 0).double().numpy() for x in (made, real))
        wanted = trusted.structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=2.0,
            channel_axis=-1,
        )
        found = metrics.ssim(made, real, data_range=2.0)[index]
        assert float(found) == pytest.approx(wanted, abs=1e-4)
        wanted = trusted.peak_signal_noise_ratio(b, a, data_range=2.0)
        found = metrics.psnr(made, real, data_range=2.0)[index]
        assert float(found) == pytest.approx(wanted, abs=1e-4)


def test_ms_ssim_agrees_with_torchmetrics_on_windows_that_lie_inside() -> None:
    """torchmetrics reflects the border at the coarsest scale: its windows there are cut off."""
    functional = pytest.importorskip("torchmetrics.functional.image")
    real = torch.nn.functional.interpolate(_noise(2, 1, 24, 24), (192, 208), mode="bicubic")
    real = real.clamp(-1, 1).double()
    made = (real + 0.2 * _noise(2, 1, 192, 208, seed=1)).clamp(-1, 1)
    product = torch.ones(2, dtype=torch.float64)
    x, y = made, real
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        similarity = functional.structural_similarity_index_measure
        if scale < 4:
            _, terms = similarity(
                x, y, data_range=2.0, reduction="none", return_contrast_sensitivity=True
            )
            term = terms
            x, y = (torch.nn.functional.avg_pool2d(z, 2) for z in (x, y))
        else:
            _, windows = similarity(x, y, data_range=2.0, return_full_image=True)
            term = windows[..., 5:-5, 5:-5].flatten(1).mean(dim=1)
        product *= term**weight
    assert torch.allclose(metrics.ms_ssim(made, real, data_range=2.0), product, atol=1e-4)
    assert metrics.ms_ssim(real, real, data_range=2.0).tolist() == pytest.approx([1.0, 1.0])
    small = _noise(1, 1, 175, 300)
    assert metrics.ms_ssim(small, small, data_range=2.0).isnan().all()


def test_both_similarities_are_those_taken_alone() -> None:
    real = _noise(1, 3, 180, 200)
    made = (real + 0.1 * _noise(1, 3, 180, 200, seed=1)).clamp(-1, 1)
    alone, scales = metrics.both_ssim(made, real, data_range=2.0)
    assert torch.equal(alone, metrics.ssim(made, real, data_range=2.0))
    assert torch.equal(scales, metrics.ms_ssim(made, real, data_range=2.0))
    small = metrics.both_ssim(made[..., :100], real[..., :100], data_range=2.0)
    assert not small[0].isnan().any()
    assert small[1].isnan().all()


def test_values_outside_the_stated_range_are_refused() -> None:
    """8-bit values with the range of [-1, 1] would give a PSNR that means nothing."""
    real = (_noise(1, 3, 16, 16) + 1) * 127.5
    with pytest.raises(ValueError, match="state the range that the values really have"):
        metrics.psnr(real, real, data_range=2.0)
    with pytest.raises(ValueError, match="state the range that the values really have"):
        metrics.ssim(real, real, data_range=1.0)
    assert float(metrics.psnr(real, real, data_range=255.0)) == metrics.CEILING


def test_the_range_does_not_change_a_figure_that_is_right() -> None:
    real, made = _noise(1, 3, 24, 24), _noise(1, 3, 24, 24, seed=1)
    for name in ("psnr", "ssim"):
        measure = getattr(metrics, name)
        signed = measure(made, real, data_range=2.0)
        unit = measure((made + 1) / 2, (real + 1) / 2, data_range=1.0)
        assert float(unit) == pytest.approx(float(signed), abs=1e-4 if name == "psnr" else 0.02)


def test_gradient_and_block_spectra_see_blur_and_not_a_shift_of_grey() -> None:
    real = _noise(1, 1, 32, 32) * 0.5
    blurred = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
    for measure in (metrics.gradient_distance, metrics.dct_distance):
        assert float(measure(real + 0.25, real)) == pytest.approx(0, abs=1e-3)
        assert float(measure(blurred, real)) > 10 * float(measure(real + 0.25, real)) + 0.01
    assert metrics.dct_distance(real[..., :7], real[..., :7]).isnan().all()


def test_a_block_spectrum_is_that_of_its_cosine() -> None:
    place = (torch.arange(8) + 0.5) * math.pi / 8
    real = 0.1 * torch.cos(2 * place).expand(8, 8)[None, None]
    # One coefficient of 0.1 * 4 rises tenfold: 20 dB in one of 63.
    assert float(metrics.dct_distance(10 * real, real)) == pytest.approx(20 / 63, rel=1e-4)


def test_the_worst_frame_is_the_one_that_lost_most() -> None:
    real = torch.zeros(1, 1, 3, 4, 4)
    made = real.clone()
    made[:, :, 1], made[:, :, 2] = 0.1, 0.2
    found = metrics.worst_frame_psnr(made, real, data_range=2.0)
    assert float(found) == pytest.approx(10 * math.log10(4 / 0.04))


def test_stft_distance_is_its_definition() -> None:
    real = _noise(1, 1, 6000)
    made = real * 10
    # Convergence |10 - 1| and |ln 10|, at every resolution.
    assert float(metrics.stft_distance(made, real)) == pytest.approx(9 + math.log(10), rel=1e-4)
    assert metrics.stft_distance(real, torch.zeros_like(real)).isnan().all()
    assert metrics.stft_distance(real[..., :1024], real[..., :1024]).isnan().all()


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
    for size, bands in sound._MEL_SCALES:
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
