"""Waveform from magnitudes alone: RTISI-LA (Zhu, Beauregard and Wyse, IEEE TASLP 15(5), 2007).

Frame after frame: a few frames ahead are refined together against what has been fixed already,
then the oldest is fixed and its hop of samples is final. Cost per frame is constant, output never
changes later, so the result does not depend on how much follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOOKAHEAD = 3  # frames; with 75% overlap every frame that touches the one being fixed
ITERATIONS = 6


def invert_magnitudes(magnitudes: Tensor, window: Tensor, hop: int) -> Tensor:
    """Magnitudes (B, bins, n) of causal frames -> waveform (B, n * hop).

    Args:
        magnitudes: non-negative; frame i covers samples up to (i + 1) * hop.
        window: (W,) the analysis window, W a multiple of hop.
        hop: samples between frames.
    """
    batch, _, count = magnitudes.shape
    size = len(window)
    # Least-squares synthesis (Griffin and Lim, 1984): sum of squared windows over all hops.
    weight = window.square().view(-1, hop).sum(0).clamp(min=1e-8).repeat(size // hop)
    synthesis = window / weight
    ahead = LOOKAHEAD + 1
    span = size + LOOKAHEAD * hop  # samples touched by the frames in work
    targets = torch.nn.functional.pad(magnitudes, (0, LOOKAHEAD)).transpose(1, 2)
    fixed = magnitudes.new_zeros(batch, span)  # overlap-add of frames already fixed
    frames = magnitudes.new_zeros(batch, ahead, size)  # windowed frames in work
    output = magnitudes.new_zeros(batch, count * hop)
    starts = [index * hop for index in range(ahead)]
    for number in range(count):
        target = targets[:, number : number + ahead]
        for _ in range(ITERATIONS):
            total = fixed.clone()
            for index, start in enumerate(starts):
                total[:, start : start + size] += frames[:, index]
            spectrum = torch.fft.rfft(total.unfold(-1, size, hop) * window)
            # A silent guess has no phase: zero phase, as the first frame needs some beginning.
            unit = torch.where(
                spectrum.abs() > 1e-9, spectrum / spectrum.abs().clamp(min=1e-9), 1.0 + 0.0j
            )
            frames = torch.fft.irfft(target * unit, n=size) * synthesis
        fixed[:, :size] += frames[:, 0]
        # No later frame reaches the oldest frame's first hop: these samples are final. They lie
        # size - hop samples before the hop that frame `number` ends with; _aligned makes up for it.
        output[:, number * hop : (number + 1) * hop] = fixed[:, :hop]
        fixed = torch.nn.functional.pad(fixed[:, hop:], (0, hop))
        frames = torch.nn.functional.pad(frames[:, 1:], (0, 0, 0, 1))
    return _aligned(output, fixed, size, hop)


def _aligned(output: Tensor, rest: Tensor, size: int, hop: int) -> Tensor:
    """Drop what lies before the sound's first sample; add the samples still in the buffer."""
    lead = size - hop
    return torch.cat([output, rest[:, :lead]], dim=1)[:, lead:]
