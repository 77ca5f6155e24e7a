"""The decoding loop against the plain way: the whole sequence through the model at every step."""

from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from unimm import Audio, Semantic, UnifiedLM, UnifiedTokenizer, Video
from unimm.generation.engine import FREE, Job, Reader, require_pair, run
from unimm.generation.grammar import DONE, Machine, Request
from unimm.generation.requests import Wish, request_of
from unimm.generation.sampling import Sampling, Settings, guided
from unimm.model import KVCache
from unimm.sequence import Grammar
from unimm.signals import Item
from unimm.vocabulary import SPECIAL_SIZE, Vocabulary

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


def wanted(tok: UnifiedTokenizer, modality: str | None, rows: int, budget: int = 14) -> Request:
    wish = Wish(modality, (0, 0, 0), budget)
    return request_of(tok.grammar, [wish] * rows, torch.device("cpu"))


def encoded(tok: UnifiedTokenizer, *names: str) -> list[Tensor]:
    return [tok.encode(PROMPTS[name], complete=False) for name in names]


def settings(tok: UnifiedTokenizer, sampling: Sampling) -> Settings:
    return Settings([sampling] * (1 + len(tok.grammar.rules)), torch.device("cpu"))


def written(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompts: Sequence[Tensor],
    request: Request,
    sampling: Sampling,
    *,
    unconditional: Sequence[Tensor] | None = None,
    seeds: Sequence[int] | None = None,
    given: Tensor | None = None,
) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    job = Job(
        prompts=prompts,
        request=request,
        settings=settings(tok, sampling),
        seeds=range(len(prompts)) if seeds is None else seeds,
        unconditional=unconditional,
        given=given,
    )
    for step in run(lm, tok.grammar, job):
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
    scale: float = 1.0,
) -> list[int]:
    """The most likely ids under the grammar, without any cache and with the parser's positions."""
    machine = Machine(tok.grammar, torch.device("cpu"))
    state = machine.initial(1)
    for token in prompt.tolist():
        state = machine.advance(state, torch.tensor([token]))
    state = state._replace(items=torch.zeros_like(state.items))
    # Sequences that are still open have no layout yet: the machine's positions, tested against it.
    starts = [prompt] if scale == 1.0 else [prompt, prompt[:1]]
    rows = [(start, _positions(machine, start)) for start in starts]
    new: list[int] = []
    while int(state.phase) != DONE:
        logits = [lm(ids[None], where[:, None])[:, -1] for ids, where in rows]
        scores = logits[0] if scale == 1.0 else guided(logits[0], logits[1], scale)
        allowed = machine.allowed(state, request, request.budget - len(new), first=not new)
        mask = allowed.mask(torch.arange(scores.shape[1]))
        mask[:, :SPECIAL_SIZE] |= allowed.markers
        token = scores.masked_fill(~mask, -torch.inf).argmax(1)
        new.append(int(token))
        state = machine.settle(machine.advance(state, token), request, token)
        joined = [torch.cat([ids, token]) for ids, _ in rows]
        rows = [(ids, _positions(machine, ids)) for ids in joined]
    return new


def _positions(machine: Machine, ids: Tensor) -> Tensor:
    state, places = machine.initial(1), []
    for token in ids.split(1):
        places.append(machine.positions(state, token))
        state = machine.advance(state, token)
    return torch.cat(places, 1)


