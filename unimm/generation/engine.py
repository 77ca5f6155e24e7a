"""The decoding loop: prompts are read once, then one id per row and step under the grammar.

What is certain costs nothing: ids that the grammar or the request forces are not scored but read
together with the next one that is; where the next n ids surely are codes, the grammar is asked once
for all n; the head multiplies only the ids that some row may write. The host waits for the device
once per such stretch, and once per id only between items, where the model may end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unimm.generation.grammar import (
    BETWEEN,
    CODE,
    DONE,
    SIZE,
    Allowed,
    Machine,
    Request,
    State,
)
from unimm.generation.sampling import Knobs, Settings, guided, penalised
from unimm.model import KVCache, UnifiedLM
from unimm.sequence import Grammar
from unimm.vocabulary import SPECIAL_SIZE, Vocabulary

FREE = -1  # in `Job.given`: the model writes this id
_STRETCH = 1024  # codes planned at once; more only costs memory
_GRANULE = 64  # static caches grow by so much, so that few shapes are compiled


class Step(NamedTuple):
    """One step of all rows: ids (B,), and the rows that were still writing (B,)."""

    ids: Tensor
    active: Tensor


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be written.

    prompts: B tensors of ids, each from `<bos>` on, items closed. request: what each row is asked
    for. settings: how ids are drawn. seeds: B of them. unconditional: B prompts without their
    condition, where the settings have guidance; they run in the same batch. given: int64 (B, n),
    ids that the answers must have at their first n places, FREE where the model writes.
    """

    prompts: Sequence[Tensor]
    request: Request
    settings: Settings
    seeds: Sequence[int]
    unconditional: Sequence[Tensor] | None = None
    given: Tensor | None = None


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


