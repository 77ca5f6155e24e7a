"""The grammar: what it writes it reads back, whatever is not its own it refuses or salvages."""

import re
from typing import NamedTuple, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unimm.sequence import MAX_SIZE, TURNS, Grammar, GrammarError, Segment
from unimm.vocabulary import MODALITIES, AudioLayout, Vocabulary


class Case(NamedTuple):
    grammar: Grammar
    document: list[Segment]
    ids: Tensor


@st.composite
def grammars(draw: st.DrawFn) -> Grammar:
    """Any set of modalities, one to four codec levels, both audio layouts, shared video or own."""
    sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)
    chosen = draw(st.sets(st.sampled_from(MODALITIES[1:])))
    codecs = {m: draw(sizes) for m in MODALITIES[1:] if m in chosen}
    share = {}
    if "image" in codecs and "video" not in codecs and draw(st.booleans()):
        share = {"video": "image"}
    layout: AudioLayout = draw(st.sampled_from(get_args(AudioLayout)))
    return Grammar(Vocabulary(draw(st.integers(1, 9)), codecs, share=share, audio_layout=layout))


def random_codes(sizes: list[int], grid: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(n, grid, generator=generator) for n in sizes])


@st.composite
def segments(draw: st.DrawFn, grammar: Grammar) -> Segment:
    kind = draw(st.sampled_from(["text", *TURNS, *grammar.rules]))
    if kind in TURNS:
        return Segment(kind, torch.zeros(0, dtype=torch.int64))
    seed = draw(st.integers(0, 2**16))
    if kind == "text":
        length = draw(st.integers(1, 5))
        return Segment(kind, random_codes([grammar.vocabulary["text"].size], (length,), seed)[0])
    rule = grammar.rules[kind]
    sizes = [block.size for block in grammar.vocabulary.levels(kind)]
    if rule.order == "raster":
        grid = tuple(draw(st.integers(1, 3)) for _ in rule.axes)
    else:
        grid = (draw(st.integers(1 if rule.axes else 0, 4)),)
    return Segment(kind, random_codes(sizes, grid, seed))


def merged(document: list[Segment]) -> list[Segment]:
    """Neighbouring texts joined: ids do not tell them apart."""
    joined: list[Segment] = []
    for segment in document:
        if segment.kind == "text" and joined and joined[-1].kind == "text":
            joined[-1] = Segment("text", torch.cat([joined[-1].codes, segment.codes]))
        else:
            joined.append(segment)
    return joined


@st.composite
def cases(draw: st.DrawFn) -> Case:
    grammar = draw(grammars())
    document = merged(draw(st.lists(segments(grammar), max_size=5)))
    return Case(grammar, document, grammar.encode(document))


def same(one: list[Segment], other: list[Segment]) -> bool:
    return len(one) == len(other) and all(
        a.kind == b.kind and a.codes.shape == b.codes.shape and torch.equal(a.codes, b.codes)
        for a, b in zip(one, other, strict=True)
    )


# Writing and reading


@given(cases())
@settings(max_examples=120)
def test_parse_is_the_inverse_of_encode(case: Case) -> None:
    grammar, document, ids = case
    assert ids.dtype == torch.int64
    assert same(grammar.parse(ids), document)
    assert same(grammar.parse(ids, strict=False), document)
    prompt = grammar.encode(document, complete=False)
    assert torch.equal(prompt, ids[:-1])
    assert same(grammar.parse(prompt, complete=False), document)
    assert same(grammar.parse(ids, complete=False), document)
    assert all(segment.codes.dtype == torch.int64 for segment in grammar.parse(ids))


@given(cases())
def test_spans_tile_the_sequence(case: Case) -> None:
    grammar, document, ids = case
    spans = list(grammar.spans(ids))
    assert [span.kind for span in spans] == [segment.kind for segment in document]
    edges = [1, *(span.stop for span in spans)]
    assert [span.start for span in spans] == edges[:-1]
    assert edges[-1] == len(ids) - 1
    assert [grammar.length(s) for s in document] == [span.stop - span.start for span in spans]


