"""What sounds lost: SI-SDR, mel distance, multi-resolution STFT distance, log-spectral distance.

SI-SDR (Le Roux et al., arXiv 1811.02508); mel distance (Kumar et al., arXiv 2306.06546: seven
scales, log10 of magnitudes, L1, summed); STFT distance (Yamamoto et al., arXiv 1910.11480: spectral
convergence plus L1 of log magnitudes, mean of three resolutions); log-spectral distance (Gray and
Markel 1976). All take (B, C, T) float and give (B,) float64; NaN where a measure is not defined.
"""

from __future__ import annotations

from functools import lru_cache
from math import log

import torch
from torch import Tensor

from unimm.evaluation.metrics.common import CEILING, check, undefined

_MEL_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))
_STFT_SIZES = (512, 1024, 2048)
_FLOOR = 1e-5  # of magnitudes, as in the mel distance's published settings


def si_sdr(made: Tensor, real: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB within [-100, 100], channels averaged.

    Both are made zero-mean. NaN where a channel of the real sound is constant (silence).
    """
    check(made, real)
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
    check(made, real)
    if made.shape[-1] <= _MEL_SCALES[-1][0] // 2:
        return undefined(made)
    total = torch.zeros(len(made), dtype=torch.float64)
    for size, bands in _MEL_SCALES:
        filters = mel_filters(sample_rate, size, bands)
        levels = [(filters @ magnitudes(x, size)).clamp_min(_FLOOR).log10() for x in (made, real)]
        total += (levels[0] - levels[1]).abs().flatten(1).mean(dim=1)
    return total


def stft_distance(made: Tensor, real: Tensor) -> Tensor:
    """Spectral convergence plus mean |ln| ratio of magnitudes, mean over three resolutions.

    Windows of 512, 1024 and 2048 samples, hop a quarter. NaN for 1024 samples or fewer, and for a
    silent original.
    """
    check(made, real)
    if made.shape[-1] <= _STFT_SIZES[-1] // 2:
        return undefined(made)
    total = torch.zeros(len(made), dtype=torch.float64)
    for size in _STFT_SIZES:
        x, y = magnitudes(made, size).flatten(1), magnitudes(real, size).flatten(1)
        convergence = (x - y).norm(dim=1) / y.norm(dim=1)
        ratio = x.clamp_min(_FLOOR).log() - y.clamp_min(_FLOOR).log()
        total += convergence + ratio.abs().mean(dim=1)
    return (total / len(_STFT_SIZES)).masked_fill(~total.isfinite(), float("nan"))


def log_spectral_distance(made: Tensor, real: Tensor, *, window: int = 512) -> Tensor:
    """Root mean square over frequency of the difference of power spectra in dB, frames averaged.

    NaN where the sound is not longer than half a window.
    """
    check(made, real)
    if made.shape[-1] <= window // 2:
        return undefined(made)
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


@lru_cache(maxsize=32)
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
