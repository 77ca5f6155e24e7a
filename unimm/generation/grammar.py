"""The grammar as a state machine over a batch of rows: what may come next, and where it stands.

Every decision asks the rules of `unimm.sequence`; this file only vectorises them. One step costs
a fixed number of tensor operations, whatever the batch and whatever the rows are writing. What a
row may write is at most one range of ids and some markers (`Allowed`), so that the head needs to
score nothing else; inside an item whose codes are known to follow, many steps are one (`codes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unimm.sequence import MAX_SIZE, SIZE_BASE, Grammar, Place, Rule
from unimm.vocabulary import SPECIAL_SIZE

BETWEEN, SIZE, CODE, CLOSE, DONE = range(5)
TAIL = 1  # room that is kept for <eos>
_AXES = "thw"
_ENDLESS = 1 << 40


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


class Allowed(NamedTuple):
    """What may come next: ids low to high - 1, int64 (B,), and markers, bool (B, SPECIAL_SIZE)."""

    low: Tensor
    high: Tensor
    markers: Tensor

    def mask(self, ids: Tensor) -> Tensor:
        """bool (B, n): which of the ids (n,), none of them a marker, lie in each row's range."""
        return (ids >= self.low[:, None]) & (ids < self.high[:, None])


class Codes(NamedTuple):
    """The next n steps of rows that write codes: ranges (n, B), positions (n, 3, B)."""

    low: Tensor
    high: Tensor
    positions: Tensor


@dataclass(frozen=True, kw_only=True)
class Request:
    """What each row is asked to write.

    text: bool (B,), text pieces may stand between items.
    markers: bool (B, SPECIAL_SIZE), markers that may.
    nonempty: bool (B,), the very first id must not be a stop.
    single: bool (B,), the row is done when its first codec item is closed.
    sizes: int64 (B, 3), forced (t, h, w) code sizes; 0 leaves the choice to the model.
    budget: int64 (B,), most ids that the row writes.
    stops: bool (SPECIAL_SIZE,), markers that end a row.
    """

    text: Tensor
    markers: Tensor
    nonempty: Tensor
    single: Tensor
    sizes: Tensor
    budget: Tensor
    stops: Tensor


