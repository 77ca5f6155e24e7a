"""The vectorised grammar agrees with the grammar: what it allows parses, all else does not."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unimm.generation.grammar import BETWEEN, CODE, DONE, Allowed, Machine, Request
from unimm.generation.requests import ANSWER, Wish, request_of
from unimm.sequence import Grammar, GrammarError
from unimm.vocabulary import SPECIAL_SIZE, Vocabulary

ROWS = 16
GRAMMARS = {
    "frame": Grammar(
        Vocabulary(6, {"image": [5], "audio": [3, 4, 2], "semantic": [3]}, share={"video": "image"})
    ),
    "level": Grammar(
        Vocabulary(
            6,
            {"image": [5, 2], "video": [3, 3], "audio": [3, 4], "semantic": [3, 2]},
            audio_layout="level",
        )
    ),
    "text": Grammar(Vocabulary(6)),
    "one": Grammar(Vocabulary(1, {"semantic": [1]})),
}


def machine_of(grammar: Grammar) -> Machine:
    return Machine(grammar, torch.device("cpu"))


def request_for(
    grammar: Grammar,
    modality: str | None,
    sizes: tuple[int, int, int] = (0, 0, 0),
    rows: int = ROWS,
) -> Request:
    return request_of(grammar, [Wish(modality, sizes, 10**9)] * rows, torch.device("cpu"), ANSWER)


def mask_of(grammar: Grammar, allowed: Allowed) -> Tensor:
    """bool (B, V): everything that is allowed, markers included."""
    mask = allowed.mask(torch.arange(grammar.vocabulary.padded_size))
    assert not mask[:, :SPECIAL_SIZE].any()
    mask[:, :SPECIAL_SIZE] = allowed.markers
    return mask


class Walk(NamedTuple):
    """One row: ids from `<bos>` on, their positions (3, T), and codec items that it closed."""

    ids: Tensor
    positions: Tensor
    items: int


def wander(machine: Machine, request: Request, budget: int, seed: int) -> list[Walk]:
    """ROWS walks of at most `budget` ids, each step drawn evenly from what is allowed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((ROWS,), machine.grammar.bos)
    state = machine.initial(ROWS)
    steps, places, active = [ids], [machine.positions(state, ids)], [torch.ones(ROWS).bool()]
    state = machine.advance(state, ids)
    for number in range(budget):
        done = state.phase == DONE
        remaining = torch.full((ROWS,), budget - number)
        allowed = mask_of(machine.grammar, machine.allowed(state, request, remaining))
        assert allowed.any(1).all()
        assert not allowed[:, len(machine.grammar.vocabulary) :].any()
        certain = machine.certain(state, request, remaining)
        assert bool(((state.phase == CODE) | done | (certain == 0)).all())
        ids = torch.multinomial(allowed.double(), 1, generator=generator)[:, 0]
        assert ids[done].tolist() == [machine.grammar.eos] * int(done.sum())
        places.append(machine.positions(state, ids))
        steps.append(ids)
        active.append(~done)
        state = machine.settle(machine.advance(state, ids), request, ids)
        if bool((state.phase == DONE).all()):
            break
    done = state.phase == DONE
    assert done.all(), "a row did not end within its budget"
    written, where, live = torch.stack(steps, 1), torch.stack(places, 2), torch.stack(active, 1)
    return [
        Walk(written[row, live[row]], where[:, row, live[row]], int(state.items[row]))
        for row in range(ROWS)
    ]


@pytest.mark.parametrize("name", GRAMMARS)
@given(budget=st.integers(1, 60), seed=st.integers(0, 2**16))
@settings(max_examples=12)
def test_whatever_is_allowed_parses(name: str, budget: int, seed: int) -> None:
    grammar = GRAMMARS[name]
    for ids, positions, items in wander(
        machine_of(grammar), request_for(grammar, None), budget, seed
    ):
        assert len(ids) <= budget + 1
        spans = list(grammar.spans(ids))
        assert items == sum(span.kind in grammar.rules for span in spans)
        assert torch.equal(positions, grammar.layout(ids).positions)


MODALITIES = [(name, modality) for name, grammar in GRAMMARS.items() for modality in grammar.rules]


@pytest.mark.parametrize(("name", "modality"), MODALITIES)
@given(spare=st.integers(0, 40), seed=st.integers(0, 2**16))
@settings(max_examples=4)
def test_a_single_item_fits_every_budget(name: str, modality: str, spare: int, seed: int) -> None:
    grammar = GRAMMARS[name]
    rule = grammar.rules[modality]
    least = 3 + rule.header + rule.num_levels  # both markers, and room that <eos> would take
    walks = wander(machine_of(grammar), request_for(grammar, modality), least + spare, seed)
    for ids, positions, items in walks:
        assert items == 1
        assert len(ids) <= least + spare
        (segment,) = grammar.parse(ids, complete=False)
        assert segment.kind == modality
        assert segment.codes.numel() > 0
        assert torch.equal(positions, grammar.layout(ids, complete=False).positions)


def test_a_budget_is_used() -> None:
    """Sizes are bounded by the budget alone: the largest that fits is allowed, and comes up."""
    grammar = GRAMMARS["level"]
    rule = grammar.rules["image"]
    budget = 3 + rule.header + 2 * 7
    areas = {
        grammar.parse(walk.ids, complete=False)[0].codes[0].numel()
        for seed in range(4)
        for walk in wander(machine_of(grammar), request_for(grammar, "image"), budget, seed)
    }
    assert max(areas) == 7
    assert min(areas) < 7