@pytest.mark.parametrize("modality", [None, "text", "image", "audio", "video", "semantic"])
def test_the_loop_is_the_plain_way(
    modality: str | None, tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    """Prompts of all lengths in one batch, each row as if it were alone and uncached."""
    prompts = encoded(tok, *PROMPTS)
    request = wanted(tok, modality, len(prompts))
    rows = written(tiny_lm, tok, prompts, request, Sampling(temperature=0.0))
    for prompt, ids in zip(prompts, rows, strict=True):
        assert ids == plain(tiny_lm, tok, prompt, wanted(tok, modality, 1))
        tok.grammar.parse(
            torch.cat([prompt, torch.tensor(ids)]), complete=modality in (None, "text")
        )


@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_guidance_is_the_plain_way(scale: float, tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    prompts = encoded(tok, "text", "image")
    bare = [prompt[:1] for prompt in prompts]
    sampling = Sampling(temperature=0.0, guidance=scale)
    request = wanted(tok, "audio", 2)
    rows = written(tiny_lm, tok, prompts, request, sampling, unconditional=bare)
    for prompt, ids in zip(prompts, rows, strict=True):
        assert ids == plain(tiny_lm, tok, prompt, wanted(tok, "audio", 1), scale)


def test_guidance_of_one_is_none(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    prompts = encoded(tok, "text", "image")
    bare = [prompt[:1] for prompt in prompts]
    request, sampling = wanted(tok, "image", 2), Sampling(temperature=5.0)
    with_bare = written(tiny_lm, tok, prompts, request, sampling, unconditional=bare)
    assert with_bare == written(tiny_lm, tok, prompts, request, sampling)


def test_a_row_does_not_depend_on_its_batch(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    names = ["text", "image", "empty", "video", "audio", "semantic"]
    prompts, sampling = encoded(tok, *names), Sampling(temperature=5.0)
    request = wanted(tok, None, len(prompts))
    together = written(tiny_lm, tok, prompts, request, sampling, seeds=range(50, 56))
    assert len({tuple(ids) for ids in together}) == len(together)
    one = wanted(tok, None, 1)
    for row, prompt in enumerate(prompts):
        alone = written(tiny_lm, tok, [prompt], one, sampling, seeds=[50 + row])
        assert alone == [together[row]]


def test_seeds_decide(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    prompts, request = encoded(tok, "text", "text", "text"), wanted(tok, "image", 3)
    sampling = Sampling(temperature=5.0)
    first, second, third = written(tiny_lm, tok, prompts, request, sampling, seeds=[7, 8, 7])
    assert first == third != second


def test_the_budget_holds(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    prompts = encoded(tok, "text", "audio")
    for budget in (1, 2, 9, 30):
        request = wanted(tok, None, 2, budget)
        rows = written(tiny_lm, tok, prompts, request, Sampling(temperature=5.0))
        for prompt, ids in zip(prompts, rows, strict=True):
            assert 1 <= len(ids) <= budget
            assert ids[-1] == tok.grammar.eos
            tok.grammar.parse(torch.cat([prompt, torch.tensor(ids)]))


def test_rows_of_all_kinds_in_one_batch(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    """Modalities, sizes, budgets and prompts of their own: each row as if it were alone."""
    wishes = [
        Wish("image", (1, 2, 3), 13),
        Wish("audio", (3, 0, 0), 14),
        Wish(None, (0, 0, 0), 20),
        Wish("text", (0, 0, 0), 6),
        Wish("video", (2, 1, 2), 16),
        Wish("semantic", (0, 0, 0), 9),
    ]
    prompts, sampling = encoded(tok, *PROMPTS), Sampling(temperature=5.0)
    device = torch.device("cpu")
    together = written(tiny_lm, tok, prompts, request_of(tok.grammar, wishes, device), sampling)
    for row, (prompt, wish) in enumerate(zip(prompts, wishes, strict=True)):
        request = request_of(tok.grammar, [wish], device)
        assert written(tiny_lm, tok, [prompt], request, sampling, seeds=[row]) == [together[row]]


@torch.no_grad()
def test_equal_prompts_are_read_once(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    """Three rows, two prompts: the state behind each as if all three had been read."""
    text, image = encoded(tok, "text", "image")
    sequences = [text, image, text.clone()]
    positions = [tok.grammar.layout(ids, complete=False).positions for ids in sequences]
    shared = Reader(tiny_lm, sequences, positions, 4)
    new, where = torch.full((3,), 300), torch.tensor([9, 10, 11]).expand(3, -1)
    shared.feed(new, where)
    shared.feed(new, where + 1)
    assert shared.cache.lengths.tolist() == [len(ids) for ids in sequences]
    for row, (ids, place) in enumerate(zip(sequences, positions, strict=True)):
        alone = Reader(tiny_lm, [ids], [place], 4)
        alone.feed(new[:1], where[:, row : row + 1])
        alone.feed(new[:1], where[:, row : row + 1] + 1)
        torch.testing.assert_close(shared.hidden()[row], alone.hidden()[0], rtol=0, atol=1e-5)


def test_forced_ids_are_never_scored(
    tok: UnifiedTokenizer, tiny_lm: UnifiedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of a given size: only its codes ask the head, and only for their own block."""
    asked = []

    def logits(hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        asked.append((start, stop))
        return UnifiedLM.logits(tiny_lm, hidden, start, stop)

    monkeypatch.setattr(tiny_lm, "logits", logits)
    request = request_of(tok.grammar, [Wish("image", (1, 2, 3), 13)], torch.device("cpu"))
    (ids,) = written(tiny_lm, tok, encoded(tok, "text"), request, Sampling())
    block = tok.vocabulary["image.0"]
    assert asked == [(block.start, block.end)] * 6
    assert len(ids) == 1 + 4 + 6 + 1


def test_given_ids_stand_where_they_were_given(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    """Some rows' first codes, another row's last ones; what is free is drawn as it would be."""
    start = tok.vocabulary["image.0"].start
    header = [tok.grammar.rules["image"].open, *tok.grammar.size_ids(2), *tok.grammar.size_ids(2)]
    codes = [[start + 1, start + 2, FREE, FREE], [FREE, start + 3, FREE, start + 5]]
    given = torch.tensor([[*header, *row] for row in codes])
    request = request_of(tok.grammar, [Wish("image", (1, 2, 2), 11)] * 2, torch.device("cpu"))
    prompts, sampling = encoded(tok, "text", "image"), Sampling(temperature=0.0)
    rows = written(tiny_lm, tok, prompts, request, sampling, given=given)
    machine = Machine(tok.grammar, torch.device("cpu"))
    for prompt, known, ids in zip(prompts, given.tolist(), rows, strict=True):
        assert len(ids) == 10
        for at, token in enumerate(known):
            if token != FREE:
                assert ids[at] == token
                continue
            before = torch.cat([prompt, torch.tensor(ids[:at])])
            logits = tiny_lm(before[None], _positions(machine, before)[:, None])[0, -1]
            block = tok.vocabulary["image.0"]
            assert ids[at] == block.start + int(logits[block.start : block.end].argmax())


def test_text_alone(frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    """A vocabulary without any codec has no rule, and still generates."""
    grammar = Grammar(Vocabulary(10))
    job = Job(
        prompts=[torch.tensor([grammar.bos])],
        request=request_of(grammar, [Wish("text", (0, 0, 0), 9)], torch.device("cpu")),
        settings=Settings([Sampling(temperature=5.0)], torch.device("cpu")),
        seeds=[0],
    )
    ids = [int(step.ids) for step in run(tiny_lm, grammar, job)]
    segments = grammar.parse(torch.tensor([grammar.bos, *ids]))
    assert [segment.kind for segment in segments] == ["text"]


@pytest.mark.slow
def test_compiled_steps_are_the_eager_ones(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    compiled = UnifiedLM(tiny_lm.config).eval()
    compiled.load_state_dict(tiny_lm.state_dict())
    compiled.compile_step()
    prompts, sampling = encoded(tok, "text", "image"), Sampling(temperature=5.0)
    for modality in ("image", None):
        request = wanted(tok, modality, 2)
        assert written(compiled, tok, prompts, request, sampling) == written(
            tiny_lm, tok, prompts, request, sampling
        )


def test_a_strange_pair_is_refused(tiny_lm: UnifiedLM, frame_tok: UnifiedTokenizer) -> None:
    require_pair(tiny_lm, frame_tok.vocabulary)
    with pytest.raises(ValueError, match="the model writes 640 ids, the tokenizer has 384: they"):
        require_pair(tiny_lm, Vocabulary(10))