class Machine:
    """The vectorised grammar.

    Args:
        grammar: the rules.
        device: where states live.
    """

    def __init__(self, grammar: Grammar, device: torch.device) -> None:
        self.grammar = grammar
        self.device = device
        self.rules: list[Rule] = list(grammar.rules.values())
        self.digit = grammar.vocabulary["digit"].start
        self.text = grammar.vocabulary["text"]
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
        # (t, h, w) when an item opens: those that never vary, else 1 until they are written.
        self.first_sizes = torch.tensor(
            [rule.fixed or (1, 1, 1) for rule in self.rules] or [(1, 1, 1)], device=device
        )
        self.starts, self.ends = levels("starts"), levels("ends")
        self.special = torch.arange(SPECIAL_SIZE, device=device)
        # Ids that each marker entails, itself and <eos> counted in.
        self.costs = torch.full((SPECIAL_SIZE,), 1 + TAIL, device=device)
        self.costs[grammar.eos] = TAIL
        for rule in self.rules:
            least = rule.count(rule.fixed or (1, 1, 1))
            self.costs[rule.open] = 2 + rule.header + least + TAIL

    # States

    def initial(self, batch: int) -> State:
        """Every row before its first id, which stands at position 0."""
        zeros = torch.zeros(batch, dtype=torch.int64, device=self.device)
        return State(zeros, zeros, zeros, zeros.new_ones(batch, 3), zeros, zeros)

    def behind(self, clocks: Tensor) -> State:
        """Rows between items, their next id at position `clocks` (B,)."""
        return self.initial(len(clocks))._replace(clock=clocks)

    def positions(self, state: State, ids: Tensor) -> Tensor:
        """(3, B): where ids (B,), the next of each row, stand."""
        in_code = state.phase == CODE
        codes = in_code & ~self._closes(state, ids)
        leaves = in_code & ~codes
        offsets = torch.where(codes, torch.stack(self._place(state, state.index)[1:]), 0)
        return state.clock + offsets + torch.where(leaves, self._extent(state), 0)

    def _closes(self, state: State, ids: Tensor) -> Tensor:
        """bool (B,): ids that close their row's item."""
        early = (state.phase == CODE) & self.open_ended[state.rule]
        return ((state.phase == CLOSE) | early) & (ids == self.close[state.rule])

    def _place(self, state: State, index: Tensor) -> Place:
        """Level and offsets of code number `index`, (B,) or (n, B), of each row's item."""
        t, h, w = state.sizes.clamp(min=1).unbind(1)  # a size half written may be 0 so far
        place = Place(*(torch.zeros_like(index) for _ in range(4)))
        for number, rule in enumerate(self.rules):
            own, mine = rule.place(index, t, h, w), state.rule == number
            pairs = zip(own, place, strict=True)
            place = Place(*(torch.where(mine, new, old) for new, old in pairs))
        return place

    def advance(self, state: State, ids: Tensor) -> State:
        """The states after ids (B,), which the states must allow; done rows stay as they are."""
        phase, rule, index, sizes, clock, items = state
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

        new_rule = torch.where(opens, opened.long().argmax(1), rule)
        new_sizes = torch.where(opens[:, None], self.first_sizes[new_rule], new_sizes)
        new_index = torch.where(in_size | codes, index + 1, index)
        size_done = in_size & (new_index == self.header[rule])
        no_header = opens & (self.header[new_rule] == 0)
        new_index = torch.where(opens | size_done, 0, new_index)

        new_phase = phase
        for moved, target in (
            (opens, SIZE),
            (size_done | no_header, CODE),
            (closes, BETWEEN),
            (ends, DONE),
        ):
            new_phase = torch.where(moved, target, new_phase)

        # The clock stands still during codes and then moves past the item's longest side.
        step = ((~in_code & (phase != DONE)) | (closes & in_code)).long()
        leaves = torch.where(closes & in_code, self._extent(state), 0)
        moved = State(
            new_phase, new_rule, new_index, new_sizes, clock + step + leaves, items + closes.long()
        )
        return self._completed(moved, codes)

    def _completed(self, state: State, codes: Tensor) -> State:
        """Rows (B,) that have written a code, moved on where it was their item's last one."""
        total = state.sizes.prod(1) * self.num_levels[state.rule]
        last = codes & ~self.open_ended[state.rule] & (state.index == total)
        return state._replace(
            phase=torch.where(last, CLOSE, state.phase),
            clock=state.clock + torch.where(last, self._extent(state), 0),
        )

    def _extent(self, state: State) -> Tensor:
        """(B,): how far the codes written so far move the clock; `Rule.extent`, vectorised."""
        levels = self.num_levels[state.rule]
        frames = torch.where(self.open_ended[state.rule], state.index // levels, state.sizes[:, 0])
        line = torch.where(frames > 0, torch.maximum(frames, levels), 0)
        return torch.where(self.raster[state.rule], state.sizes.max(1).values, line)

    def settle(self, state: State, request: Request, ids: Tensor) -> State:
        """The states after `advance` with ids (B,); rows that have what they were asked for end."""
        stopped = (ids < SPECIAL_SIZE) & request.stops[ids.clamp(max=SPECIAL_SIZE - 1)]
        whole = (state.phase == BETWEEN) & ((request.single & (state.items > 0)) | stopped)
        return state._replace(phase=torch.where(whole, DONE, state.phase))

    # What may come next

    def allowed(
        self, state: State, request: Request, remaining: Tensor, *, first: bool = False
    ) -> Allowed:
        """Ids that may come next so that the row can still end well.

        Args:
            state: where the rows stand.
            request: what they are asked for.
            remaining: (B,) ids that a row may still write, the next one counted in.
            first: nothing has been written yet.
        """
        phase, rule, index, sizes = state[:4]
        between, in_size, in_code = phase == BETWEEN, phase == SIZE, phase == CODE
        levels, header = self.num_levels[rule], self.header[rule]

        # Sizes: never so large that the codes would not fit, never zero.
        axis = self.axis[rule].gather(1, (index // 2).clamp(max=2)[:, None])
        capacity = remaining - (header - index) - 1 - TAIL
        written = torch.where(torch.arange(3, device=self.device) == axis, 1, sizes).prod(1)
        most = (capacity // (levels * written)).clamp(1, MAX_SIZE)
        forced = request.sizes.gather(1, axis)[:, 0]
        first_digit = index % 2 == 0
        chosen = sizes.gather(1, axis)[:, 0]  # the first digit, once it is written
        least_low = torch.where(first_digit, 0, (chosen == 0).long())
        most_digit = torch.where(
            first_digit,
            most // SIZE_BASE,
            torch.where(chosen == most // SIZE_BASE, most % SIZE_BASE, SIZE_BASE - 1),
        )
        forced_digit = torch.where(first_digit, forced // SIZE_BASE, forced % SIZE_BASE)
        low = torch.where(forced > 0, forced_digit, least_low) + self.digit
        high = torch.where(forced > 0, forced_digit, most_digit) + self.digit + 1

        # Codes: the level that is due; at a frame's start an open-ended item may close.
        level = self._place(state, index).level.clamp(max=self.starts.shape[1] - 1)
        boundary = in_code & self.open_ended[rule] & (level == 0)
        wanted = request.sizes[:, 0]
        full = remaining < levels + 1 + TAIL
        must_close = boundary & (((wanted > 0) & (index // levels >= wanted)) | full)
        may_close = boundary & (index > 0) & (wanted == 0)
        low = torch.where(in_code, self.starts[rule, level], low)
        high = torch.where(in_code, self.ends[rule, level], high)
        extra = torch.where(must_close | may_close | (phase == CLOSE), self.close[rule], -1)
        extra = torch.where(phase == DONE, self.grammar.eos, extra)

        words = between & request.text & (remaining > TAIL)
        low = torch.where(words, self.text.start, low)
        high = torch.where(words, self.text.end, high)
        ranged = in_size | (in_code & ~must_close) | words
        return Allowed(
            torch.where(ranged, low, 0),
            torch.where(ranged, high, 0),
            torch.where(
                between[:, None],
                self.openings(request, remaining, first=first),
                self.special == extra[:, None],
            ),
        )

    def openings(self, request: Request, remaining: Tensor, *, first: bool = False) -> Tensor:
        """bool (B, SPECIAL_SIZE): markers between items that leave room for what they entail."""
        markers = request.markers & (remaining[:, None] >= self.costs)
        return markers & ~(request.nonempty[:, None] & request.stops) if first else markers

    # Codes that surely follow

    def certain(self, state: State, request: Request, remaining: Tensor) -> Tensor:
        """(B,): how many of the next ids are codes whatever is drawn; without end in done rows."""
        levels, open_ended = self.num_levels[state.rule], self.open_ended[state.rule]
        wanted = request.sizes[:, 0]
        frames = torch.where(open_ended, wanted, state.sizes.prod(1))
        left = frames * levels - state.index
        counted = ~open_ended | ((wanted > 0) & (remaining > left + TAIL))
        count = torch.where(counted, left, -state.index % levels)
        count = torch.where(state.phase == CODE, count, 0)
        return torch.where(state.phase == DONE, _ENDLESS, count)

    def codes(self, state: State, steps: int) -> Codes:
        """The next `steps` ids, for rows of which `certain` says that they are codes."""
        index = state.index + torch.arange(steps, device=self.device)[:, None]
        place = self._place(state, index)
        level = place.level.clamp(max=self.starts.shape[1] - 1)
        return Codes(
            self.starts[state.rule, level],
            self.ends[state.rule, level],
            state.clock + torch.stack(place[1:], 1),
        )

    def advance_codes(self, state: State, steps: int) -> State:
        """The states after that many codes; done rows stay as they are."""
        writing = state.phase == CODE
        moved = state._replace(index=torch.where(writing, state.index + steps, state.index))
        return self._completed(moved, writing)