def test_what_every_modality_looks_like() -> None:
    """The formats of the architecture page, id by id."""
    vocabulary = Vocabulary(
        10, {"image": [4, 4], "audio": [4, 4], "semantic": [4]}, share={"video": "image"}
    )
    digit, text = vocabulary["digit"].start, vocabulary["text"].start
    image, second = (block.start for block in vocabulary.levels("image"))
    audio, fine = (block.start for block in vocabulary.levels("audio"))
    semantic = vocabulary.levels("semantic")[0].start
    mark = vocabulary.marker
    document = [
        Segment("user", torch.zeros(0, dtype=torch.int64)),
        Segment("text", torch.tensor([3, 0])),
        Segment("image", torch.tensor([[[0, 1, 2]], [[3, 2, 1]]])),
        Segment("video", torch.tensor([[[[0]], [[1]]], [[[2]], [[3]]]])),
        Segment("audio", torch.tensor([[0, 1, 2], [3, 3, 3]])),
        Segment("semantic", torch.tensor([[2, 1]])),
    ]
    head = [mark("<bos>"), mark("<user>"), text + 3, text]
    picture = [image, second + 3, image + 1, second + 2, image + 2, second + 1]
    film = [image, second + 2, image + 1, second + 3]
    size = {n: [digit, digit + n] for n in (1, 2, 3)}
    expected = [
        *head,
        *(mark("<image>"), *size[1], *size[3], *picture, mark("</image>")),
        *(mark("<video>"), *size[2], *size[1], *size[1], *film, mark("</video>")),
        *(mark("<audio>"), audio, fine + 3, audio + 1, fine + 3, audio + 2, fine + 3),
        mark("</audio>"),
        *(mark("<semantic>"), semantic + 2, semantic + 1, mark("</semantic>")),
        mark("<eos>"),
    ]
    assert Grammar(vocabulary).encode(document).tolist() == expected

    levelled = Vocabulary(10, {"audio": [4, 4]}, audio_layout="level")
    audio, fine = (block.start for block in levelled.levels("audio"))
    assert Grammar(levelled).encode([document[4]]).tolist() == [
        *(mark("<bos>"), mark("<audio>"), *size[3]),
        *(audio, audio + 1, audio + 2, fine + 3, fine + 3, fine + 3),
        *(mark("</audio>"), mark("<eos>")),
    ]


