"""`generate`, `generate_batch`, `stream`: whatever an untrained model writes is a document."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unimm import (
    Audio,
    ModelConfig,
    Semantic,
    Turn,
    UnifiedLM,
    UnifiedTokenizer,
    Video,
    generate,
    stream,
)
from unimm.generation import generate_batch
from unimm.signals import Item
from unimm.tokenizer import modality_of
from unimm_tokenizers.vision import VisionCodec, VisionConfig

MODALITIES = ["text", "image", "audio", "video", "semantic"]
PICTURE = Image.linear_gradient("L").resize((12, 8)).convert("RGB")


@pytest.fixture(params=["frame_tok", "level_tok"])
def tok(request: pytest.FixtureRequest) -> UnifiedTokenizer:
    return request.getfixturevalue(request.param)


def same_item(one: Item, other: Item) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Audio) and isinstance(other, Audio):
        samples = one.samples, other.samples
        return samples[0].shape == samples[1].shape and torch.allclose(*samples, atol=1e-5)
    if isinstance(one, Video) and isinstance(other, Video):
        return torch.equal(one.frames, other.frames)
    if isinstance(one, Semantic) and isinstance(other, Semantic):
        return same_item(one.image, other.image)
    if isinstance(one, Image.Image) and isinstance(other, Image.Image):
        # Decoding another number at once may round a pixel the other way.
        pixels = [np.asarray(image, np.int16) for image in (one, other)]
        return one.size == other.size and int(np.abs(pixels[0] - pixels[1]).max()) <= 1
    return one == other


def same(one: Sequence[Item], other: Sequence[Item]) -> bool:
    return len(one) == len(other) and all(map(same_item, one, other))


# Whatever comes decodes


@pytest.mark.parametrize("modality", [None, *MODALITIES])
def test_an_untrained_model_writes_documents(
    modality: str | None, tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    documents = generate(
        *(tiny_lm, tok, ["seven"], modality),
        num_samples=40,
        max_new_tokens=20,
        temperature=5.0,
        seed=0,
    )
    assert len(documents) == 40
    kinds = [[modality_of(item) for item in document] for document in documents]
    if modality is None:
        assert {"user", "assistant", *MODALITIES} >= {kind for row in kinds for kind in row}
        assert len({kind for row in kinds for kind in row}) >= 5
    elif modality == "text":
        assert all(row in ([], ["text"]) for row in kinds)
    else:
        assert kinds == [[modality]] * 40
        for (item,) in documents:
            if isinstance(item, Audio):
                assert item.samples.abs().max() <= 1
                assert item.seconds > 0


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"guidance": 3.0, "temperature": 5.0}],
)
def test_every_way_of_sampling_decodes(
    sampling: dict[str, Any], tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    for modality in (None, "audio", "image"):
        documents = generate(
            *(tiny_lm, tok, [PICTURE], modality),
            num_samples=3,
            max_new_tokens=20,
            seed=1,
            **sampling,
        )
        assert len(documents) == 3


@pytest.mark.parametrize(
    ("modality", "size", "shape"),
    [
        ("image", (8, 16), (8, 16, 3)),
        ("image", (5, 9), (5, 9, 3)),  # two by three codes, cut to what was asked for
        ("image", (1, 1), (1, 1, 3)),
        ("audio", 0.05, (1, 40)),
        ("audio", 0.0525, (1, 42)),
        ("audio", 1e-9, (1, 1)),
        ("video", (5, 4, 8), (5, 4, 8, 3)),
        ("video", (1, 4, 4), (1, 4, 4, 3)),
        ("video", (4, 3, 6), (4, 3, 6, 3)),
    ],
)
def test_forced_sizes(
    modality: str, size: Any, shape: tuple[int, ...], tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    for sampler in (generate, stream):
        options: dict[str, Any] = {"size": size, "temperature": 5.0, "seed": 3}
        made = sampler(tiny_lm, tok, ["up"], modality, **options)
        item = made[0][0] if isinstance(made, list) else next(iter(made))
        if isinstance(item, Audio):
            assert item.samples.shape == shape
        elif isinstance(item, Video):
            assert item.frames.shape == shape
        else:
            assert np.asarray(item).shape == shape


def test_sizes_of_two_digits(frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    ((item,),) = generate(tiny_lm, frame_tok, [], "image", size=(4, 257 * 4), seed=0)
    assert isinstance(item, Image.Image)
    assert item.size == (257 * 4, 4)


# Seeds, prompts, batches


def test_seeds(frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    def sample(seed: int | None, count: int = 1) -> list[list[Item]]:
        return generate(
            *(tiny_lm, frame_tok, ["up"], "audio"),
            num_samples=count,
            max_new_tokens=40,
            temperature=5.0,
            seed=seed,
        )

    three = sample(5, 3)
    for number in range(3):
        assert same(sample(5 + number)[0], three[number])
    assert not same(three[0], three[1])
    assert not same(sample(None)[0], sample(None)[0])
    assert sample(5, 0) == []
    assert generate_batch(tiny_lm, frame_tok, []) == []


def test_a_batch_of_prompts_is_each_of_them(
    frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    prompts: list[list[Item]] = [["up"], [PICTURE, "seven eight nine"], [], [Turn("user"), "up"]]
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 5.0}
    together = generate_batch(tiny_lm, frame_tok, prompts, seeds=[4, 5, 6, 7], **options)
    for prompt, seed, document in zip(prompts, [4, 5, 6, 7], together, strict=True):
        assert same(generate(tiny_lm, frame_tok, prompt, seed=seed, **options)[0], document)
    unnamed = generate_batch(tiny_lm, frame_tok, prompts[:2], **options)
    assert same(unnamed[1], generate(tiny_lm, frame_tok, prompts[1], seed=1, **options)[0])


def test_prompts_are_read_as_documents_are(frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    """Strings side by side are one text, in a prompt as in a training document."""
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 5.0, "seed": 2}
    prompt = ["se", "", "ven"]
    whole = generate(tiny_lm, frame_tok, ["seven"], **options)
    assert same(generate(tiny_lm, frame_tok, prompt, **options)[0], whole[0])
    assert prompt == ["se", "", "ven"]


def test_defaults_of_the_bundle(frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    explicit: dict[str, Any] = {"temperature": 3.0, "top_k": 4, "guidance": 2.0}
    tok = UnifiedTokenizer(
        frame_tok.text,
        list(dict.fromkeys(frame_tok.codecs.values())),
        defaults={"audio": explicit, "any": {"temperature": 0.0}},
    )
    options: dict[str, Any] = {"max_new_tokens": 40, "seed": 1}

    def pair(modality: str | None, **given: Any) -> tuple[list[Item], list[Item]]:
        with_defaults = generate(tiny_lm, tok, ["up"], modality, **options)[0]
        return with_defaults, generate(tiny_lm, frame_tok, ["up"], modality, **options, **given)[0]

    assert same(*pair("audio", **explicit))
    assert not same(*pair("audio"))
    assert same(*pair(None, temperature=0.0))
    assert same(*pair("image"))
    given = generate(tiny_lm, tok, ["up"], "audio", temperature=0.5, **options)[0]
    expected = {**explicit, "temperature": 0.5}
    assert same(given, generate(tiny_lm, frame_tok, ["up"], "audio", **options, **expected)[0])
    # Without a condition there is nothing to be guided by: the default does not apply.
    bare = generate(tiny_lm, tok, [], "audio", **options)[0]
    unguided = {**explicit, "guidance": 1.0}
    assert same(bare, generate(tiny_lm, frame_tok, [], "audio", **options, **unguided)[0])


def test_guidance_moves_what_is_written(frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    options: dict[str, Any] = {"modality": "image", "size": (16, 16), "seed": 0}
    plain, guided, same_as_plain = (
        generate(tiny_lm, frame_tok, ["up"], guidance=scale, **options)[0]
        for scale in (None, 300.0, 1.0)
    )
    assert same(plain, same_as_plain)
    assert not same(plain, guided)


# Streaming


@pytest.mark.parametrize("modality", [None, "text", "audio", "video"])
def test_streamed_pieces_joined_are_the_document(
    modality: str | None, tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    kinds = set()
    for seed in range(6):
        options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 5.0, "seed": seed}
        document = generate(tiny_lm, tok, ["up"], modality, **options)[0]
        pieces = list(stream(tiny_lm, tok, ["up"], modality, **options))
        assert "" not in pieces
        streamed: list[Item] = []
        for piece in pieces:
            if isinstance(piece, str) and streamed and isinstance(streamed[-1], str):
                streamed[-1] = streamed[-1] + piece
            else:
                streamed.append(piece)
        assert same(streamed, document)
        kinds |= {modality_of(item) for item in document}
    assert kinds >= ({"text", "user"} if modality is None else {modality})


def test_half_a_character_is_held_back(frame_tok: UnifiedTokenizer) -> None:
    """A model that can only write the bytes of one euro sign, and the end."""
    euro = frame_tok.text.encode("\u20ac").tolist()
    assert len(euro) == 3
    start = frame_tok.vocabulary["text"].start
    chain = [frame_tok.grammar.bos, *(start + piece for piece in euro), frame_tok.grammar.eos]
    pieces = list(stream(chain_lm(frame_tok, chain), frame_tok, [], "text", temperature=0.0))
    assert pieces == ["\u20ac"]
    broken = [*chain[:3], frame_tok.grammar.eos]
    lm = chain_lm(frame_tok, broken)
    assert list(stream(lm, frame_tok, [], "text", temperature=0.0)) == ["\ufffd\ufffd"]
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


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality": "smell"}, "there is no codec for 'smell' here; modalities are text, image"),
        ({"size": (8, 8)}, "size needs modality 'image', 'video' or 'audio', not None"),
        ({"modality": "text", "size": 3}, "size needs modality"),
        ({"modality": "semantic", "size": 3}, "size needs modality"),
        ({"modality": "image", "size": 8}, r"the size of image is \(height, width\), got 8"),
        ({"modality": "image", "size": (8, 8, 8)}, r"image is \(height, width\), got \(8, 8, 8\)"),
        ({"modality": "image", "size": (8, 0)}, r"image is \(height, width\), got \(8, 0\)"),
        ({"modality": "image", "size": (8.5, 8)}, r"image is \(height, width\), got \(8.5, 8\)"),
        ({"modality": "image", "size": (8, 300_000)}, "takes 75000 codes a side: at most 65535"),
        ({"modality": "video", "size": (8, 8)}, r"video is \(frames, height, width\), got"),
        ({"modality": "audio", "size": (8, 8)}, r"a sound is its length in seconds, got \(8, 8\)"),
        ({"modality": "audio", "size": 0}, "a sound is its length in seconds, got 0"),
        ({"modality": "audio", "size": -1.0}, "length in seconds, got -1.0"),
        ({"modality": "audio", "size": float("inf")}, "length in seconds, got inf"),
        ({"modality": "audio", "size": float("nan")}, "length in seconds, got nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; what is asked for needs at least 1"),
        ({"modality": "image", "max_new_tokens": 7}, "is 7; what is asked for needs at least 8"),
        (
            {"modality": "image", "size": (8, 8), "max_new_tokens": 10},
            "max_new_tokens is 10; what is asked for needs at least 11",
        ),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"top_k": 0}, "top_k must be 1 or more"),
        ({"num_samples": -1}, "num_samples must be 0 or more, got -1"),
        ({"prompt": [], "guidance": 3.0}, "guidance needs a condition: the prompt is empty"),
        ({"prompt": ["up", 3]}, "item 1: a document holds str, PIL images, .* not int"),
    ],
)
def test_senseless_requests_are_refused(
    options: dict[str, Any], message: str, frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        generate(tiny_lm, frame_tok, **{"prompt": ["up"], **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lm, tok: generate_batch(lm, tok, [["up"]], temprature=1.0),
            "unknown sampling option 'temprature'; known are guidance, temperature, top_k, top_p",
        ),
        (
            lambda lm, tok: generate_batch(lm, tok, [["up"], ["up"]], seeds=[1]),
            "2 prompts need as many seeds, got 1",
        ),
        (
            lambda lm, tok: generate(
                lm, UnifiedTokenizer(tok.text, [VisionCodec(VisionConfig(channels=4))]), ["a"]
            ),
            "the model writes 640 ids, the tokenizer has 1664: they do not belong together",
        ),
        (
            lambda lm, tok: generate(
                lm,
                UnifiedTokenizer(
                    tok.text,
                    list(dict.fromkeys(tok.codecs.values())),
                    defaults={"image": {"beams": 4}},
                ),
                ["up"],
                "image",
            ),
            "unknown sampling option 'beams'",
        ),
    ],
)
def test_mistakes_are_named(
    call: Callable[[UnifiedLM, UnifiedTokenizer], object],
    message: str,
    frame_tok: UnifiedTokenizer,
    tiny_lm: UnifiedLM,
) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny_lm, frame_tok)
