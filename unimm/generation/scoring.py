"""How likely a model finds a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unimm.generation.engine import require_pair
from unimm.model import UnifiedLM
from unimm.signals import Item
from unimm.tokenizer import UnifiedTokenizer


class Score(NamedTuple):
    """Log-likelihood in nats.

    total: of the whole sequence, `<bos>` given. items: one per grammar item, markers included.
    tokens: float (T - 1,), one per id after `<bos>`.
    """

    total: float
    items: list[float]
    tokens: Tensor


@torch.no_grad()
def score(lm: UnifiedLM, tok: UnifiedTokenizer, document: Sequence[Item]) -> Score:
    """Log-likelihood of a document under a model.

    Args:
        lm: the model, in evaluation mode.
        tok: the tokenizer that it was trained with.
        document: a list of items.

    Raises:
        ValueError: an item can't be coded, or the model was not made for this tokenizer.
    """
    require_pair(lm, tok.vocabulary)
    ids = tok.encode(document)
    layout = tok.grammar.layout(ids)
    device = lm.device
    logits = lm(ids[None, :-1].to(device), layout.positions[:, None, :-1].to(device))
    logits = logits[0, :, : len(tok.vocabulary)].float().log_softmax(-1)
    tokens = logits.gather(1, ids[1:, None].to(device))[:, 0].cpu()
    items = [float(tokens[span.start - 1 : span.stop - 1].sum()) for span in tok.grammar.spans(ids)]
    return Score(float(tokens.sum()), items, tokens)
