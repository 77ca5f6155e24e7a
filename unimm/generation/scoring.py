# pyright: strict
# torch's own types are partly unknown, and what users give is checked whatever its annotation says.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnnecessaryIsInstance=false

"""How likely a model finds a document, and which of several answers it finds the likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unimm.generation.engine import require_pair
from unimm.model import KVCache, UnifiedLM
from unimm.signals import Item
from unimm.tokenizer import UnifiedTokenizer
from unimm_kernels import linear_cross_entropy

_AT_ONCE = 4096  # ids of candidates scored at once


class Score(NamedTuple):
    """Log-likelihood in nats.

    total: of the whole sequence, `<bos>` given. items: one per grammar item, markers included.
    tokens: float (T - 1,), one per id after `<bos>`.
    """

    total: float
    items: list[float]
    tokens: Tensor


class Classification(NamedTuple):
    """The likeliest candidate.

    index: its place among the candidates. probabilities: float (C,), of each if one of them it
    must be. log_likelihoods: float (C,), in nats, as they were compared.
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  (a tuple's own, not used)
    probabilities: Tensor
    log_likelihoods: Tensor


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
    positions = tok.grammar.layout(ids).positions[:, None, :-1]
    hidden = lm.hidden(ids[None, :-1].to(lm.device), positions.to(lm.device))[0]
    tokens = _log_likelihoods(lm, tok, hidden, ids[1:].to(lm.device)).cpu()
    items = [float(tokens[span.start - 1 : span.stop - 1].sum()) for span in tok.grammar.spans(ids)]
    return Score(float(tokens.sum()), items, tokens)


@torch.no_grad()
def classify(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompt: Sequence[Item],
    candidates: Sequence[Sequence[Item]],
    *,
    normalise: Literal["none", "ids"] = "none",
) -> Classification:
    """Which of several continuations of a prompt is the likeliest, its end included.

    The prompt is read once for all of them.

    Args:
        lm, tok: see `score`.
        prompt: a document.
        candidates: C documents, each a whole continuation.
        normalise: "ids" divides each log-likelihood by its number of ids, for candidates of
            different lengths.

    Raises:
        ValueError: there is no candidate, an item can't be coded, or the model was not made for
            this tokenizer.
    """
    require_pair(lm, tok.vocabulary)
    if not candidates:
        raise ValueError("classify: there are no candidates; give at least one")
    if normalise not in ("none", "ids"):
        raise ValueError(f"classify: normalise must be 'none' or 'ids', got {normalise!r}")
    beginning = tok.segments(prompt)
    start = len(tok.grammar.encode(beginning, complete=False))
    rows = [tok.grammar.encode([*beginning, *tok.segments(entry)]) for entry in candidates]
    device, dtype = lm.device, lm.embedding.weight.dtype
    places = [tok.grammar.layout(row).positions for row in rows]
    shared = KVCache(lm.config, 1, start, device, dtype)
    first = lm.hidden(
        rows[0][None, :start].to(device), places[0][:, None, :start].to(device), cache=shared
    )
    shared.advance(start)
    longest = max(len(row) for row in rows) - start
    step = max(1, _AT_ONCE // longest)
    sums = []
    for begin in range(0, len(rows), step):
        part = slice(begin, begin + step)
        sums += _continued(lm, tok, shared, first, rows[part], places[part], start)
    found = torch.stack(sums).double().cpu()
    if normalise == "ids":
        found = found / torch.tensor([len(row) - start for row in rows])
    return Classification(int(found.argmax()), found.softmax(0), found)


def _continued(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    shared: KVCache,
    first: Tensor,
    rows: Sequence[Tensor],
    places: Sequence[Tensor],
    start: int,
) -> list[Tensor]:
    """Log-likelihood of each row from `start` on, its beginning already read."""
    lengths = [len(row) - start for row in rows]
    longest = max(lengths)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    positions = torch.zeros(3, len(rows), longest, dtype=torch.int64)
    for number, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[number, : lengths[number]] = row[start:]
        positions[:, number, : lengths[number]] = place[:, start:]
    ids, positions = ids.to(lm.device), positions.to(lm.device)
    cache = KVCache(lm.config, len(rows), start + longest, lm.device, first.dtype)
    cache.copy_rows(shared, torch.zeros(len(rows), dtype=torch.int64, device=lm.device))
    hidden = lm.hidden(ids, positions, cache=cache)
    hidden = torch.cat([first[:, -1:].expand(len(rows), -1, -1), hidden[:, :-1]], 1)
    likelihoods = _log_likelihoods(lm, tok, hidden.flatten(0, 1), ids.flatten()).view_as(ids)
    return [likelihoods[row, :length].sum() for row, length in enumerate(lengths)]


def _log_likelihoods(
    lm: UnifiedLM, tok: UnifiedTokenizer, hidden: Tensor, targets: Tensor
) -> Tensor:
    """float32 (N,): of targets (N,) from hidden states (N, d), over all ids in use."""
    used = len(tok.vocabulary)  # padding ids are never written
    if lm.config.logit_cap is None:  # in chunks: no N x V logits
        return -linear_cross_entropy(hidden, lm.head_weight[:used], targets)[1].float()
    logits = lm.logits(hidden, 0, used).float().log_softmax(-1)
    return logits.gather(1, targets[:, None])[:, 0]
