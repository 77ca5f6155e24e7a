"""From logits to ids: penalty, temperature, top-k, top-p, min-p; one uniform number per draw.

A row's numbers come from its own seed alone, so what it samples does not depend on the batch.
Each modality has settings of its own; a row follows those of the item that it is writing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 128  # ids whose weights are summed before they are cumulated
_ALL = 1 << 40  # top_k where it is off


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How ids are drawn; filters apply in this order.

    repetition_penalty: logits of ids that stand in the prompt or the answer already are divided
    by it where positive, multiplied where negative; 1 is off (CTRL, arXiv 1909.05858, section
    4.1). temperature: 0 takes the most likely id. top_k: keep the k most likely. top_p: keep the
    most likely ones that together reach this probability (arXiv 1904.09751). min_p: keep those at
    least this share as likely as the most likely one (arXiv 2407.01082). guidance: scale of
    classifier-free guidance, 1 is off (Ho and Salimans, arXiv 2207.12598).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # nor what is no number
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty must be a number above 0, got {self.repetition_penalty}"
            )
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")


class Knobs(NamedTuple):
    """Settings of each row, (B,): floats, and top_k int64 (large where it is off)."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    guidance: Tensor


class Settings:
    """Settings of all modalities, looked up by row.

    Args:
        samplings: what holds for text and between items, then for each rule of the grammar.
        device: where the rows are drawn.

    Attributes:
        guided, penalised: whether any modality is guided, or has a repetition penalty.
    """

    def __init__(self, samplings: Sequence[Sampling], device: torch.device) -> None:
        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype)

        table = Knobs(
            column([s.temperature for s in samplings]),
            column([s.top_k or _ALL for s in samplings], torch.int64),
            column([1.0 if s.top_p is None else s.top_p for s in samplings], torch.float64),
            column([s.min_p or 0.0 for s in samplings]),
            column([s.repetition_penalty for s in samplings]),
            column([s.guidance for s in samplings]),
        )
        self.guided = bool((table.guidance != 1).any())
        self.penalised = bool((table.repetition_penalty != 1).any())
        self._greedy = bool((table.temperature == 0).all())
        self._warm = bool((table.temperature > 0).all())
        self._most = int(table.top_k.max())
        self._filtered = (
            self._most < _ALL
            or bool((table.top_k < _ALL).any())
            or bool((table.top_p < 1).any())
            or bool((table.min_p > 0).any())
        )
        self._table = Knobs(*(values.to(device) for values in table))

    @classmethod
    def of(
        cls, table: Mapping[str, Sampling], modalities: Sequence[str], device: torch.device
    ) -> Settings:
        """Settings from modality -> sampling; text comes first, then the grammar's modalities."""
        return cls([table[name] for name in ("text", *modalities)], device)

    def of_rows(self, kinds: Tensor) -> Knobs:
        """The settings of rows of kinds (B,), 0 for text and 1 + the rule's index for codes."""
        return Knobs(*(column[kinds] for column in self._table))

    def draw(self, logits: Tensor, uniform: Tensor, knobs: Knobs) -> Tensor:
        """One column per row.

        Args:
            logits: float32 (B, n), -inf where a row may not draw, one finite one at least.
            uniform: (B,) in [0, 1), the rows' random numbers.
            knobs: the rows' settings, from `of_rows`.

        Returns:
            int64 (B,).
        """
        if self._greedy:
            return logits.argmax(1)
        cool = knobs.temperature == 0
        heat = knobs.temperature if self._warm else torch.where(cool, 1.0, knobs.temperature)
        # 0 at most, so that no temperature overflows; the most likely id has weight 1.
        weights = ((logits - logits.amax(1, keepdim=True)) / heat[:, None]).exp_()
        if self._filtered:
            drawn = self._filtered_draw(weights, uniform, knobs)
        else:
            drawn = inverse_cdf(weights, uniform)
        return drawn if self._warm else torch.where(cool, logits.argmax(1), drawn)

    def _filtered_draw(self, weights: Tensor, uniform: Tensor, knobs: Knobs) -> Tensor:
        columns = weights.shape[1]
        total = weights.sum(1, dtype=torch.float64)[:, None]
        kept, order = weights.topk(min(self._most, columns), dim=1)
        before = kept.cumsum(1, dtype=torch.float64) - kept
        keep = before < knobs.top_p[:, None] * total  # of the whole, whatever top-k leaves of it
        keep &= torch.arange(kept.shape[1], device=kept.device) < knobs.top_k[:, None]
        keep &= kept >= knobs.min_p[:, None]
        keep[:, 0] = True  # top_p of 1e-300 keeps one all the same
        return order.gather(1, inverse_cdf(kept * keep, uniform)[:, None])[:, 0]


def guided(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Logits (B, n) pushed away from the unconditional ones by `scale`, a number or (B, 1)."""
    return unconditional + scale * (conditional - unconditional)


def penalised(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Logits (B, n) with those of ids that were `seen`, bool (B, n), lowered; penalty (B,)."""
    factor = penalty[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index whose share of the cumulated weights (B, n) holds `uniform` (B,).

    First among sums of 128 weights, then among those 128: cumulating 65,536 weights in double
    precision took 10 times as long as this.
    """
    short = -weights.shape[1] % _CHUNK
    chunks = F.pad(weights, (0, short)).view(len(weights), -1, _CHUNK)
    mass = chunks.sum(2, dtype=torch.float64)
    cumulated = mass.cumsum(1)
    mark = uniform.double()[:, None] * cumulated[:, -1:]
    chunk = _first_above(cumulated, mass, mark)
    begins = (cumulated - mass).gather(1, chunk)
    inside = chunks.gather(1, chunk[:, :, None].expand(-1, -1, _CHUNK))[:, 0].double()
    within = _first_above(inside.cumsum(1), inside, (mark - begins).clamp(min=0))
    return (chunk * _CHUNK + within)[:, 0]


def _first_above(cumulated: Tensor, weights: Tensor, mark: Tensor) -> Tensor:
    """(B, 1): first index whose cumulated weight exceeds the mark (B, 1), of positive weight."""
    index = torch.searchsorted(cumulated, mark, right=True)
    # Rounding can put the mark past the last one of positive weight: take that one then.
    last = weights.shape[1] - 1 - (weights.flip(1) > 0).long().argmax(1, keepdim=True)
    return torch.minimum(index, last)
