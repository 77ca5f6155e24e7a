"""What a reconstruction lost, by measures that need no weights, and what its codes cost.

`MEASURES` names every measure, its unit and its better direction; `of_modality` says which apply.
Each function gives one number per sample, (B,) float64; averages are taken once, over samples.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from unimm.evaluation.metrics.codes import (
    bits_per_pixel,
    code_bits,
    kilobits_per_second,
    usage,
)
from unimm.evaluation.metrics.common import CEILING
from unimm.evaluation.metrics.image import (
    both_ssim,
    dct_distance,
    gradient_distance,
    motion_psnr,
    ms_ssim,
    psnr,
    ssim,
    worst_frame_psnr,
)
from unimm.evaluation.metrics.sound import (
    log_spectral_distance,
    magnitudes,
    mel_distance,
    mel_filters,
    si_sdr,
    stft_distance,
)

__all__ = [
    "CEILING",
    "CODEC_RANGE",
    "MEASURES",
    "Measure",
    "bits_per_pixel",
    "both_ssim",
    "code_bits",
    "dct_distance",
    "gradient_distance",
    "kilobits_per_second",
    "log_spectral_distance",
    "magnitudes",
    "measure",
    "mel_distance",
    "mel_filters",
    "motion_psnr",
    "ms_ssim",
    "psnr",
    "si_sdr",
    "ssim",
    "stft_distance",
    "usage",
    "worst_frame_psnr",
]

CODEC_RANGE = 2.0  # of the signals that codecs take, [-1, 1]


class Measure(NamedTuple):
    """Name and unit in tables, and whether more is better."""

    label: str
    more_is_better: bool


MEASURES: dict[str, Measure] = {
    "psnr": Measure("PSNR, dB", True),
    "ssim": Measure("SSIM", True),
    "ms_ssim": Measure("MS-SSIM", True),
    "gradient_distance": Measure("gradient distance", False),
    "dct_distance": Measure("DCT distance, dB", False),
    "worst_frame_psnr": Measure("PSNR of the worst frame, dB", True),
    "motion_psnr": Measure("motion PSNR, dB", True),
    "si_sdr": Measure("SI-SDR, dB", True),
    "mel_distance": Measure("mel distance", False),
    "stft_distance": Measure("STFT distance", False),
    "log_spectral_distance": Measure("log-spectral distance, dB", False),
    "pesq_wb": Measure("PESQ, wide band", True),
    "pesq_nb": Measure("PESQ, narrow band", True),
    "stoi": Measure("STOI", True),
    "visqol": Measure("ViSQOL", True),
    "lpips_alex": Measure("LPIPS, AlexNet", False),
    "lpips_vgg": Measure("LPIPS, VGG", False),
    "wer": Measure("word error rate", False),
    "utmos": Measure("UTMOS", True),
    "rfid": Measure("rFID", False),
    "rfvd": Measure("rFVD", False),
    "bits_per_pixel": Measure("bits per pixel", False),
    "kbps": Measure("kbit/s", False),
}


def measure(modality: str, made: Tensor, real: Tensor, sample_rate: int) -> dict[str, float]:
    """The weight-free measures of one sample: signals (1, C, *signal) in [-1, 1].

    `sample_rate` is that of sounds, Hz.
    """
    if modality == "audio":
        values = {
            "si_sdr": si_sdr(made, real),
            "mel_distance": mel_distance(made, real, sample_rate=sample_rate),
            "stft_distance": stft_distance(made, real),
            "log_spectral_distance": log_spectral_distance(made, real),
        }
    elif modality == "video":
        values = {
            "psnr": psnr(made, real, data_range=CODEC_RANGE),
            "ssim": ssim(made, real, data_range=CODEC_RANGE),
            "worst_frame_psnr": worst_frame_psnr(made, real, data_range=CODEC_RANGE),
            "motion_psnr": motion_psnr(made, real, data_range=CODEC_RANGE),
        }
    else:
        single, scales = both_ssim(made, real, data_range=CODEC_RANGE)
        values = {
            "psnr": psnr(made, real, data_range=CODEC_RANGE),
            "ssim": single,
            "ms_ssim": scales,
            "gradient_distance": gradient_distance(made, real),
            "dct_distance": dct_distance(made, real),
        }
    return {name: float(value) for name, value in values.items()}
