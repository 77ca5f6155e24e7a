"""Scores are sums of log-softmax, and nothing else."""

import math
from typing import Any, Literal

import pytest
import torch
from PIL import Image

from unimm import Audio, Semantic, UnifiedLM, UnifiedTokenizer, Video, score
from unimm.generation import classify
from unimm.signals import Item
from unimm_kernels import linear_cross_entropy
from unimm_tokenizers.vision import VisionCodec, VisionConfig

SOUND = Audio(torch.linspace(-1, 1, 40)[None], 800)
DOCUMENT: list[Item] = [
    "seven",
    Image.linear_gradient("L").resize((12, 8)).convert("RGB"),
    Audio(torch.linspace(-1, 1, 40)[None], 800),
    "up",
    Video(torch.zeros(3, 4, 8, 3, dtype=torch.uint8), 10.0),
    Semantic(Image.radial_gradient("L").resize((16, 16)).convert("RGB")),
]


@pytest.fixture(params=["frame_tok", "level_tok"])
def tok(request: pytest.FixtureRequest) -> UnifiedTokenizer:
    return request.getfixturevalue(request.param)


@torch.no_grad()
def test_scores_are_sums_of_log_softmax(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    ids = tok.encode(DOCUMENT)
    positions = tok.grammar.layout(ids).positions[:, None]
    found = score(tiny_lm, tok, DOCUMENT)
    assert found.tokens.shape == (len(ids) - 1,)
    logits = tiny_lm(ids[None], positions)[0, :-1]
    used = logits[:, : len(tok.vocabulary)]  # padding ids are never written
    expected = used.log_softmax(1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(found.tokens, expected, rtol=0, atol=1e-5)
    assert found.total == pytest.approx(float(expected.sum()), abs=1e-4)

    spans = list(tok.grammar.spans(ids))
    assert len(found.items) == len(DOCUMENT)
    for item, span in zip(found.items, spans, strict=True):
        assert item == pytest.approx(
            float(expected[span.start - 1 : span.stop - 1].sum()), abs=1e-4
        )
    end = float(found.tokens[-1])  # <eos> belongs to no item
    assert sum(found.items) + end == pytest.approx(found.total, abs=1e-4)


@torch.no_grad()
def test_scores_agree_with_the_training_loss(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    ids = tok.encode(DOCUMENT)
    positions = tok.grammar.layout(ids).positions[:, None, :-1]
    hidden = tiny_lm.hidden(ids[None, :-1], positions)[0]
    nll = linear_cross_entropy(
        hidden, tiny_lm.head_weight[: len(tok.vocabulary)], ids[1:], implementation="torch"
    )[1]
    torch.testing.assert_close(-nll, score(tiny_lm, tok, DOCUMENT).tokens, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_model_that_knows_nothing_is_uniform(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    lm = UnifiedLM(tiny_lm.config).eval()
    lm.embedding.weight.zero_()
    found = score(lm, tok, ["seven"])
    count = len(tok.encode(["seven"])) - 1
    assert found.total == pytest.approx(-count * math.log(len(tok.vocabulary)), rel=1e-6)


def test_the_empty_document(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    found = score(tiny_lm, tok, [])
    assert found.items == []
    assert found.tokens.shape == (1,)
    assert found.total < 0


def test_likelihood_is_of_what_comes_before(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    """A longer document scores its beginning as the beginning alone."""
    whole, part = score(tiny_lm, tok, DOCUMENT), score(tiny_lm, tok, DOCUMENT[:3])
    count = len(part.tokens) - 1
    torch.testing.assert_close(whole.tokens[:count], part.tokens[:count], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("normalise", ["none", "ids"])
def test_the_likeliest_candidate(
    normalise: Literal["none", "ids"], tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    """As if each document were scored alone, whatever their lengths and kinds."""
    prompt, candidates = DOCUMENT[:2], [["seven"], [], ["up down left", SOUND], [DOCUMENT[1]]]
    found = classify(tiny_lm, tok, prompt, candidates, normalise=normalise)
    start = len(tok.encode(prompt, complete=False)) - 1
    expected = []
    for candidate in candidates:
        # An item of its own: what follows text in one document is joined to it.
        tokens = score(tiny_lm, tok, [*prompt, *candidate]).tokens[start:]
        expected.append(tokens.mean() if normalise == "ids" else tokens.sum())
    log_likelihoods = torch.stack(expected).double()
    torch.testing.assert_close(found.log_likelihoods, log_likelihoods, rtol=0, atol=1e-3)
    assert found.index == int(log_likelihoods.argmax())
    torch.testing.assert_close(found.probabilities, found.log_likelihoods.softmax(0))


def test_candidates_of_nothing(frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    with pytest.raises(ValueError, match="classify: there are no candidates"):
        classify(tiny_lm, frame_tok, ["up"], [])
    normalise: Any = "length"
    with pytest.raises(ValueError, match="normalise must be 'none' or 'ids', got 'length'"):
        classify(tiny_lm, frame_tok, ["up"], [["a"]], normalise=normalise)


def test_a_strange_pair_is_refused(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    with pytest.raises(ValueError, match="they do not belong together"):
        score(tiny_lm, UnifiedTokenizer(tok.text, [VisionCodec(VisionConfig(channels=4))]), [])