@pytest.mark.parametrize("width", [1, 255, 256, 257, 1000])
def test_sizes_are_written_base_256(width: int) -> None:
    grammar = Grammar(Vocabulary(3, {"image": [2]}))
    digit = grammar.vocabulary["digit"].start
    document = [Segment("image", random_codes([2], (1, width), 0))]
    ids = grammar.encode(document)
    assert ids[4:6].tolist() == [digit + width // 256, digit + width % 256]
    assert same(grammar.parse(ids), document)


@pytest.mark.parametrize(
    ("kind", "codes", "message"),
    [
        ("text", torch.tensor([5]), r"item 0 \(text\): codes must lie in 0 to 4, found 5 to 5"),
        ("text", torch.tensor([-1, 2]), "found -1 to 2"),
        ("image", torch.tensor([[[0]], [[3]]]), r"item 0 \(image\), level 1: codes must lie in"),
        ("image", torch.zeros(2, 0, 3, dtype=torch.int64), "grid sizes must be 1 to 65535"),
        ("image", torch.zeros(2, MAX_SIZE + 1, 1, dtype=torch.int64), r"got \(65536, 1\)"),
        ("image", torch.zeros(1, 3, 3, dtype=torch.int64), r"K=2, 2 grid axes\), got \(1, 3, 3\)"),
        ("image", torch.zeros(2, 3, dtype=torch.int64), r"got \(2, 3\)"),
        ("audio", torch.zeros(1, 2, 2, dtype=torch.int64), r"K=1, 1 grid axes\)"),
        ("video", torch.zeros(1, 1, 1, 1), "no codec for 'video' here; modalities are text, image"),
    ],
)
def test_encode_refuses_what_it_could_not_read_back(kind: str, codes: Tensor, message: str) -> None:
    grammar = Grammar(Vocabulary(5, {"image": [4, 3], "audio": [4]}))
    with pytest.raises(ValueError, match=message):
        grammar.encode([Segment(kind, codes)])


# Malformed ids


def check_any_ids(grammar: Grammar, ids: Tensor) -> None:
    """What holds for all ids: they are canonical or refused, and salvage is always well-formed."""
    read, refusal = None, ""
    try:
        read = grammar.parse(ids)
    except GrammarError as error:
        refusal = str(error)
    if read is not None:
        assert torch.equal(grammar.encode(read), ids)
    else:
        found = re.fullmatch(r"position (\d+), .+: expected .+, found .+", refusal)
        assert found is not None
        assert int(found[1]) <= len(ids)
    salvaged = merged(grammar.parse(ids, strict=False))
    assert same(grammar.parse(grammar.encode(salvaged)), salvaged)


@given(grammars(), st.data())
@settings(max_examples=80)
def test_random_ids_never_crash(grammar: Grammar, data: st.DataObject) -> None:
    size = len(grammar.vocabulary)
    plausible = st.one_of(
        st.integers(-3, size + 3),
        st.integers(0, 12),
        st.sampled_from([rule.open for rule in grammar.rules.values()] or [1]),
    )
    ids = data.draw(st.lists(plausible, max_size=30))
    check_any_ids(grammar, torch.tensor(ids, dtype=torch.int64))
    check_any_ids(grammar, torch.tensor([grammar.bos, *ids], dtype=torch.int64))


@given(cases(), st.data())
@settings(max_examples=120)
def test_corrupted_ids_never_crash(case: Case, data: st.DataObject) -> None:
    ids: list[int] = case.ids.tolist()
    for _ in range(data.draw(st.integers(1, 3))):
        if not ids:
            break
        at = data.draw(st.integers(0, len(ids) - 1))
        other = data.draw(st.integers(0, len(case.grammar.vocabulary)))
        match data.draw(st.sampled_from(["replace", "insert", "delete", "cut", "swap"])):
            case "replace":
                ids[at] = other
            case "insert":
                ids.insert(at, other)
            case "delete":
                del ids[at]
            case "cut":
                del ids[at:]
            case "swap":
                ids[at], ids[-1] = ids[-1], ids[at]
    check_any_ids(case.grammar, torch.tensor(ids, dtype=torch.int64))


@given(cases())
@settings(max_examples=60)
def test_truncated_ids_keep_every_whole_item(case: Case) -> None:
    grammar, document, ids = case
    stops = [span.stop for span in grammar.spans(ids)]
    for length in range(1, len(ids)):
        with pytest.raises(GrammarError, match=rf"position {length}, .*found the end of the ids"):
            grammar.parse(ids[:length])
        salvaged = grammar.parse(ids[:length], strict=False)
        whole = sum(stop <= length for stop in stops)
        assert same(salvaged[:whole], document[:whole])
        # Behind them stands at most the item that was cut, as far as it came.
        for rest, cut in zip(salvaged[whole:], document[whole : whole + 1], strict=False):
            assert rest.kind == cut.kind
            assert rest.codes.shape[-1] > 0
            assert torch.equal(rest.codes, cut.codes[..., : rest.codes.shape[-1]])
        assert len(salvaged) <= whole + 1


STRICT = Grammar(
    Vocabulary(5, {"image": [4], "audio": [4, 4], "semantic": [4]}, share={"video": "image"})
)
LEVEL = Grammar(Vocabulary(5, {"audio": [4, 4]}, audio_layout="level"))
BOS, EOS, IMAGE, IMAGE_END = 1, 2, 3, 4
VIDEO, AUDIO, AUDIO_END = 5, 7, 8
ZERO = 32  # the digit 0
ONE = 33
TEXT = 288
PIXEL = 293  # image level 0
COARSE, FINE = 297, 301  # audio levels 0 and 1
SEMANTIC = 305
PICTURE = [IMAGE, ZERO, ONE, ZERO, ONE, PIXEL, IMAGE_END]


@pytest.mark.parametrize(
    ("grammar", "ids", "message"),
    [
        (STRICT, [], "position 0, the beginning: expected <bos>, found the end of the ids"),
        (STRICT, [TEXT], "position 0, the beginning: expected <bos>, found id 288"),
        (STRICT, [BOS, TEXT], "position 2, between items: expected <eos>, found the end"),
        (STRICT, [BOS, BOS, EOS], "position 1, between items: expected text, an opening marker"),
        (STRICT, [BOS, IMAGE_END, EOS], "position 1, between items: expected text"),
        (STRICT, [BOS, ZERO, EOS], "position 1, between items"),
        (STRICT, [BOS, PIXEL, EOS], "position 1, between items"),
        (STRICT, [BOS, 10**6, EOS], "position 1, between items: .* found id 1000000"),
        (STRICT, [BOS, -1, EOS], "position 1, between items: .* found id -1"),
        (STRICT, [BOS, EOS, EOS], "position 2, after <eos>: expected the end, found id 2"),
        (STRICT, [BOS, EOS, TEXT], "position 2, after <eos>"),
        (STRICT, [BOS, IMAGE, TEXT], "position 2, in image size h: expected a digit"),
        (STRICT, [BOS, IMAGE, ZERO, ONE, ZERO, EOS], "position 5, in image size w"),
        (STRICT, [BOS, IMAGE, ZERO, ZERO, ZERO, ONE], "position 3, in image size h: expected a s"),
        (STRICT, [BOS, VIDEO, ZERO, ONE, TEXT], "position 4, in video size h: expected a digit"),
        (
            STRICT,
            [BOS, *PICTURE[:5], COARSE],
            r"position 6, in image codes \(number 0\): expected "
            "an id of image level 0, 293 to 296, found id 297",
        ),
        (STRICT, [BOS, *PICTURE[:6], PIXEL], "position 7, at the end of image: expected </image>"),
        (STRICT, [BOS, *PICTURE[:5]], r"position 6, in image codes \(number 0\): .* the end of"),
        (STRICT, [BOS, *PICTURE[:6]], "position 7, at the end of image: .* found the end of"),
        (STRICT, [BOS, AUDIO, FINE], r"position 2, in audio codes \(number 0\): .* audio level 0"),
        (STRICT, [BOS, AUDIO, COARSE, COARSE], r"\(number 1\): .* audio level 1, 301 to 304"),
        (STRICT, [BOS, AUDIO, COARSE, AUDIO_END], "position 3, inside an audio frame"),
        (STRICT, [BOS, AUDIO, COARSE, FINE, TEXT], r"position 4, in audio codes \(number 2\)"),
        (STRICT, [BOS, AUDIO, COARSE, FINE], "position 4, at the end of audio"),
        (LEVEL, [BOS, AUDIO, ZERO, ONE, 293, 293, AUDIO_END], "position 5, .* audio level 1"),
        (LEVEL, [BOS, AUDIO, ZERO, ZERO, AUDIO_END], "position 3, in audio size t"),
    ],
)
def test_errors_name_position_state_and_expectation(
    grammar: Grammar, ids: list[int], message: str
) -> None:
    with pytest.raises(GrammarError, match=message):
        grammar.parse(torch.tensor(ids, dtype=torch.int64))


@pytest.mark.parametrize(
    ("ids", "kinds"),
    [
        ([], []),
        ([TEXT], ["text"]),
        ([EOS, TEXT], []),
        ([BOS, IMAGE, *PICTURE], ["image"]),
        ([BOS, IMAGE, ZERO, TEXT, *PICTURE], ["text", "image"]),
        ([BOS, *PICTURE[:-1], TEXT], ["text"]),
        ([BOS, AUDIO, COARSE, FINE, COARSE, TEXT], ["audio", "text"]),
        ([BOS, AUDIO, TEXT, EOS], ["text"]),
        ([BOS, AUDIO, COARSE, AUDIO_END, TEXT], ["text"]),
        ([BOS, AUDIO, AUDIO_END, EOS], ["audio"]),
        ([BOS, TEXT, EOS, TEXT], ["text"]),
    ],
)
def test_salvage_keeps_what_is_whole(ids: list[int], kinds: list[str]) -> None:
    salvaged = STRICT.parse(torch.tensor(ids, dtype=torch.int64), strict=False)
    assert [segment.kind for segment in salvaged] == kinds


def test_salvage_is_fast_on_hostile_ids() -> None:
    """A huge announced size costs nothing, and neither does a row of opening markers."""
    huge = [BOS, VIDEO, *[ZERO + 255] * 6, PIXEL, EOS]
    assert STRICT.parse(torch.tensor(huge), strict=False) == []
    with pytest.raises(GrammarError, match="position 9, in video codes"):
        STRICT.parse(torch.tensor(huge))
    assert STRICT.parse(torch.tensor([BOS, *[AUDIO] * 2000]), strict=False) == []


# Positions and modalities


@given(cases())
@settings(max_examples=80)
def test_layout_follows_the_clock(case: Case) -> None:
    """Whatever is no code stands one past everything before it, on all three axes."""
    grammar, document, ids = case
    positions, modality = grammar.layout(ids)
    assert positions.shape == (3, len(ids))
    assert modality.shape == (len(ids),)
    codes = torch.zeros(len(ids), dtype=torch.bool)
    for span, segment in zip(grammar.spans(ids), document, strict=True):
        expected = MODALITIES.index(segment.kind) if segment.kind in grammar.rules else 0
        assert (modality[span.start : span.stop] == expected).all()
        if segment.kind in grammar.rules:
            first = span.start + 1 + grammar.rules[segment.kind].header
            codes[first : span.stop - 1] = True
            # The item's codes begin where the next text would stand, and none stands before.
            if first < span.stop - 1:
                clock = positions[:, :first].max() + 1
                assert positions[:, first].tolist() == [clock] * 3
                assert positions[:, first : span.stop - 1].min() == clock
    reached = -1
    for at in range(len(ids)):
        if not codes[at]:
            assert positions[:, at].tolist() == [reached + 1] * 3
        reached = max(reached, int(positions[:, at].max()))
    assert torch.equal(grammar.layout(ids[:-1], complete=False).positions, positions[:, :-1])


def offsets(grammar: Grammar, segment: Segment) -> list[list[int]]:
    """Positions of an item's codes, counted from the item's clock."""
    ids = grammar.encode([segment])
    first = 2 + grammar.rules[segment.kind].header
    positions = grammar.layout(ids).positions[:, first:-2]
    return (positions - first).T.tolist()


def test_positions_of_codes() -> None:
    video = offsets(STRICT, Segment("video", torch.zeros(1, 2, 2, 3, dtype=torch.int64)))
    assert video == [[t, y, x] for t in range(2) for y in range(2) for x in range(3)]
    image = offsets(STRICT, Segment("image", torch.zeros(1, 2, 3, dtype=torch.int64)))
    assert image == [[0, y, x] for y in range(2) for x in range(3)]
    frames = torch.zeros(2, 3, dtype=torch.int64)
    frame_major = offsets(STRICT, Segment("audio", frames))
    assert frame_major == [[frame, level, 0] for frame in range(3) for level in range(2)]
    level_major = offsets(LEVEL, Segment("audio", frames))
    assert level_major == [[frame, level, 0] for level in range(2) for frame in range(3)]


def test_both_audio_layouts_move_the_clock_alike() -> None:
    for frames, past in ((1, 2), (2, 2), (5, 5)):
        codes = torch.zeros(2, frames, dtype=torch.int64)
        for grammar, header in ((STRICT, 0), (LEVEL, 2)):
            ids = grammar.encode([Segment("audio", codes)])
            assert grammar.layout(ids).positions[:, -2].tolist() == [2 + header + past] * 3


def test_layout_refuses_malformed_ids() -> None:
    with pytest.raises(GrammarError, match="position 2"):
        STRICT.layout(torch.tensor([BOS, IMAGE]))


def test_a_fixed_grid_is_not_written() -> None:
    """Chameleon's pictures: markers around the codes, and no sizes."""
    vocabulary = Vocabulary(10, {"image": [16]}, grids={"image": [2, 3]})
    grammar = Grammar(vocabulary)
    codes = torch.arange(6).view(1, 2, 3)
    ids = grammar.encode([Segment("text", torch.tensor([1])), Segment("image", codes)])
    start = vocabulary["image.0"].start
    marks = [vocabulary.marker(name) for name in ("<image>", "</image>", "<eos>")]
    assert ids.tolist()[2:] == [marks[0], *range(start, start + 6), *marks[1:]]
    (_, image) = grammar.parse(ids)
    assert torch.equal(image.codes, codes)
    assert grammar.layout(ids).positions[:, 3:9].tolist() == [
        [3] * 6,
        [3, 3, 3, 4, 4, 4],
        [3, 4, 5, 3, 4, 5],
    ]
    with pytest.raises(ValueError, match=r"fixes the grid at \(1, 2, 3\) .* got \(1, 3, 2\)"):
        grammar.encode([Segment("image", codes.view(1, 3, 2))])
    with pytest.raises(GrammarError, match="</image>"):
        grammar.parse(torch.cat([ids[:9], ids[8:]]))
