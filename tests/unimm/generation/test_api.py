"""`generate`, `generate_batch`, `stream`: whatever an untrained model writes is a document."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unimm import (
    Audio,
    Semantic,
    Turn,
    UnifiedLM,
    UnifiedTokenizer,
    Video,
    generate,
    stream,
)
from unimm.generation import extend, generate_batch, infill, join
from unimm.generation.api import make_job, write
from unimm.sequence import Segment
from unimm.signals import Item
from unimm.tokenizer import modality_of
from unimm_tokenizers.vision import VisionCodec, VisionConfig

MODALITIES = ["text", "image", "audio", "video", "semantic"]
SOUND = Audio(torch.linspace(-1, 1, 40)[None], 800)
FRAMES = torch.arange(5 * 32 * 3).view(5, 4, 8, 3).to(torch.uint8)
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


@pytest.mark.slow
def test_ten_thousand_samples_at_five(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    """Of an untrained model, in all modalities at once: not one that does not parse and decode."""
    modalities = [None, *MODALITIES] * 834
    prompts: list[list[Item]] = [["seven"], [], [PICTURE]] * 1668
    sizes = [None] * len(modalities)
    count = 0
    for start in range(0, len(modalities), 834):
        part = slice(start, start + 834)
        seeds = list(range(start, start + 834))
        job = make_job(
            *(tiny_lm, tok, prompts[part], modalities[part], sizes[part], 24, seeds, None),
            {"temperature": 5.0},
        )
        segments = []
        for ids, modality in zip(write(tiny_lm, tok, job), modalities[part], strict=True):
            whole = torch.tensor([tok.grammar.bos, *ids])
            segments += tok.grammar.parse(whole, complete=modality in (None, "text"))
            count += 1
        assert len(tok.decode_segments(segments)) == len(segments)
    assert count == 5004  # with each of the two tokenizers


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
    options: dict[str, Any] = {"size": size, "temperature": 5.0, "seed": 3}
    whole = generate(tiny_lm, tok, ["up"], modality, **options)[0]
    streamed = join(stream(tiny_lm, tok, ["up"], modality, **options))
    assert same(streamed, whole)
    for item in (*whole, *streamed):
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
    own = {name: {"audio": value} for name, value in explicit.items()}
    mixed = {**own, "temperature": {"audio": 3.0, "text": 0.0, "image": 0.0, "video": 0.0}}
    mixed["temperature"]["semantic"] = 0.0
    assert same(*pair(None, **mixed))
    assert same(*pair("image", temperature=0.0))
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


def test_guidance_away_from_part_of_the_prompt(
    frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    """What is dropped decides; to drop all of it is the default."""
    options: dict[str, Any] = {"modality": "image", "size": (16, 16), "seed": 0, "guidance": 300.0}
    prompt: list[Item] = ["up", PICTURE]
    none, whole, part = (
        generate(tiny_lm, frame_tok, prompt, unconditional=bare, **options)[0]
        for bare in (None, [], ["up"])
    )
    assert same(none, whole)
    assert not same(part, whole)
    nothing_dropped = generate(tiny_lm, frame_tok, prompt, unconditional=prompt, **options)[0]
    assert same(
        nothing_dropped, generate(tiny_lm, frame_tok, prompt, **{**options, "guidance": 1})[0]
    )


def test_rows_of_a_batch_have_their_own_wishes(
    frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    prompts: list[list[Item]] = [["up"], [PICTURE], [], ["seven"]]
    modalities = ["image", "audio", None, "video"]
    sizes = [(8, 8), 0.05, None, None]
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 5.0}
    together = generate_batch(tiny_lm, frame_tok, prompts, modalities, size=sizes, **options)
    for row, document in enumerate(together):
        alone = generate(
            *(tiny_lm, frame_tok, prompts[row], modalities[row], sizes[row]), seed=row, **options
        )
        assert same(alone[0], document)
    with pytest.raises(ValueError, match="modality: 4 prompts need as many, got 2"):
        generate_batch(tiny_lm, frame_tok, prompts, ["image", None])


def test_a_seed_for_each_sample(frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 5.0}
    two = generate(tiny_lm, frame_tok, ["up"], "audio", num_samples=2, seed=[8, 3], **options)
    for seed, document in zip([8, 3], two, strict=True):
        alone = generate(tiny_lm, frame_tok, ["up"], "audio", seed=seed, **options)
        assert same(alone[0], document)


def test_repetition_is_penalised(
    frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an enormous penalty no piece comes twice, nor one that the prompt has."""
    answers = keep_segments(frame_tok, monkeypatch)
    prompt = ["seven eight"]
    for penalty in (None, {"text": 1e9}, {"image": 1e9}):
        options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.0}
        generate(tiny_lm, frame_tok, prompt, "text", repetition_penalty=penalty, **options)
    free, never, other = (answer.codes.tolist() for answer in answers)
    assert len(set(free)) < len(free)
    assert len(set(never)) == len(never) > 5
    assert not set(never) & set(frame_tok.text.encode(prompt[0]).tolist())
    assert other == free


