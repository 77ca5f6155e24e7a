"""PESQ, STOI and ViSQOL as their packages give them, at the rates that they are defined for."""

import math

import pytest
import torch
import torchaudio

from unimm.evaluation.reconstruction import Protocol, make_sample, run
from unimm.evaluation.reconstruction.extras import speech_quality, unavailable
from unimm.signals import Audio
from unimm_tokenizers.adapters import classical


def speech(seconds: float = 3.0, rate: int = 16000) -> torch.Tensor:
    """Bursts of a harmonic tone, four a second, as syllables come: (1, 1, T)."""
    time = torch.arange(round(seconds * rate)) / rate
    tone = sum(torch.sin(2 * math.pi * 140 * k * time) / k for k in range(1, 20))
    envelope = torch.sin(2 * math.pi * 2 * time).square() * (time % 1 > 0.2)
    return (0.2 * tone * envelope)[None, None]  # type: ignore[operator]


REAL = speech()
MADE = REAL + 0.02 * torch.randn(REAL.shape, generator=torch.Generator().manual_seed(0))


def test_pesq_is_the_packages_own_in_either_band() -> None:
    pesq = pytest.importorskip("pesq").pesq
    real, made = REAL[0, 0].numpy(), MADE[0, 0].numpy()
    assert speech_quality("pesq_wb", MADE, REAL, 16000) == pesq(16000, real, made, "wb")
    low = [torchaudio.functional.resample(x[0, 0], 16000, 8000).numpy() for x in (REAL, MADE)]
    assert speech_quality("pesq_nb", MADE, REAL, 16000) == pesq(8000, *low, "nb")
    assert speech_quality("pesq_wb", REAL, REAL, 16000) > 4.5


def test_stoi_is_the_packages_own() -> None:
    stoi = pytest.importorskip("pystoi").stoi
    real, made = REAL[0, 0].numpy(), MADE[0, 0].numpy()
    assert speech_quality("stoi", MADE, REAL, 16000) == pytest.approx(stoi(real, made, 16000))


def test_visqol_hears_noise() -> None:
    pytest.importorskip("visqol")
    clean, noisy = (speech_quality("visqol", x, REAL, 16000) for x in (REAL, MADE))
    assert 1 <= noisy < clean <= 5


def test_wide_band_is_never_taken_of_narrow_sound() -> None:
    with pytest.raises(ValueError, match="pesq_wb needs sound at 16000 Hz or more"):
        speech_quality("pesq_wb", MADE, REAL, 8000)
    assert unavailable("pesq_nb", 4000) == (
        "pesq_nb needs sound at 8000 Hz or more, the protocol has 4000"
    )


@pytest.mark.parametrize("name", ["pesq_wb", "stoi"])
def test_silence_and_scraps_have_no_value(name: str) -> None:
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    silence = torch.zeros(1, 1, 16000)
    assert math.isnan(speech_quality(name, silence, silence, 16000))
    assert math.isnan(speech_quality(name, MADE[..., :1500], REAL[..., :1500], 16000))


def test_music_is_no_speech() -> None:
    pytest.importorskip("pesq")
    samples = [make_sample(key, Audio(REAL[0], 16000)) for key in ("speech-1", "music-1")]
    results = run({"opus": classical("opus:24")}, samples, Protocol(extras=("pesq_wb",)))
    [summary] = results.summaries
    assert summary.means["pesq_wb"].count == 1
    assert summary.undefined == {"pesq_wb": 1}
    assert math.isnan(results.rows[1].values["pesq_wb"])
