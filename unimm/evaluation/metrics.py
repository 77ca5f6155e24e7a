"""What a reconstruction lost, by measures that need no weights.

Pictures and film: PSNR; SSIM (Wang et al. 2004: Gaussian 11x11 window of sigma 1.5, K 0.01 and
0.03, only windows that lie inside the picture). Sound: SI-SDR (Le Roux et al., arXiv 1811.02508);
mel distance (Kumar et al., arXiv 2306.06546: seven scales, log10 of magnitudes, L1, summed);
log-spectral distance (Gray and Markel 1976). Codes: bits per pixel, kbit/s, usage.

All take (B, C, *signal) float and give one number per sample, (B,) float64, never a mean over the
batch: averages are taken once, over samples. `data_range` has no default: the largest minus the
smallest value that a signal can have, 2.0 for [-1, 1]; a wrong one inflates PSNR and SSIM. NaN
says that a measure is not defined for a sample (each says when), so that it can be counted.
"""

from __future__ import annotations

from math import log, log2

import torch
import torch.nn.functional as F
from torch import Tensor

from unimm_tokenizers.codec import Codec
from unimm_tokenizers.quantize.base import CodeUsage, code_usage

CODEC_RANGE = 2.0  # of the signals that codecs take, [-1, 1]
# measure -> (its name and unit in tables, whether more is better)
MEASURES = {
    "psnr": ("PSNR, dB", True),
    "ssim": ("SSIM", True),
    "motion_psnr": ("motion PSNR, dB", True),
    "si_sdr": ("SI-SDR, dB", True),
    "mel_distance": ("mel distance", False),
    "log_spectral_distance": ("log-spectral distance, dB", False),
    "bits_per_pixel": ("bits per pixel", False),
    "kbps": ("kbit/s", False),
}
OF_MODALITY = {
    "image": ("psnr", "ssim", "bits_per_pixel"),
    "semantic": ("psnr", "ssim", "bits_per_pixel"),
    "video": ("psnr", "ssim", "motion_psnr", "bits_per_pixel"),
    "audio": ("si_sdr", "mel_distance", "log_spectral_distance", "kbps"),
}
CEILING = 100.0  # dB, of an exact copy: a mean over samples stays a number
_WINDOW, _SIGMA = 11, 1.5
_MEL_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))
_FLOOR = 1e-5  # of magnitudes, as in the mel distance's published settings


def measure(
    modality: str, made: Tensor, real: Tensor, codes: Tensor, codec: Codec
) -> dict[str, float]:
    """Every measure of a modality for one sample: signals (1, C, *signal), codes (1, K, *grid)."""
    bits = code_bits(codes, codec.codebook_size)
    if modality == "audio":
        rate = codec.sample_rate
        assert rate is not None, "a sound codec has a sample rate"
        values = {
            "si_sdr": si_sdr(made, real),
            "mel_distance": mel_distance(made, real, sample_rate=rate),
            "log_spectral_distance": log_spectral_distance(made, real),
            "kbps": kilobits_per_second(bits, real, rate),
        }
    else:
        values = {
            "psnr": psnr(made, real, data_range=CODEC_RANGE),
            "ssim": ssim(made, real, data_range=CODEC_RANGE),
            "bits_per_pixel": bits_per_pixel(bits, real),
        }
        if modality == "video":
            values["motion_psnr"] = motion_psnr(made, real, data_range=CODEC_RANGE)
    return {name: float(value) for name, value in values.items()}


