"""The adversary of a codec: discriminators, and what keeps them from running away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from unimm_tokenizers.discriminators import Discriminator
from unimm_tokenizers.losses import (
    LeCam,
    discriminator_hinge,
    feature_distance,
    generator_hinge,
    r1_penalty,
)

Pairs = Sequence[tuple[Tensor, Tensor]]  # (made, real), each (B, C, *signal)


class Adversary(nn.Module):
    """Discriminators against which a codec trains, by hinge losses of a small, fixed weight.

    The weight is fixed, and felt from the first step on: the adaptive one of VQGAN needs a second
    backward pass and breaks under checkpointing, and an adversary that joins a trained codec late
    wrecks it (taming-transformers issue 44).

    Args:
        discriminators: one for frames, one for motion, and so on; each scores what it accepts.
        weight: of the hinge loss in the codec's loss (Open-MAGVIT2 and IBQ: 0.1).
        start: first step at which the codec feels it; the discriminators train from step 0.
        lecam: weight of LeCAM in the discriminators' loss (Open-MAGVIT2: 0.05); 0 for none.
        r1: weight of the gradient penalty in it; 0 for none.
        r1_every: steps from one penalty to the next, which counts that many times.
        matching: weight, beside the hinge's 1, of feature matching: L1 of what the discriminators'
            layers make of made and real signals (MelGAN: Kumar et al., arXiv 1910.06711, section
            2.3), each layer's against its mean (audiocraft); 0 for none.
    """

    def __init__(
        self,
        discriminators: list[Discriminator],
        weight: float = 0.1,
        start: int = 0,
        lecam: float = 0.05,
        r1: float = 0.0,
        r1_every: int = 16,
        matching: float = 0.0,
    ) -> None:
        super().__init__()
        if not discriminators or min(weight, matching) < 0 or r1_every < 1:
            raise ValueError(
                "an adversary needs a discriminator, weights of 0 or more and r1_every above 0"
            )
        self.discriminators = nn.ModuleList(discriminators)
        self.weight, self.start, self.matching = weight, start, matching
        self.lecam, self.r1, self.r1_every = lecam, r1, r1_every
        self.regularizers = nn.ModuleList(LeCam() for _ in discriminators)

    def felt(self, step: int) -> bool:
        """Whether the codec's loss holds it at this step."""
        return self.weight > 0 and step >= self.start

    def fooled(self, pairs: Pairs) -> Tensor:
        """The codec's loss; no gradient reaches the discriminators' weights."""
        self.requires_grad_(False)
        losses = [
            self._against(scorer, made, real)
            for made, real in pairs
            for scorer, _ in self._members()
            if scorer.accepts(made)
        ]
        self.requires_grad_(True)
        return self.weight * torch.stack(losses).mean() if losses else pairs[0][0].new_zeros(())

    def _against(self, scorer: Discriminator, made: Tensor, real: Tensor) -> Tensor:
        """Hinge of one discriminator, and feature matching where it is asked for."""
        if not self.matching:
            return generator_hinge(scorer(made))
        *inner, scores = scorer.features(made)
        with torch.no_grad():
            wanted = scorer.features(real)[:-1]
        return generator_hinge(scores) + self.matching * feature_distance(inner, wanted)

    def loss(self, pairs: Pairs, step: int) -> dict[str, Tensor]:
        """The discriminators' own loss, by terms; empty where none accepts these signals."""
        terms: dict[str, list[Tensor]] = {"hinge": [], "lecam": [], "r1": []}
        for made, real in pairs:
            for scorer, regularizer in self._members():
                if not scorer.accepts(real):
                    continue
                scores = scorer(real), scorer(made.detach())
                terms["hinge"].append(discriminator_hinge(*scores))
                if self.lecam:
                    terms["lecam"].append(self.lecam * regularizer(*scores))
                if self.r1 and step % self.r1_every == 0:
                    terms["r1"].append(self.r1 * self.r1_every * r1_penalty(scorer, real))
        return {name: torch.stack(values).mean() for name, values in terms.items() if values}

    def _members(self) -> Iterator[tuple[Discriminator, LeCam]]:
        for scorer, regularizer in zip(self.discriminators, self.regularizers, strict=True):
            yield cast(Discriminator, scorer), cast(LeCam, regularizer)
