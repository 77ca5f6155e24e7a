"""Waveform from magnitudes alone: RTISI-LA (Zhu, Beauregard and Wyse, IEEE TASLP 15(5), 2007).

Frame after frame: a few frames ahead are refined together against what has been fixed already,
then the oldest is fixed and its hop of samples is final. Cost per frame is constant, output never
changes later, so the result does not depend on how much follows, and a stream that goes on from a
state gives what the whole would have given, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LOOKAHEAD = 3  # frames; with 75% overlap every frame that touches the one being fixed
ITERATIONS = 6


class PhaseState(NamedTuple):
    """What an inversion that goes on must know.

    fixed: (B, span) overlap-add of the frames that are final.
    frames: (B, LOOKAHEAD + 1, W) windowed frames in work.
    waiting: (B, n, bins) magnitudes that wait for those that follow them, n <= LOOKAHEAD.
    lead: samples still to come that lie before the sound's first one.
    """

    fixed: Tensor
    frames: Tensor
    waiting: Tensor
    lead: int


def delay(size: int, hop: int) -> int:
    """Samples by which the sound comes after its magnitudes."""
    return size - hop + LOOKAHEAD * hop


def start(batch: int, size: int, hop: int, like: Tensor) -> PhaseState:
    """The state before a sound's first frame; device and dtype are those of `like`."""
    return PhaseState(
        like.new_zeros(batch, size + LOOKAHEAD * hop),
        like.new_zeros(batch, LOOKAHEAD + 1, size),
        like.new_zeros(batch, 0, size // 2 + 1),
        size - hop,
    )


def invert_magnitudes(magnitudes: Tensor, window: Tensor, hop: int) -> Tensor:
    """Magnitudes (B, bins, n) of causal frames -> waveform (B, n * hop).

    Args:
        magnitudes: non-negative; frame i covers samples up to (i + 1) * hop.
        window: (W,) the analysis window, W a multiple of hop.
        hop: samples between frames.
    """
    state = start(len(magnitudes), len(window), hop, magnitudes)
    return invert_chunk(magnitudes, window, hop, state, last=True)[0]


def invert_chunk(
    magnitudes: Tensor, window: Tensor, hop: int, state: PhaseState, *, last: bool = False
) -> tuple[Tensor, PhaseState]:
    """The next magnitudes of a sound -> the samples (B, n) that are final now, and the next state.

    Args:
        magnitudes: (B, bins, n), see `invert_magnitudes`.
        window, hop: see `invert_magnitudes`.
        state: from `start`, or from the chunk before.
        last: nothing follows: give out all that is left.
    """
    size = len(window)
    # Least-squares synthesis (Griffin and Lim, 1984): sum of squared windows over all hops.
    weight = window.square().view(-1, hop).sum(0).clamp(min=1e-8).repeat(size // hop)
    synthesis = window / weight
    targets = torch.cat([state.waiting, magnitudes.transpose(1, 2)], dim=1)
    if last:
        targets = F.pad(targets, (0, 0, 0, LOOKAHEAD))
    count = max(0, targets.shape[1] - LOOKAHEAD)
    fixed, frames = state.fixed, state.frames
    hops = []
    for number in range(count):
        target = targets[:, number : number + LOOKAHEAD + 1]
        frames = _refined(target, fixed, frames, window, synthesis)
        fixed = torch.cat([fixed[:, :size] + frames[:, 0], fixed[:, size:]], dim=1)
        # No later frame reaches the oldest frame's first hop: these samples are final. They lie
        # size - hop samples before the hop that frame `number` ends with; `lead` makes up for it.
        hops.append(fixed[:, :hop].clone())  # a view would keep every hop's `fixed`
        fixed = F.pad(fixed[:, hop:], (0, hop))
        frames = F.pad(frames[:, 1:], (0, 0, 0, 1))
    if last:
        hops.append(fixed[:, : size - hop])
    made = torch.cat(hops, dim=1) if hops else fixed[:, :0]
    early = min(state.lead, made.shape[1])
    kept = PhaseState(fixed, frames, targets[:, count:].clone(), state.lead - early)
    return made[:, early:], kept


def _refined(
    target: Tensor, fixed: Tensor, frames: Tensor, window: Tensor, synthesis: Tensor
) -> Tensor:
    """Frames in work (B, LOOKAHEAD + 1, W) after all rounds against their target magnitudes."""
    # Rounding errors grow from frame to frame until the sound is another one, so none may depend on
    # the batch: only single additions, products, roots and quotients, which are rounded alike in
    # vectors and alone (a complex absolute value is not), and transforms of single rows.
    size = len(window)
    hop = (fixed.shape[1] - size) // LOOKAHEAD
    zero_phase = window.new_tensor([1.0, 0.0])
    for _ in range(ITERATIONS):
        total = fixed.clone()
        for index in range(LOOKAHEAD + 1):
            total[:, index * hop : index * hop + size] += frames[:, index]
        spectrum = torch.view_as_real(torch.fft.rfft(total.unfold(-1, size, hop) * window))
        length = (spectrum[..., 0].square() + spectrum[..., 1].square()).sqrt()
        # A silent guess has no phase: zero phase, as the first frame needs some beginning.
        unit = torch.where(
            (length > 1e-9)[..., None], spectrum / length.clamp(min=1e-9)[..., None], zero_phase
        )
        aimed = torch.view_as_complex(target[..., None] * unit)
        frames = torch.fft.irfft(aimed, n=size) * synthesis
    return frames
