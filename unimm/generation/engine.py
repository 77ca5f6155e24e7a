"""The decoding loop: prefill, then one id per row and step under the grammar's mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unimm.generation.grammar import Machine, Request, State
from unimm.generation.sampling import Sampling, guided, sample
from unimm.model import KVCache, UnifiedLM
from unimm.sequence import Grammar
from unimm.vocabulary import Vocabulary


class Step(NamedTuple):
    """One step of all rows: ids (B,), and the rows that were still writing (B,)."""

    ids: Tensor
    active: Tensor


class Prompts(NamedTuple):
    """ids int64 (B, T), padded on the right; lengths (B,)."""

    ids: Tensor
    lengths: Tensor


def pad_prompts(prompts: Sequence[Tensor], pad: int) -> Prompts:
    """Prompts of different lengths side by side."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True, padding_value=pad)
    return Prompts(ids, lengths)


def require_pair(lm: UnifiedLM, vocabulary: Vocabulary) -> None:
    """Refuse a model that was not made for a vocabulary.

    Raises:
        ValueError: the model has another number of ids.
    """
    if lm.config.vocab_size != vocabulary.padded_size:
        raise ValueError(
            f"the model writes {lm.config.vocab_size} ids, the tokenizer has "
            f"{vocabulary.padded_size}: they do not belong together"
        )


@torch.no_grad()
def run(
    lm: UnifiedLM,
    grammar: Grammar,
    prompts: Sequence[Tensor],
    request: Request,
    sampling: Sampling,
    max_new: int,
    seeds: Sequence[int],
    unconditional: Sequence[Tensor] | None = None,
) -> Iterator[Step]:
    """Decode every row until it is finished or has written `max_new` ids.

    Args:
        lm: the model, in evaluation mode.
        grammar: the grammar of the tokenizer that it was trained with.
        prompts: B tensors of ids, each from `<bos>` on.
        request: what each row is asked to write.
        sampling: how ids are drawn.
        max_new: most ids that a row writes.
        seeds: B seeds.
        unconditional: B prompts without their condition; guidance runs them in the same batch.
    """
    rows = len(prompts)
    guide = unconditional is not None and sampling.guidance != 1.0
    every = [*prompts, *(unconditional or [])] if guide else list(prompts)
    device = lm.device
    machine = Machine(grammar, lm.config.vocab_size, device)
    padded = pad_prompts(every, grammar.vocabulary.marker("<pad>"))
    ids, lengths = padded.ids.to(device), padded.lengths.to(device)
    state, positions = _read(machine, ids, lengths)

    longest = ids.shape[1]
    cache = KVCache(lm.config, len(every), longest + max_new, device, lm.embedding.weight.dtype)
    hidden = lm.hidden(ids, positions, cache=cache)
    cache.advance(longest, lengths)
    last = hidden[torch.arange(len(every), device=device), lengths - 1]

    draws = _draws(seeds, max_new).to(device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    for number in range(max_new):
        logits = last @ lm.head_weight.T
        if guide:
            logits = guided(logits[:rows], logits[rows:], sampling.guidance)
        writing = State(*(field[:rows] for field in state))
        remaining = torch.full((rows,), max_new - number, device=device)
        allowed = machine.allowed(writing, request, remaining)
        if number == 0 and request.opening is not None:
            allowed = allowed & request.opening
        allowed = torch.where(done[:, None], machine.ids == grammar.eos, allowed)
        chosen = sample(logits, allowed, draws[:, number], sampling)
        active = ~done
        yield Step(chosen, active)
        fed = chosen.repeat(2) if guide else chosen
        where = machine.positions(state, fed)
        moved = machine.advance(state, fed)
        state = _where(active.repeat(2) if guide else active, moved, state)
        done = done | machine.finished(State(*(field[:rows] for field in state)), request)
        if bool(done.all()):
            return
        last = lm.hidden(fed[:, None], where[:, :, None], cache=cache)[:, 0]
        cache.advance(1)


def _read(machine: Machine, ids: Tensor, lengths: Tensor) -> tuple[State, Tensor]:
    """The states behind the prompts, and the prompts' positions (3, B, T)."""
    state = machine.initial(len(ids))
    positions = []
    for at in range(ids.shape[1]):
        positions.append(machine.positions(state, ids[:, at]))
        moved = machine.advance(state, ids[:, at])
        state = _where(at < lengths, moved, state)
    return state._replace(items=torch.zeros_like(state.items)), torch.stack(positions, dim=2)


def _where(rows: Tensor, new: State, old: State) -> State:
    """The new states of the rows (B,) that are set, the old ones of the others."""
    return State(
        *(
            torch.where(rows.view(-1, *(1,) * (after.ndim - 1)), after, before)
            for after, before in zip(new, old, strict=True)
        )
    )


def _draws(seeds: Sequence[int], steps: int) -> Tensor:
    """(B, steps) uniform numbers; each row's from its own seed."""
    rows = [torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)