def test_the_bundle_can_name_its_context(frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    codecs = list(dict.fromkeys(frame_tok.codecs.values()))
    tok = UnifiedTokenizer(frame_tok.text, codecs, defaults={"any": {"context": 20}})
    prompt = ["seven eight nine"]
    taken = len(tok.encode(prompt, complete=False))
    (document,) = generate(tiny_lm, tok, prompt, "audio", temperature=5.0, seed=0)
    assert len(tok.encode([*prompt, *document])) <= 20
    message = f"takes {taken} ids and what is asked for 263: {taken + 243} more than the 20 that"
    with pytest.raises(ValueError, match=message):
        generate(tiny_lm, tok, prompt, "image", (64, 64))


# Parts of items


@pytest.mark.parametrize(
    ("item", "rewrite", "kept"),
    [
        (PICTURE, (0, 3), [1]),
        (PICTURE, (4, 8), [0]),
        (PICTURE, (7, 8), [0]),
        (PICTURE, (0, 8), []),
        (SOUND, (0.0, 0.02), [2, 3, 4]),
        (SOUND, (0.015, 0.02), [0, 2, 3, 4]),
        (Audio(torch.linspace(-1, 1, 38)[None], 800), (0.04, 0.0475), [0, 1, 2, 3]),
        (Video(FRAMES, 10.0), (0, 1), [1, 2]),
        (Video(FRAMES, 10.0), (2, 4), [0]),
        (Video(FRAMES, 10.0), (3, 5), [0, 1]),
    ],
)
def test_infilling_keeps_the_rest(
    item: Item,
    rewrite: tuple[float, float],
    kept: list[int],
    tok: UnifiedTokenizer,
    tiny_lm: UnifiedLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = keep_segments(tok, monkeypatch)
    documents = infill(tiny_lm, tok, ["up"], item, rewrite, num_samples=3, seed=0, temperature=5.0)
    codes = tok.segments([item])[0].codes
    assert len(documents) == len(answers) == 3
    for (made,), segment in zip(documents, answers, strict=True):
        assert segment.codes.shape == codes.shape
        assert torch.equal(segment.codes[:, kept], codes[:, kept])
        assert shape_of(made) == shape_of(item)
    free = [at for at in range(codes.shape[1]) if at not in kept]
    assert not torch.equal(answers[0].codes[:, free], answers[1].codes[:, free])


@pytest.mark.parametrize(
    ("item", "size", "kept", "shape"),
    [
        (SOUND, 0.1, 5, (1, 80)),
        (Audio(torch.linspace(-1, 1, 38)[None], 800), 0.06, 4, (1, 48)),
        (
            Video(FRAMES[:4], 10.0),
            6,
            2,
            (6, 4, 8, 3),
        ),
    ],
)
def test_sound_and_film_go_on(
    item: Item,
    size: float,
    kept: int,
    shape: tuple[int, ...],
    tok: UnifiedTokenizer,
    tiny_lm: UnifiedLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = keep_segments(tok, monkeypatch)
    ((made,),) = extend(tiny_lm, tok, [], item, size, seed=0, temperature=5.0)
    codes = tok.segments([item])[0].codes
    assert torch.equal(answers[0].codes[:, :kept], codes[:, :kept])
    assert answers[0].codes.shape[1] > kept
    assert shape_of(made) == shape


def keep_segments(tok: UnifiedTokenizer, monkeypatch: pytest.MonkeyPatch) -> list[Segment]:
    """The segments that are decoded from now on."""
    kept: list[Segment] = []

    def decode(segments: Sequence[Segment]) -> list[Item]:
        kept.extend(segments)
        return UnifiedTokenizer.decode_segments(tok, segments)

    monkeypatch.setattr(tok, "decode_segments", decode)
    return kept


def shape_of(item: Item) -> tuple[int, ...]:
    if isinstance(item, Audio):
        return tuple(item.samples.shape)
    if isinstance(item, Video):
        return tuple(item.frames.shape)
    assert isinstance(item, Image.Image)
    return item.size


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lm, tok: infill(lm, tok, [], PICTURE, (4, 9)),
            "expected 0 <= first < end <= 8, got",
        ),
        (
            lambda lm, tok: infill(lm, tok, [], PICTURE, (4, 4)),
            "expected 0 <= first < end <= 8, got",
        ),
        (
            lambda lm, tok: infill(lm, tok, [], "up", (0, 1)),
            "a picture, sound or film has a stretch",
        ),
        (
            lambda lm, tok: extend(lm, tok, [], PICTURE, 9),
            "extend: a sound or a film can go on, image can't",
        ),
        (
            lambda lm, tok: extend(lm, tok, [], SOUND, 0.05),
            "the audio has 0.05 already; ask for more",
        ),
        (
            lambda lm, tok: infill(lm, tok, [], SOUND, (0, 0.01), guidance=2.0),
            "guidance needs a condition",
        ),
        (
            lambda lm, tok: infill(lm, tok, [], SOUND, (0, 0.01), seed=[1, 2]),
            "as many seeds, got 2",
        ),
    ],
)
def test_stretches_that_are_none(
    call: Callable[..., object], message: str, frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny_lm, frame_tok)


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
        ({"min_p": 2.0}, r"min_p must lie in \[0, 1\], got 2.0"),
        ({"temperature": {"smell": 1.0}}, "temperature: there is no modality 'smell' here; they"),
        ({"guidance": {"image": 3.0}, "prompt": []}, "guidance needs a condition"),
        ({"seed": [1, 2]}, "seed: 1 samples need as many seeds, got 2"),
        (
            {"modality": "image", "size": (1024, 1024)},
            "the prompt takes 3 ids and what is asked for 65543: 32778 more than the 32768 that",
        ),
        ({"max_new_tokens": 40_000}, "ids and what is asked for 40000: 7235 more than the 32768"),
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
            r"unknown sampling option 'temprature' \(did you mean 'temperature'\?\); known are",
        ),
        (
            lambda lm, tok: generate_batch(lm, tok, [["up"], ["up"]], seeds=[1]),
            "seeds: 2 prompts need as many, got 1",
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