class Reader:
    """The model and what it has read of R sequences; reads only when its opinion is wanted.

    Args:
        lm: the model, in evaluation mode.
        sequences: R tensors of ids; equal ones are read once and copied.
        positions: their positions, (3, n) each.
        room: ids that will follow at most.
    """

    def __init__(
        self, lm: UnifiedLM, sequences: Sequence[Tensor], positions: Sequence[Tensor], room: int
    ) -> None:
        self.lm = lm
        device, dtype = lm.device, lm.embedding.weight.dtype
        numbers: dict[bytes, int] = {}
        keys = [ids.numpy().tobytes() for ids in sequences]
        rows = [numbers.setdefault(key, len(numbers)) for key in keys]
        unique = [rows.index(number) for number in range(len(numbers))]
        lengths = torch.tensor([len(sequences[row]) for row in unique])
        longest = int(lengths.max())
        ids = torch.zeros(len(unique), longest, dtype=torch.int64)
        places = torch.zeros(3, len(unique), longest, dtype=torch.int64)
        for number, row in enumerate(unique):
            ids[number, : lengths[number]] = sequences[row]
            places[:, number, : lengths[number]] = positions[row]
        total = longest + room
        if lm.static:
            total = -(-total // _GRANULE) * _GRANULE
        shared = len(unique) < len(rows)
        first = KVCache(
            lm.config,
            len(unique),
            longest if shared else total,
            device,
            dtype,
            static=lm.static and not shared,
        )
        lengths = lengths.to(device)
        hidden = lm.hidden(ids.to(device), places.to(device), cache=first)
        first.advance(longest, lengths)
        self._last = hidden[torch.arange(len(unique), device=device), lengths - 1]
        self.cache = first
        if shared:
            index = torch.tensor(rows, device=device)
            self.cache = KVCache(lm.config, len(rows), total, device, dtype, static=lm.static)
            self.cache.copy_rows(first, index)
            self._last = self._last[index]
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def feed(self, ids: Tensor, positions: Tensor) -> None:
        """The next id of each sequence (R,), at positions (3, R); read when needed."""
        self._waiting.append((ids, positions))

    def hidden(self) -> Tensor:
        """(R, d_model): the state behind the last id of each sequence."""
        if self._waiting:
            ids, positions = zip(*self._waiting, strict=True)
            self._waiting = []
            hidden = self.lm.step(torch.stack(ids, 1), torch.stack(positions, 2), self.cache)
            self.cache.advance(len(ids))
            self._last = hidden[:, -1]
        return self._last


@torch.no_grad()  # not inference mode: layers then share what they make of positions
def run(lm: UnifiedLM, grammar: Grammar, job: Job) -> Iterator[Step]:
    """Decode every row until it is finished or its budget is used up.

    Args:
        lm: the model, in evaluation mode.
        grammar: the grammar of the tokenizer that it was trained with.
        job: what is to be written.
    """
    yield from _Decoding(lm, grammar, job).steps()


class _Decoding:
    """One run; `at` ids of every answer are written."""

    def __init__(self, lm: UnifiedLM, grammar: Grammar, job: Job) -> None:
        self.lm, self.job = lm, job
        self.rows, self.device = len(job.prompts), lm.device
        self.machine = Machine(grammar, self.device)
        self.at = 0
        self.longest = int(job.request.budget.max())
        self.guided = job.settings.guided and job.unconditional is not None
        sequences = [*job.prompts, *((job.unconditional or ()) if self.guided else ())]
        layouts: dict[int, Tensor] = {}  # one tensor may stand for many rows
        for ids in sequences:
            if id(ids) not in layouts:
                layouts[id(ids)] = grammar.layout(ids, complete=False).positions
        positions = [layouts[id(ids)] for ids in sequences]
        # A prompt ends between items: its last id stands on the diagonal, the next one after it.
        clocks = torch.tensor([int(place[0, -1]) + 1 for place in positions], device=self.device)
        self.state = self.machine.behind(clocks[: self.rows])
        # Unconditional rows write the same items from another clock on.
        self.shift = clocks[self.rows :] - clocks[: self.rows] if self.guided else None
        self.reader = Reader(lm, sequences, positions, self.longest)
        draws = [
            torch.rand(budget, generator=torch.Generator().manual_seed(seed))
            for seed, budget in zip(job.seeds, job.request.budget.tolist(), strict=True)
        ]
        self.draws = torch.nn.utils.rnn.pad_sequence(draws, batch_first=True).to(self.device)
        self.seen = self._seen() if job.settings.penalised else None
        given = job.given
        self.given_columns = 0 if given is None else given.shape[1]
        self.given = None if given is None else given.to(self.device)
        self.all_given = [] if given is None else (given != FREE).all(0).tolist()

    def _seen(self) -> Tensor:
        """bool (B, V): ids that stand in each prompt."""
        seen = torch.zeros(self.rows, self.lm.config.vocab_size, dtype=torch.bool)
        for row, ids in enumerate(self.job.prompts):
            seen[row, ids] = True
        return seen.to(self.device)

    def steps(self) -> Iterator[Step]:
        machine, request = self.machine, self.job.request
        while self.at < self.longest:
            remaining = request.budget - self.at
            allowed = machine.allowed(self.state, request, remaining, first=self.at == 0)
            certain = machine.certain(self.state, request, remaining)
            plan = self._plan(allowed, certain)
            if plan.done:
                return
            if plan.certain > 1:
                yield from self._codes(min(plan.certain, _STRETCH))
            elif plan.words and self.at >= self.given_columns:
                yield from self._words()
            else:
                yield self._one(allowed, plan)

    def _plan(self, allowed: Allowed, certain: Tensor) -> _Plan:
        """All that the host has to know before the next step, in one transfer."""
        count = allowed.high - allowed.low + allowed.markers.sum(1)
        ranged = allowed.high > allowed.low
        done = self.state.phase == DONE
        facts = torch.stack(
            [
                done.all().long(),
                certain.min(),
                (count == 1).all().long(),
                torch.where(ranged, allowed.low, self.lm.config.vocab_size).min(),
                torch.where(ranged, allowed.high, 0).max(),
                (done | ((self.state.phase == BETWEEN) & ranged)).all().long(),
            ]
        )
        return _Plan(*facts.tolist())

    def _codes(self, steps: int) -> Iterator[Step]:
        """The next ids are codes in every row that still writes."""
        state = self.state
        codes = self.machine.codes(state, steps)
        active = state.phase != DONE
        knobs = self._knobs(state)
        end = torch.full_like(state.phase, self.machine.grammar.eos)
        # Rows that are done draw too, from whatever the others may write, and it is thrown away.
        big = self.lm.config.vocab_size
        lows = torch.where(active, codes.low, big).min(1).values
        highs = torch.where(active, codes.high, 0).max(1).values
        narrow = active & ((codes.low > lows[:, None]) | (codes.high < highs[:, None]))
        windows = torch.stack([lows, highs, narrow.any(1).long()], 1).tolist()
        for number, (low, high, mixed) in enumerate(windows):
            chosen = self._given()
            if chosen is None:
                logits = self._logits(low, high, knobs)
                if mixed:
                    allowed = Allowed(codes.low[number], codes.high[number], torch.empty(0))
                    mask = allowed.mask(torch.arange(low, high, device=self.device))
                    logits = logits.masked_fill(~(mask | ~active[:, None]), -torch.inf)
                chosen = low + self.job.settings.draw(logits, self.draws[:, self.at], knobs)
                chosen = self._overridden(chosen)
            chosen = torch.where(active, chosen, end)
            yield Step(chosen, active)
            self._feed(chosen, codes.positions[number])
        self.state = self.machine.advance_codes(state, steps)

    def _words(self) -> Iterator[Step]:
        """Text pieces, as long as every row that still writes goes on with them."""
        text, request = self.machine.text, self.job.request
        knobs = self._knobs(self.state)
        active = self.state.phase != DONE
        shortest = int(torch.where(active, request.budget, self.longest).min())
        while True:
            remaining = request.budget - self.at
            openings = self.machine.openings(request, remaining, first=self.at == 0)
            logits = self._logits(text.start, text.end, knobs, markers=True)
            logits[:, :SPECIAL_SIZE].masked_fill_(~openings, -torch.inf)
            column = self.job.settings.draw(logits, self.draws[:, self.at], knobs)
            markers = column < SPECIAL_SIZE
            chosen = torch.where(markers, column, column - SPECIAL_SIZE + text.start)
            chosen = torch.where(active, chosen, self.machine.grammar.eos)
            yield Step(chosen, active)
            self._feed(chosen, self.state.clock.expand(3, -1))
            # The last id of a budget is a stop: a piece needs room for two.
            if bool((markers & active).any()) or self.at + 2 > shortest:
                self._advance(chosen)
                return
            self.state = self.state._replace(clock=self.state.clock + 1)

    def _one(self, allowed: Allowed, plan: _Plan) -> Step:
        """One id in each row, whatever they write."""
        state = self.state
        chosen = self._given()
        if chosen is None and plan.forced:
            chosen = torch.where(
                allowed.high > allowed.low, allowed.low, allowed.markers.long().argmax(1)
            )
        elif chosen is None:
            low, high = min(plan.low, plan.high), plan.high
            knobs = self._knobs(state)
            mask = torch.cat(
                [allowed.markers, allowed.mask(torch.arange(low, high, device=self.device))], 1
            )
            logits = self._logits(low, high, knobs, markers=True)
            logits = logits.masked_fill(~mask, -torch.inf)
            column = self.job.settings.draw(logits, self.draws[:, self.at], knobs)
            chosen = torch.where(column < SPECIAL_SIZE, column, column - SPECIAL_SIZE + low)
            chosen = self._overridden(chosen)
        active = state.phase != DONE
        chosen = torch.where(active, chosen, self.machine.grammar.eos)
        self._feed(chosen, self.machine.positions(state, chosen))
        self._advance(chosen)
        return Step(chosen, active)

    def _advance(self, chosen: Tensor) -> None:
        moved = self.machine.advance(self.state, chosen)
        self.state = self.machine.settle(moved, self.job.request, chosen)

    def _feed(self, chosen: Tensor, positions: Tensor) -> None:
        """Every row has its next id; the unconditional rows read the same one."""
        self.at += 1
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        if self.shift is not None:
            chosen = chosen.repeat(2)
            positions = torch.cat([positions, positions + self.shift], 1)
        self.reader.feed(chosen, positions)

    def _given(self) -> Tensor | None:
        """The ids of this step where the request gives them to all rows."""
        known = self.at < self.given_columns and self.all_given[self.at]
        return self.given[:, self.at] if known and self.given is not None else None

    def _overridden(self, chosen: Tensor) -> Tensor:
        if self.given is None or self.at >= self.given_columns:
            return chosen
        given = self.given[:, self.at]
        return torch.where(given == FREE, chosen, given)

    def _knobs(self, state: State) -> Knobs:
        inside = (state.phase >= SIZE) & (state.phase <= CODE)
        return self.job.settings.of_rows(torch.where(inside, state.rule + 1, 0))

    def _logits(self, low: int, high: int, knobs: Knobs, *, markers: bool = False) -> Tensor:
        """float32 (B, n) of ids low to high - 1, behind those of all markers where wanted."""
        hidden = self.reader.hidden()
        parts = [(0, SPECIAL_SIZE)] if markers else []
        parts += [(low, high)] if high > low else []
        logits = torch.cat([self.lm.logits(hidden, *part) for part in parts], 1).float()
        if self.guided:
            scale = knobs.guidance[:, None]
            logits = guided(logits[: self.rows], logits[self.rows :], scale)
        if self.seen is not None:
            seen = torch.cat([self.seen[:, start:stop] for start, stop in parts], 1)
            logits = penalised(logits, seen, knobs.repetition_penalty)
        return logits


class _Plan(NamedTuple):
    """done: every row. certain: steps that surely are codes. forced: each row has one choice.

    low, high: the range of ids that some row may write. words: every row that is not done may write
    text.
    """

    done: int
    certain: int
    forced: int
    low: int
    high: int
    words: int
