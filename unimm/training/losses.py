"""The loss of a decoder's head, plain or with softly bounded logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unimm.model import UnifiedLM
from unimm_kernels import LinearCrossEntropy, linear_cross_entropy

LOGIT_BYTES = 2**28  # float32 logits held at once


def head_loss(
    lm: UnifiedLM, hidden: Tensor, targets: Tensor, loss_weight: Tensor, z_loss: float
) -> LinearCrossEntropy:
    """Weighted mean loss of predicting targets (N,) from hidden states (N, d_model).

    Bounded logits go through in chunks that the backward pass makes again, so that no more than
    256 MiB of them are held.
    """
    if lm.config.logit_cap is None:
        return linear_cross_entropy(
            hidden, lm.head_weight, targets, loss_weight=loss_weight, z_loss=z_loss
        )
    step = max(1, LOGIT_BYTES // (4 * lm.config.vocab_size))
    parts: list[Any] = [
        checkpoint(
            _capped, lm, hidden[at : at + step], targets[at : at + step], use_reentrant=False
        )
        for at in range(0, len(targets), step)
    ]
    nll, lse = (torch.cat(column) for column in zip(*parts, strict=True))
    share = loss_weight / loss_weight.sum().clamp(min=torch.finfo(torch.float32).tiny)
    loss = (share * (nll + z_loss * lse.square())).sum()
    return LinearCrossEntropy(loss, nll.detach(), lse.detach())


def _capped(lm: UnifiedLM, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = lm.cap((hidden @ lm.head_weight.T).float())
    lse = logits.logsumexp(1)
    return lse - logits.gather(1, targets[:, None]).squeeze(1), lse


@torch.no_grad()
def hits(lm: UnifiedLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """Whether each target (N,) is the id that its hidden state (N, d_model) finds likeliest."""
    step = max(1, LOGIT_BYTES // (4 * lm.config.vocab_size))
    found = [
        (hidden[at : at + step] @ lm.head_weight.T).argmax(1) == targets[at : at + step]
        for at in range(0, len(targets), step)
    ]
    return torch.cat(found)
