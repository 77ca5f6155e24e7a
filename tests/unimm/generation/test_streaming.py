"""Streams: pieces in order, whole items when joined, nothing held back without need."""

from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unimm import Audio, ModelConfig, UnifiedLM, UnifiedTokenizer, Video, generate, stream
from unimm.generation import join
from unimm.signals import Item
from unimm.tokenizer import modality_of


@pytest.fixture(params=["frame_tok", "level_tok"])
def tok(request: pytest.FixtureRequest) -> UnifiedTokenizer:
    return request.getfixturevalue(request.param)


def assert_same(one: list[Item], other: list[Item]) -> None:
    assert list(map(modality_of, one)) == list(map(modality_of, other))
    for left, right in zip(one, other, strict=True):
        if isinstance(left, Audio) and isinstance(right, Audio):
            torch.testing.assert_close(left.samples, right.samples, rtol=0, atol=1e-5)
        elif isinstance(left, Video) and isinstance(right, Video):
            assert left.frames.shape == right.frames.shape
            assert int((left.frames.int() - right.frames.int()).abs().max()) <= 1
        elif isinstance(left, Image.Image) and isinstance(right, Image.Image):
            pixels = [np.asarray(image, np.int16) for image in (left, right)]
            assert int(np.abs(pixels[0] - pixels[1]).max()) <= 1
        elif isinstance(left, str):
            assert left == right


@pytest.mark.parametrize("modality", [None, "text", "image", "audio", "video", "semantic"])
def test_pieces_joined_are_the_document(
    modality: str | None, tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    kinds = set()
    for seed in range(6 if modality is None else 2):
        options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 5.0, "seed": seed}
        document = generate(tiny_lm, tok, ["up"], modality, **options)[0]
        pieces = list(stream(tiny_lm, tok, ["up"], modality, **options))
        assert_same(join(pieces), document)
        kinds |= {modality_of(item) for item in document}
        groups = [list(own) for _, own in groupby(pieces, key=lambda piece: piece.item)]
        assert [own[0].item for own in groups] == list(range(len(document)))
        segments = tok.segments(document[:0]) if not document else None
        assert segments is None or segments == []
        for own in groups:
            assert [piece.final for piece in own] == [False] * (len(own) - 1) + [True]
            assert len({piece.kind for piece in own}) == 1
    assert kinds >= ({"text", "user"} if modality is None else {modality})


def test_codes_of_the_pieces_are_the_items_codes(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    for modality, size in (("image", (8, 12)), ("audio", 0.06), ("video", (5, 4, 8))):
        pieces = list(stream(tiny_lm, tok, ["up"], modality, size=size, seed=1, temperature=5.0))
        codes = torch.cat([piece.codes for piece in pieces])
        sizes = {"image": (1, 2, 3), "audio": (6, 1, 1), "video": (3, 1, 2)}[modality]
        rule = tok.grammar.rule(modality)
        assert len(codes) == rule.count(sizes)
        assert int(codes.min()) >= 0
        assert int(codes.max()) < tok.codecs[modality].codebook_size


def test_a_picture_grows_by_rows(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    """Cut to 10 x 9 pixels: three rows of codes of 4 pixels, the last one cut."""
    pieces = list(stream(tiny_lm, tok, ["up"], "image", size=(10, 9), seed=0, temperature=5.0))
    pictures = [piece.content for piece in pieces if isinstance(piece.content, Image.Image)]
    assert [picture.size for picture in pictures] == [(9, 4), (9, 8), (9, 10)]
    assert [len(piece.codes) for piece in pieces] == [3, 3, 3]


def test_sound_comes_before_it_is_whole(
    frame_tok: UnifiedTokenizer, level_tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    """100 code frames a second, 8 samples each: the first one at once, then chunks of 80 ms."""
    options: dict[str, Any] = {"size": 0.2, "seed": 0, "temperature": 5.0}
    pieces = list(stream(tiny_lm, frame_tok, ["up"], "audio", **options))
    sounds = [piece.content for piece in pieces if isinstance(piece.content, Audio)]
    assert [sound.samples.shape[1] for sound in sounds] == [8, 64, 64, 24]
    assert len(pieces[0].codes) == 2
    # Level by level nothing sounds before the last level begins.
    pieces = list(stream(tiny_lm, level_tok, ["up"], "audio", **options))
    sounds = [piece.content for piece in pieces if isinstance(piece.content, Audio)]
    assert [sound.samples.shape[1] for sound in sounds] == [8, 64, 64, 24]
    assert len(pieces[0].codes) == 21


def test_half_a_character_is_held_back(frame_tok: UnifiedTokenizer) -> None:
    """A model that can only write the bytes of one euro sign, and the end."""
    euro = frame_tok.text.encode("\u20ac").tolist()
    assert len(euro) == 3
    start = frame_tok.vocabulary["text"].start
    chain = [frame_tok.grammar.bos, *(start + piece for piece in euro), frame_tok.grammar.eos]
    pieces = list(stream(chain_lm(frame_tok, chain), frame_tok, [], "text", temperature=0.0))
    assert [piece.content for piece in pieces] == ["\u20ac", ""]
    broken = [*chain[:3], frame_tok.grammar.eos]
    lm = chain_lm(frame_tok, broken)
    pieces = list(stream(lm, frame_tok, [], "text", temperature=0.0))
    assert [piece.content for piece in pieces] == ["\ufffd\ufffd"]
    assert generate(lm, frame_tok, [], "text", temperature=0.0) == [["\ufffd\ufffd"]]


def chain_lm(tok: UnifiedTokenizer, chain: list[int]) -> UnifiedLM:
    """A model that writes `chain`, one id after the other: embeddings of one axis each."""
    width = 32
    config = ModelConfig(
        vocab_size=tok.vocabulary.padded_size,
        d_model=width,
        num_layers=1,
        num_heads=1,
        tied_embeddings=False,
    )
    lm = UnifiedLM(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.zero_()
        lm.norm.weight.fill_(1.0)
        assert lm.head is not None
        for axis, (token, following) in enumerate(pairwise(chain)):
            lm.embedding.weight[token, axis] = 1.0
            lm.head.weight[following, axis] = 1.0
    return lm
