"""The decoding loop against the plain way: the whole sequence through the model at every step."""

from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from unimm import Audio, Semantic, UnifiedLM, UnifiedTokenizer, Video
from unimm.generation.engine import pad_prompts, require_pair, run
from unimm.generation.grammar import Machine, Request
from unimm.generation.sampling import Sampling, guided
from unimm.model import KVCache
from unimm.sequence import Grammar
from unimm.signals import Item
from unimm.vocabulary import Vocabulary

PROMPTS: dict[str, list[Item]] = {
    "empty": [],
    "text": ["seven"],
    "image": [Image.new("RGB", (12, 8), "red"), "up"],
    "audio": [Audio(torch.linspace(-1, 1, 40)[None], 800)],
    "video": ["left", Video(torch.zeros(3, 4, 8, 3, dtype=torch.uint8), 10.0)],
    "semantic": [Semantic(Image.linear_gradient("L").resize((16, 16)).convert("RGB"))],
}


@pytest.fixture(params=["frame_tok", "level_tok"])
def tok(request: pytest.FixtureRequest) -> UnifiedTokenizer:
    return request.getfixturevalue(request.param)


def anything(tok: UnifiedTokenizer, rows: int) -> Request:
    between = torch.zeros(tok.vocabulary.padded_size, dtype=torch.bool)
    text = tok.vocabulary["text"]
    between[text.start : text.end] = True
    between[[tok.grammar.eos, *(rule.open for rule in tok.grammar.rules.values())]] = True
    sizes = torch.zeros(rows, 3, dtype=torch.int64)
    return Request(between.expand(rows, -1), torch.zeros(rows).bool(), sizes)


def only(tok: UnifiedTokenizer, modality: str, rows: int) -> Request:
    between = torch.zeros(tok.vocabulary.padded_size, dtype=torch.bool)
    between[tok.grammar.rules[modality].open] = True
    sizes = torch.zeros(rows, 3, dtype=torch.int64)
    return Request(between.expand(rows, -1), torch.ones(rows).bool(), sizes)


def encoded(tok: UnifiedTokenizer, *names: str) -> list[Tensor]:
    return [tok.encode(PROMPTS[name], complete=False) for name in names]