@pytest.mark.parametrize(
    ("name", "modality", "sizes", "shape"),
    [
        ("frame", "image", (1, 2, 3), (1, 2, 3)),
        ("frame", "image", (1, 1, 257), (1, 1, 257)),
        ("frame", "video", (3, 1, 2), (1, 3, 1, 2)),
        ("frame", "audio", (5, 0, 0), (3, 5)),
        ("level", "image", (1, 3, 2), (2, 3, 2)),
        ("level", "video", (2, 2, 2), (2, 2, 2, 2)),
        ("level", "audio", (5, 0, 0), (2, 5)),
        ("level", "audio", (130, 0, 0), (2, 130)),
        ("level", "semantic", (4, 0, 0), (2, 4)),
    ],
)
@pytest.mark.parametrize("spare", [0, 50])
def test_forced_sizes(
    name: str, modality: str, sizes: tuple[int, int, int], shape: tuple[int, ...], spare: int
) -> None:
    grammar = GRAMMARS[name]
    rule = grammar.rules[modality]
    least = 3 + rule.header + torch.Size(shape).numel()
    request = request_for(grammar, modality, sizes)
    for walk in wander(machine_of(grammar), request, least + spare, seed=spare):
        (segment,) = grammar.parse(walk.ids, complete=False)
        assert segment.codes.shape == shape
        assert torch.equal(walk.positions, grammar.layout(walk.ids, complete=False).positions)


def viable(grammar: Grammar, prefix: list[int], token: int) -> bool:
    """Whether some sequence begins with these ids: the parser complains of nothing but the end."""
    try:
        grammar.parse(torch.tensor([*prefix, token]))
    except GrammarError as error:
        return str(error).startswith(f"position {len(prefix) + 1},")
    return True


@pytest.mark.parametrize("name", ["frame", "level"])
def test_allowed_is_exactly_what_the_parser_takes(name: str) -> None:
    """At every step of random walks, for the edges of every block and all markers."""
    grammar = GRAMMARS[name]
    machine, request = machine_of(grammar), request_for(grammar, None)
    plenty = torch.full((1,), 10**9)
    edges = {t for b in grammar.vocabulary for t in (b.start, b.start + 1, b.end - 1, b.end)}
    candidates = sorted(edges | set(range(14)))
    one = request_for(grammar, None, rows=1)
    for walk in wander(machine, request, 24, seed=3)[:6]:
        state = machine.initial(1)
        for at, token in enumerate(walk.ids[:-1].tolist()):
            state = machine.advance(state, torch.tensor([token]))
            allowed = mask_of(grammar, machine.allowed(state, one, plenty))[0]
            prefix: list[int] = walk.ids[: at + 1].tolist()
            for candidate in candidates:
                # The one thing that the machine refuses and the parser takes: an empty sound.
                empty = prefix[-1] in machine.open.tolist() and candidate in machine.close.tolist()
                expected = viable(grammar, prefix, candidate) and not empty
                assert bool(allowed[candidate]) == expected, (prefix, candidate)


@pytest.mark.parametrize("name", GRAMMARS)
def test_states_of_written_documents(name: str) -> None:
    """Read by the machine, a document ends between items, its clock where the next text stands."""
    grammar = GRAMMARS[name]
    machine = machine_of(grammar)
    for walk in wander(machine, request_for(grammar, None), 40, seed=5):
        state = machine.initial(1)
        for token in walk.ids[:-1].tolist():
            state = machine.advance(state, torch.tensor([token]))
        assert state.phase.tolist() == [BETWEEN]
        assert state.clock.tolist() == walk.positions[0, -1:].tolist()
        ended = machine.advance(state, walk.ids[-1:])
        assert ended.phase.tolist() == [DONE]
        again = machine.advance(ended, torch.tensor([grammar.bos]))
        assert all(torch.equal(a, b) for a, b in zip(again, ended, strict=True))
        one = request_for(grammar, None, rows=1)
        left = mask_of(grammar, machine.allowed(ended, one, torch.ones(1, dtype=torch.int64)))
        assert left.nonzero().tolist() == [[0, grammar.eos]]


@pytest.mark.parametrize(("name", "modality"), MODALITIES)
@pytest.mark.parametrize("sizes", [(0, 0, 0), (3, 2, 2)])
def test_codes_that_surely_follow(name: str, modality: str, sizes: tuple[int, int, int]) -> None:
    """Many steps at once are the same steps one by one: ranges, positions and the state after."""
    grammar = GRAMMARS[name]
    machine = machine_of(grammar)
    if not grammar.rules[modality].axes or modality == "image":
        sizes = (min(sizes[0], 1 if modality == "image" else 3), *sizes[1:])
    request = request_for(grammar, modality, sizes)
    budget = 40
    for walk in wander(machine, request, budget, seed=1)[:4]:
        one = request_for(grammar, modality, sizes, rows=1)
        state = machine.advance(machine.initial(1), walk.ids[:1])
        at, most = 1, 0
        while int(state.phase) != DONE:
            remaining = torch.tensor([budget - at + 1])
            count = int(machine.certain(state, one, remaining))
            most = max(most, count)
            if count:
                codes = machine.codes(state, count)
                ahead = machine.advance_codes(state, count)
                for number in range(count):
                    allowed = machine.allowed(state, one, remaining - number)
                    assert not allowed.markers.any()
                    assert torch.equal(codes.low[number], allowed.low)
                    assert torch.equal(codes.high[number], allowed.high)
                    token = walk.ids[at : at + 1]
                    assert torch.equal(codes.positions[number], machine.positions(state, token))
                    state, at = machine.advance(state, token), at + 1
                assert all(torch.equal(a, b) for a, b in zip(state, ahead, strict=True))
            else:
                token = walk.ids[at : at + 1]
                state = machine.settle(machine.advance(state, token), one, token)
                at += 1
        assert at == len(walk.ids)
        levels = grammar.rules[modality].num_levels
        assert most >= (levels - 1 if not grammar.rules[modality].axes else levels)
