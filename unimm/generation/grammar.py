"""The grammar as a state machine over a batch of rows: what may come next, and where it stands.

Every decision asks the rules of `unimm.sequence`; this file only vectorises them. One step costs
a fixed number of tensor operations, whatever the batch and whatever the rows are writing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unimm.sequence import MAX_SIZE, SIZE_BASE, Grammar, Place, Rule

BETWEEN, SIZE, CODE, CLOSE, DONE = range(5)
_AXES = "thw"


class State(NamedTuple):
    """Where each row stands; all int64, (B,) or (B, 3).

    phase: between items, in sizes, in codes, before the closing marker, or done.
    rule: index of the item's rule. index: sizes' digits or codes written so far.
    sizes: (t, h, w) of the item, as far as written. clock: position of the next id that advances
    it. items: closed codec items so far.
    """

    phase: Tensor
    rule: Tensor
    index: Tensor
    sizes: Tensor
    clock: Tensor
    items: Tensor


@dataclass(frozen=True)
class Request:
    """What each row is asked to write.

    between: bool (B, V), ids allowed between items.
    single: bool (B,), the row is done when its first codec item is closed.
    sizes: int64 (B, 3), forced (t, h, w) code sizes; 0 leaves the choice to the model.
    opening: bool (B, V), ids of which the very first one must be; None: no further condition.
    """

    between: Tensor
    single: Tensor
    sizes: Tensor
    opening: Tensor | None = None


class Machine:
    """The vectorised grammar.

    Args:
        grammar: the rules.
        vocab_size: V, columns of the model's logits (padding ids included; never allowed).
        device: where states and masks live.
    """

    def __init__(self, grammar: Grammar, vocab_size: int, device: torch.device) -> None:
        self.grammar = grammar
        self.vocab_size = vocab_size
        self.device = device
        self.rules: list[Rule] = list(grammar.rules.values())
        self.digit = grammar.vocabulary["digit"].start
        widest = max((rule.num_levels for rule in self.rules), default=1)

        # Without any rule (text alone) each table holds one row, which no id ever leads to.
        def column(values: list[int], alone: int = 0) -> Tensor:
            return torch.tensor(values or [alone], device=device)

        def levels(name: str) -> Tensor:
            rows = [list(getattr(rule, name)) for rule in self.rules] or [[0]]
            return torch.tensor([row + [0] * (widest - len(row)) for row in rows], device=device)

        self.open = column([rule.open for rule in self.rules], -1)
        self.close = column([rule.close for rule in self.rules], -1)
        self.header = column([rule.header for rule in self.rules])
        self.num_levels = column([rule.num_levels for rule in self.rules], 1)
        self.open_ended = column([int(not rule.axes) for rule in self.rules]).bool()
        self.raster = column([int(rule.order == "raster") for rule in self.rules]).bool()
        # Which of t, h, w the i-th size of a rule is.
        order = [
            [_AXES.index(a) for a in rule.axes] + [0] * (3 - len(rule.axes)) for rule in self.rules
        ]
        self.axis = torch.tensor(order or [[0, 0, 0]], device=device)
        self.starts, self.ends = levels("starts"), levels("ends")
        self.ids = torch.arange(vocab_size, device=device)

    # States

    def initial(self, batch: int) -> State:
        """Every row before its first id, which stands at position 0."""
        zeros = torch.zeros(batch, dtype=torch.int64, device=self.device)
        return State(zeros, zeros, zeros, zeros.new_ones(batch, 3), zeros, zeros)

    def positions(self, state: State, ids: Tensor) -> Tensor:
        """(3, B): where ids (B,), the next of each row, stand."""
        codes = (state.phase == CODE) & ~self._closes(state, ids)
        leaves = (state.phase == CODE) & ~codes
        offsets = torch.where(codes, torch.stack(self._place(state)[1:]), 0)
        return state.clock + offsets + torch.where(leaves, self._extent(state), 0)

    def _closes(self, state: State, ids: Tensor) -> Tensor:
        """bool (B,): ids that close their row's item."""
        early = (state.phase == CODE) & self.open_ended[state.rule]
        return ((state.phase == CLOSE) | early) & (ids == self.close[state.rule])

    def _place(self, state: State) -> Place:
        parts = []
        t, h, w = state.sizes.clamp(min=1).unbind(1)  # a size half written may be 0 so far
        for rule in self.rules:
            parts.append(torch.stack(rule.place(state.index, t, h, w)))
        if not parts:
            return Place(*(torch.zeros_like(state.index) for _ in range(4)))
        chosen = torch.stack(parts).gather(0, state.rule.expand(1, 4, -1))[0]
        return Place(*chosen)

    def advance(self, state: State, ids: Tensor) -> State:
        """The states after ids (B,), which the states must allow; done rows stay done."""
        phase, rule, index, sizes, clock, items = state
        header, levels = self.header[rule], self.num_levels[rule]
        raster_total = sizes.prod(1) * levels
        open_ended = self.open_ended[rule]

        opened = (ids[:, None] == self.open) & (phase == BETWEEN)[:, None]
        opens = opened.any(1)
        in_size, in_code = phase == SIZE, phase == CODE
        closes = self._closes(state, ids)
        ends = (phase == BETWEEN) & (ids == self.grammar.eos)
        codes = in_code & ~closes

        # Sizes: two digits per axis, base 256, the axis chosen by the rule's table.
        axis = self.axis[rule].gather(1, (index // 2).clamp(max=2)[:, None])
        digit = (ids - self.digit).clamp(0, SIZE_BASE - 1)[:, None]
        old = torch.where((index % 2 == 0)[:, None], 0, sizes.gather(1, axis))
        sized = sizes.scatter(1, axis, old * SIZE_BASE + digit)
        new_sizes = torch.where(in_size[:, None], sized, sizes)
        new_sizes = torch.where(opens[:, None], 1, new_sizes)

        new_rule = torch.where(opens, opened.long().argmax(1), rule)
        new_index = torch.where(in_size | codes, index + 1, index)
        size_done = in_size & (new_index == header)
        no_header = opens & (self.header[new_rule] == 0)
        new_index = torch.where(opens | size_done, 0, new_index)

        code_done = codes & ~open_ended & (new_index == raster_total)
        new_phase = phase
        for moved, target in (
            (opens, SIZE),
            (size_done | no_header, CODE),
            (code_done, CLOSE),
            (closes, BETWEEN),
            (ends, DONE),
        ):
            new_phase = torch.where(moved, target, new_phase)

        # The clock stands still during codes and then moves past the item's longest side.
        leaves = code_done | (closes & in_code)
        step = ((~in_code & (phase != DONE)) | (closes & in_code)).long()
        done = state._replace(index=torch.where(codes, index + 1, index))
        new_clock = clock + step + torch.where(leaves, self._extent(done), 0)
        return State(new_phase, new_rule, new_index, new_sizes, new_clock, items + closes.long())

    def _extent(self, state: State) -> Tensor:
        """(B,): how far the codes written so far move the clock; `Rule.extent`, vectorised."""
        levels = self.num_levels[state.rule]
        frames = torch.where(self.open_ended[state.rule], state.index // levels, state.sizes[:, 0])
        line = torch.where(frames > 0, torch.maximum(frames, levels), 0)
        return torch.where(self.raster[state.rule], state.sizes.max(1).values, line)

    # What may come next

    def allowed(self, state: State, request: Request, remaining: Tensor) -> Tensor:
        """bool (B, V): ids that may come next so that the row can still end well.

        Args:
            state: where the rows stand.
            request: what they are asked for.
            remaining: (B,) ids that a row may still write, the next one counted in.
        """
        phase, rule, index, sizes = state[:4]
        levels, header = self.num_levels[rule], self.header[rule]
        tail = 1  # room for <eos>
        low = torch.zeros_like(phase)
        high = torch.zeros_like(phase)
        extra = torch.full_like(phase, -1)

        # Sizes: never so large that the codes would not fit, never zero.
        axis = self.axis[rule].gather(1, (index // 2).clamp(max=2)[:, None])
        capacity = remaining - (header - index) - 1 - tail
        written = torch.where(torch.arange(3, device=self.device) == axis, 1, sizes).prod(1)
        most = (capacity // (levels * written)).clamp(1, MAX_SIZE)
        forced = request.sizes.gather(1, axis)[:, 0]
        first = index % 2 == 0
        chosen = sizes.gather(1, axis)[:, 0]  # the first digit, once it is written
        least_low = torch.where(first, 0, (chosen == 0).long())
        most_digit = torch.where(
            first,
            most // SIZE_BASE,
            torch.where(chosen == most // SIZE_BASE, most % SIZE_BASE, SIZE_BASE - 1),
        )
        forced_digit = torch.where(first, forced // SIZE_BASE, forced % SIZE_BASE)
        low = torch.where(forced > 0, forced_digit, least_low) + self.digit
        high = torch.where(forced > 0, forced_digit, most_digit) + self.digit + 1

        # Codes: the level that is due; at a frame's start an open-ended item may close.
        level = self._place(state).level.clamp(max=self.starts.shape[1] - 1)
        in_code = phase == CODE
        code_low, code_high = self.starts[rule, level], self.ends[rule, level]
        boundary = in_code & self.open_ended[rule] & (level == 0)
        frames = index // levels
        wanted = request.sizes[:, 0]
        full = remaining < levels + 1 + tail
        must_close = boundary & (((wanted > 0) & (frames >= wanted)) | full)
        may_close = boundary & (index > 0) & (wanted == 0)
        low = torch.where(in_code, torch.where(must_close, 0, code_low), low)
        high = torch.where(in_code, torch.where(must_close, 0, code_high), high)
        closing = must_close | may_close | (phase == CLOSE)
        extra = torch.where(closing, self.close[rule], extra)

        ranged = (phase == SIZE) | in_code
        mask = ranged[:, None] & (self.ids >= low[:, None]) & (self.ids < high[:, None])
        mask = mask | (self.ids == extra[:, None])
        between = request.between & self._affordable(remaining, tail)
        mask = torch.where((phase == BETWEEN)[:, None], between, mask)
        return torch.where((phase == DONE)[:, None], self.ids == self.grammar.eos, mask)

    def _affordable(self, remaining: Tensor, tail: int) -> Tensor:
        """bool (B, V): ids that leave room for what they entail; <eos> always does."""
        costs = torch.ones(self.vocab_size, dtype=torch.int64, device=self.device)
        costs[self.grammar.eos] = 0
        if self.rules:
            costs[self.open] = 2 + self.header + self.num_levels
        return remaining[:, None] >= costs + tail

    def finished(self, state: State, request: Request) -> Tensor:
        """bool (B,): rows that have written what they were asked for."""
        whole = request.single & (state.items > 0) & (state.phase == BETWEEN)
        return (state.phase == DONE) | whole
