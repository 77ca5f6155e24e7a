"""Waveforms from magnitudes: consistent, aligned, and the same whatever follows."""

import io
import tarfile
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from unimm_tokenizers.audio.phase import LOOKAHEAD, invert_magnitudes

RATE, SIZE, HOP = 8000, 320, 80
WINDOW = torch.hann_window(SIZE)


def magnitudes(x: Tensor) -> Tensor:
    """(B, T) -> (B, bins, T / HOP); frame i ends with sample (i + 1) * HOP."""
    padded = torch.nn.functional.pad(x, (SIZE - HOP, 0))
    return torch.fft.rfft(padded.unfold(-1, SIZE, HOP) * WINDOW).abs().transpose(1, 2)


def voice(seconds: float, pitch: float = 120.0) -> Tensor:
    """A vowel as speech has it: gliding harmonics under two formants, syllables with pauses."""
    time = torch.arange(round(seconds * RATE)) / RATE
    phase = 2 * torch.pi * torch.cumsum(pitch * (1 + 0.1 * torch.sin(4 * time)), 0) / RATE
    sound = torch.zeros_like(time)
    for harmonic in range(1, 25):
        frequency = pitch * harmonic
        formants = sum(
            height / (1 + ((frequency - centre) / 150) ** 2)
            for centre, height in ((600, 1.0), (1700, 0.5))
        )
        sound += formants * torch.sin(harmonic * phase)
    syllables = (torch.sin(2 * torch.pi * 3 * time) > -0.5).float()
    smooth = torch.nn.functional.avg_pool1d(syllables[None, None], 401, 1, 200)[0, 0]
    return 0.5 * sound * smooth / sound.abs().max()


def convergence(x: Tensor, target: Tensor) -> Tensor:
    """Spectral convergence, per row: relative error of the magnitudes."""
    error = (magnitudes(x) - target).square().sum((1, 2)).sqrt()
    return error / target.square().sum((1, 2)).sqrt()


def test_magnitudes_are_met() -> None:
    sounds = torch.stack([voice(1.0), voice(1.0, 210.0)])
    target = magnitudes(sounds)
    made = invert_magnitudes(target, WINDOW, HOP)
    assert made.shape == sounds.shape
    assert convergence(made, target).max() < 0.1
    # Phase is what had to be found: without it the same magnitudes are far from met.
    assert convergence(torch.randn_like(sounds), target).min() > 0.5


def test_magnitudes_of_real_speech_are_met(shared_data: Path) -> None:
    """Spoken digits (FSDD): 0.051 on average over 20 of all speakers when this was written."""
    errors = []
    with tarfile.open(shared_data / "digits" / "fsdd.tar") as archive:
        sounds = [member for member in archive.getmembers() if member.name.endswith(".wav")]
        for member in sounds[::270]:
            file = archive.extractfile(member)
            assert file is not None
            samples, rate = soundfile.read(io.BytesIO(file.read()), dtype="float32")
            assert rate == RATE
            x = torch.from_numpy(samples[: len(samples) // HOP * HOP])[None]
            target = magnitudes(x)
            errors.append(convergence(invert_magnitudes(target, WINDOW, HOP), target))
    assert len(errors) == 10
    assert torch.cat(errors).mean() < 0.08


def test_it_is_aligned() -> None:
    """A click comes back where it was, and energy neither before nor late."""
    x = torch.zeros(1, 40 * HOP)
    x[0, 20 * HOP + 13] = 1.0
    made = invert_magnitudes(magnitudes(x), WINDOW, HOP)[0]
    assert made.shape == (40 * HOP,)
    assert abs(int(made.abs().argmax()) - (20 * HOP + 13)) <= HOP
    energy = made.square()
    near = energy[20 * HOP + 13 - SIZE : 20 * HOP + 13 + SIZE].sum()
    assert near > 0.95 * energy.sum()

    sound = torch.zeros(1, 8000)
    sound[0, 4000:] = voice(0.5)
    made = invert_magnitudes(magnitudes(sound), WINDOW, HOP)[0]
    assert made[: 4000 - SIZE].abs().max() < 1e-3
    envelope = made.square().unfold(0, HOP, HOP).sum(1)
    expected = sound[0].square().unfold(0, HOP, HOP).sum(1)
    shifts = {shift: float(envelope[8:-8] @ expected.roll(shift)[8:-8]) for shift in range(-4, 5)}
    assert max(shifts, key=lambda shift: shifts[shift]) == 0


def test_later_magnitudes_change_nothing_that_is_final() -> None:
    target = magnitudes(voice(0.5)[None])
    whole = invert_magnitudes(target, WINDOW, HOP)
    for count in (6, 20):
        part = invert_magnitudes(target[..., :count], WINDOW, HOP)
        final = (count - LOOKAHEAD) * HOP - (SIZE - HOP)
        assert part.shape == (1, count * HOP)
        torch.testing.assert_close(part[:, :final], whole[:, :final], rtol=0, atol=1e-6)


def test_rows_and_repeats_are_the_same() -> None:
    target = magnitudes(torch.stack([voice(0.3), voice(0.3, 210.0), torch.zeros(2400)]))
    together = invert_magnitudes(target, WINDOW, HOP)
    assert torch.equal(invert_magnitudes(target, WINDOW, HOP), together)
    for row in range(3):
        alone = invert_magnitudes(target[row : row + 1], WINDOW, HOP)
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)
    assert together[2].abs().max() == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_short_sounds(count: int) -> None:
    made = invert_magnitudes(torch.rand(2, SIZE // 2 + 1, count), WINDOW, HOP)
    assert made.shape == (2, count * HOP)
    assert bool(made.isfinite().all())


@pytest.mark.parametrize("overlap", [2, 4, 8])
def test_other_windows(overlap: int) -> None:
    window = torch.hann_window(overlap * 16)
    made = invert_magnitudes(torch.rand(1, overlap * 8 + 1, 12), window, 16)
    assert made.shape == (1, 12 * 16)
    assert bool(made.isfinite().all())