def written(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompts: Sequence[Tensor],
    request: Request,
    sampling: Sampling,
    max_new: int = 14,
    unconditional: Sequence[Tensor] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    seeds = range(len(prompts)) if seeds is None else seeds
    for step in run(lm, tok.grammar, prompts, request, sampling, max_new, seeds, unconditional):
        assert step.ids.shape == step.active.shape == (len(prompts),)
        for row, (token, active) in enumerate(zip(step.ids.tolist(), step.active, strict=True)):
            if active:
                rows[row].append(token)
            else:  # rows that are done wait on <eos>
                assert token == tok.grammar.eos
    return rows


@torch.no_grad()
@pytest.mark.parametrize("name", PROMPTS)
def test_cached_logits_are_the_uncached_ones(
    name: str, tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    """Every modality, its own positions: read at once, and id by id behind a cached beginning."""
    ids = tok.encode(PROMPTS[name])
    positions = tok.grammar.layout(ids).positions[:, None]
    whole = tiny_lm(ids[None], positions)[0]
    for beginning in (1, len(ids) // 2):
        cache = KVCache(tiny_lm.config, 1, len(ids))
        hidden = [tiny_lm.hidden(ids[None, :beginning], positions[:, :, :beginning], cache=cache)]
        cache.advance(beginning)
        for at in range(beginning, len(ids)):
            new = slice(at, at + 1)
            hidden.append(tiny_lm.hidden(ids[None, new], positions[:, :, new], cache=cache))
            cache.advance(1)
        logits = torch.cat(hidden, 1)[0] @ tiny_lm.head_weight.T
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)


@torch.no_grad()
def plain(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompt: Tensor,
    request: Request,
    max_new: int,
    scale: float = 1.0,
) -> list[int]:
    """The most likely ids under the grammar, without any cache and with the parser's positions."""
    machine = Machine(tok.grammar, tok.vocabulary.padded_size, torch.device("cpu"))
    state = machine.initial(1)
    for token in prompt.tolist():
        state = machine.advance(state, torch.tensor([token]))
    state = state._replace(items=torch.zeros_like(state.items))
    # Sequences that are still open have no layout yet: the machine's positions, tested against it.
    starts = [prompt] if scale == 1.0 else [prompt, prompt[:1]]
    rows = [(start, _positions(machine, start)) for start in starts]
    new: list[int] = []
    while len(new) < max_new and not bool(machine.finished(state, request)):
        logits = [lm(ids[None], where[:, None])[:, -1] for ids, where in rows]
        scores = logits[0] if scale == 1.0 else guided(logits[0], logits[1], scale)
        allowed = machine.allowed(state, request, torch.tensor([max_new - len(new)]))
        token = scores.masked_fill(~allowed, -torch.inf).argmax(1)
        new.append(int(token))
        state = machine.advance(state, token)
        joined = [torch.cat([ids, token]) for ids, _ in rows]
        rows = [(ids, _positions(machine, ids)) for ids in joined]
    return new


def _positions(machine: Machine, ids: Tensor) -> Tensor:
    state, places = machine.initial(1), []
    for token in ids.split(1):
        places.append(machine.positions(state, token))
        state = machine.advance(state, token)
    return torch.cat(places, 1)


@pytest.mark.parametrize("modality", [None, "image", "audio", "video", "semantic"])
def test_the_loop_is_the_plain_way(
    modality: str | None, tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    """Prompts of all lengths in one batch, each row as if it were alone and uncached."""
    prompts = encoded(tok, *PROMPTS)
    kind = anything(tok, len(prompts)) if modality is None else only(tok, modality, len(prompts))
    rows = written(tiny_lm, tok, prompts, kind, Sampling(temperature=0.0), 14)
    one = Request(kind.between[:1], kind.single[:1], kind.sizes[:1])
    for prompt, ids in zip(prompts, rows, strict=True):
        assert ids == plain(tiny_lm, tok, prompt, one, 14)
        tok.grammar.parse(torch.cat([prompt, torch.tensor(ids)]), complete=modality is None)


@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_guidance_is_the_plain_way(scale: float, tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    prompts = encoded(tok, "text", "image")
    bare = [prompt[:1] for prompt in prompts]
    sampling = Sampling(temperature=0.0, guidance=scale)
    request = only(tok, "audio", 2)
    rows = written(tiny_lm, tok, prompts, request, sampling, unconditional=bare)
    one = Request(request.between[:1], request.single[:1], request.sizes[:1])
    for prompt, ids in zip(prompts, rows, strict=True):
        assert ids == plain(tiny_lm, tok, prompt, one, 14, scale)


def test_guidance_of_one_is_none(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    prompts = encoded(tok, "text", "image")
    bare = [prompt[:1] for prompt in prompts]
    request, sampling = only(tok, "image", 2), Sampling(temperature=5.0)
    with_bare = written(tiny_lm, tok, prompts, request, sampling, unconditional=bare)
    assert with_bare == written(tiny_lm, tok, prompts, request, sampling)


def test_a_row_does_not_depend_on_its_batch(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    names = ["text", "image", "empty", "video", "audio", "semantic"]
    prompts, sampling = encoded(tok, *names), Sampling(temperature=5.0)
    request = anything(tok, len(prompts))
    together = written(tiny_lm, tok, prompts, request, sampling, seeds=range(50, 56))
    assert len({tuple(ids) for ids in together}) == len(together)
    one = anything(tok, 1)
    for row, prompt in enumerate(prompts):
        alone = written(tiny_lm, tok, [prompt], one, sampling, seeds=[50 + row])
        assert alone == [together[row]]


def test_seeds_decide(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    prompts, request = encoded(tok, "text", "text", "text"), only(tok, "image", 3)
    sampling = Sampling(temperature=5.0)
    first, second, third = written(tiny_lm, tok, prompts, request, sampling, seeds=[7, 8, 7])
    assert first == third != second


def test_the_budget_holds(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    prompts, request = encoded(tok, "text", "audio"), anything(tok, 2)
    for budget in (1, 2, 9, 30):
        rows = written(tiny_lm, tok, prompts, request, Sampling(temperature=5.0), budget)
        for prompt, ids in zip(prompts, rows, strict=True):
            assert 1 <= len(ids) <= budget
            assert ids[-1] == tok.grammar.eos
            tok.grammar.parse(torch.cat([prompt, torch.tensor(ids)]))


def test_prompts_are_padded_on_the_right() -> None:
    ids, lengths = pad_prompts([torch.tensor([1, 5]), torch.tensor([1, 6, 7])], pad=0)
    assert ids.tolist() == [[1, 5, 0], [1, 6, 7]]
    assert lengths.tolist() == [2, 3]


def test_text_alone(frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    """A vocabulary without any codec has no rule, and still generates."""
    grammar = Grammar(Vocabulary(10))
    between = torch.zeros(tiny_lm.config.vocab_size, dtype=torch.bool)
    between[[grammar.eos, *range(288, 298)]] = True
    request = Request(between[None], torch.zeros(1).bool(), torch.zeros(1, 3, dtype=torch.int64))
    prompt = torch.tensor([grammar.bos])
    sampling = Sampling(temperature=5.0)
    ids = [int(step.ids) for step in run(tiny_lm, grammar, [prompt], request, sampling, 9, [0])]
    assert [segment.kind for segment in grammar.parse(torch.cat([prompt, torch.tensor(ids)]))] == [
        "text"
    ]


def test_a_strange_pair_is_refused(tiny_lm: UnifiedLM, frame_tok: UnifiedTokenizer) -> None:
    require_pair(tiny_lm, frame_tok.vocabulary)
    with pytest.raises(ValueError, match="the model writes 640 ids, the tokenizer has 384: they"):
        require_pair(tiny_lm, Vocabulary(10))