def psnr(made: Tensor, real: Tensor, *, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio in dB, at most 100; of film over all its frames.

    Raises:
        ValueError: the shapes differ, or data_range is not positive.
    """
    _check(made, real)
    _check_range(data_range)
    error = (made.double() - real.double()).square().flatten(1).mean(dim=1)
    ratio = data_range**2 / error.clamp_min(data_range**2 * 10 ** (-CEILING / 10))
    return 10 * torch.log10(ratio)


def ssim(made: Tensor, real: Tensor, *, data_range: float) -> Tensor:
    """Structural similarity, at most 1: the mean over channels, frames and windows.

    Pictures (B, C, H, W) or film (B, C, T, H, W); NaN where a side is shorter than 11.

    Raises:
        ValueError: the shapes differ or are neither, or data_range is not positive.
    """
    _check(made, real)
    _check_range(data_range)
    if made.ndim not in (4, 5):
        raise ValueError(f"ssim: expected pictures or film, got shape {tuple(made.shape)}")
    batch, (height, width) = made.shape[0], made.shape[-2:]
    if min(height, width) < _WINDOW:
        return torch.full((batch,), float("nan"), dtype=torch.float64)
    x = made.double().reshape(-1, 1, height, width)
    y = real.double().reshape(-1, 1, height, width)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x.square()
    var_y = _blur(y * y) - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).reshape(batch, -1).mean(dim=1)


def motion_psnr(made: Tensor, real: Tensor, *, data_range: float) -> Tensor:
    """PSNR of the differences of neighbouring frames, (B, C, T, H, W): flicker shows here.

    NaN for a film of one frame. Differences span twice the signal's range.
    """
    _check(made, real)
    if made.ndim != 5:
        raise ValueError(f"motion_psnr: expected film, got shape {tuple(made.shape)}")
    if made.shape[2] < 2:
        return torch.full((len(made),), float("nan"), dtype=torch.float64)
    return psnr(made.diff(dim=2), real.diff(dim=2), data_range=2 * data_range)


def si_sdr(made: Tensor, real: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB within [-100, 100], channels averaged.

    Both are made zero-mean. NaN where a channel of the real sound is constant (silence).
    """
    _check(made, real)
    x = made.double() - made.double().mean(dim=-1, keepdim=True)
    y = real.double() - real.double().mean(dim=-1, keepdim=True)
    energy = y.square().sum(dim=-1)
    target = (x * y).sum(dim=-1, keepdim=True) / energy.unsqueeze(-1) * y
    wanted, rest = target.square().sum(dim=-1), (x - target).square().sum(dim=-1)
    ratio = 10 * torch.log10(wanted / rest)
    # 0 / 0: a silent answer to a sound holds nothing of it.
    ratio = ratio.nan_to_num(nan=-CEILING, posinf=CEILING, neginf=-CEILING)
    return ratio.clamp(-CEILING, CEILING).masked_fill(energy <= 1e-20, float("nan")).mean(dim=1)


def mel_distance(made: Tensor, real: Tensor, *, sample_rate: int) -> Tensor:
    """Sum over seven scales of the mean distance of log10 mel magnitudes; 0 for an exact copy.

    Windows of 32 to 2048 samples with 5 to 320 bands, hop a quarter of the window. Depends on the
    sample rate: compare only at one rate. NaN for 1024 samples or fewer.
    """
    _check(made, real)
    if made.shape[-1] <= _MEL_SCALES[-1][0] // 2:
        return torch.full((len(made),), float("nan"), dtype=torch.float64)
    total = torch.zeros(len(made), dtype=torch.float64)
    for size, bands in _MEL_SCALES:
        filters = mel_filters(sample_rate, size, bands)
        levels = [(filters @ magnitudes(x, size)).clamp_min(_FLOOR).log10() for x in (made, real)]
        total += (levels[0] - levels[1]).abs().flatten(1).mean(dim=1)
    return total


def log_spectral_distance(made: Tensor, real: Tensor, *, window: int = 512) -> Tensor:
    """Root mean square over frequency of the difference of power spectra in dB, frames averaged.

    NaN where the sound is not longer than half a window.
    """
    _check(made, real)
    if made.shape[-1] <= window // 2:
        return torch.full((len(made),), float("nan"), dtype=torch.float64)
    levels = [20 * magnitudes(x, window).clamp_min(_FLOOR).log10() for x in (made, real)]
    return (levels[0] - levels[1]).square().mean(dim=-2).sqrt().flatten(1).mean(dim=1)


def magnitudes(x: Tensor, window: int) -> Tensor:
    """Magnitude spectrogram (B, C, window // 2 + 1, frames) of sound (B, C, T), hop window / 4."""
    spectrum = torch.stft(
        x.detach().cpu().double().flatten(0, 1),
        window,
        window // 4,
        window=torch.hann_window(window, dtype=torch.float64),
        return_complex=True,
    )
    return spectrum.abs().unflatten(0, x.shape[:2])


def mel_filters(sample_rate: int, window: int, bands: int) -> Tensor:
    """Triangular mel filters (bands, window // 2 + 1), Slaney's scale, each of unit area.

    Slaney 1998, "Auditory Toolbox": linear to 1 kHz, logarithmic above.
    """

    def to_mel(hertz: Tensor) -> Tensor:
        above = 15 + 27 * torch.log(hertz.clamp_min(1000) / 1000) / log(6.4)
        return torch.where(hertz < 1000, hertz * 3 / 200, above)

    def to_hertz(mel: Tensor) -> Tensor:
        above = 1000 * torch.exp((mel.clamp_min(15) - 15) * log(6.4) / 27)
        return torch.where(mel < 15, mel * 200 / 3, above)

    nyquist = torch.tensor(sample_rate / 2, dtype=torch.float64)
    edges = to_hertz(torch.linspace(0, float(to_mel(nyquist)), bands + 2, dtype=torch.float64))
    hertz = torch.linspace(0, float(nyquist), window // 2 + 1, dtype=torch.float64)
    low, middle, high = (edges[i : i + bands, None] for i in range(3))
    rising, falling = (hertz - low) / (middle - low), (high - hertz) / (high - middle)
    return torch.minimum(rising, falling).clamp_min(0) * 2 / (high - low)


def code_bits(codes: Tensor, codebook_size: int) -> Tensor:
    """Bits of each sample's codes (B, K, *grid) at fixed length; padding (negative) is free."""
    return (codes >= 0).flatten(1).sum(dim=1).double() * log2(codebook_size)


def bits_per_pixel(bits: Tensor, signal: Tensor) -> Tensor:
    """Bits (B,) over the pixels of pictures or film (B, C, *signal)."""
    return bits / signal[0, 0].numel()


def kilobits_per_second(bits: Tensor, signal: Tensor, sample_rate: int) -> Tensor:
    """Bits (B,) over the duration of sounds (B, C, T), in kbit/s."""
    return bits / 1000 / (signal.shape[-1] / sample_rate)


def usage(codes: list[Tensor], codebook_size: int) -> CodeUsage:
    """Usage, perplexity and entropy per level (K,), over the codes (B, K, *grid) of all samples."""
    flat = torch.cat([code.movedim(1, 0).flatten(1) for code in codes], dim=1)
    return code_usage(flat[None], codebook_size)


def _blur(x: Tensor) -> Tensor:
    """Gaussian means of x (N, 1, H, W) float64 over the windows that lie inside."""
    offset = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weight = torch.exp(-offset.square() / (2 * _SIGMA**2))
    weight = weight / weight.sum()
    return F.conv2d(F.conv2d(x, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))


def _check(made: Tensor, real: Tensor) -> None:
    if made.shape != real.shape or made.ndim < 3 or not made.numel():
        raise ValueError(
            f"metrics: expected two signals of one shape (B, C, *signal), got "
            f"{tuple(made.shape)} and {tuple(real.shape)}"
        )


def _check_range(data_range: float) -> None:
    if not data_range > 0:
        raise ValueError(f"metrics: data_range must be positive, got {data_range}")
