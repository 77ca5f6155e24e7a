"""`unimm.show` and the cards: what they show, and five lines at most in a terminal."""

import re

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
    presets,
    reconstruct,
    show,
)
from unimm_tokenizers import build_codec


@pytest.fixture(scope="module")
def document() -> list[object]:
    image = Image.new("RGB", (16, 16), (200, 30, 30))
    return [
        "seven <b>eight</b>",
        image,
        Audio(torch.zeros(1, 160), 800),
        Video(torch.zeros(3, 8, 8, 3, dtype=torch.uint8), 10.0),
        Semantic(image),
        Turn("user"),
        "up",
    ]


def test_a_document(document: list[object]) -> None:
    view = show(document)
    page = view._repr_html_()
    assert page.count("<img") == 4  # a picture, a spectrogram, a film, regions
    assert page.count("<audio") == 1
    assert "seven &lt;b&gt;eight&lt;/b&gt;" in page
    assert "&lt;user&gt;" in page
    lines = repr(view).splitlines()
    assert len(lines) == 5
    assert lines[0] == "text 'seven <b>eight</b>'"
    assert lines[1] == "picture of 16 x 16"
    assert lines[-1] == "... 3 more"
    assert repr(show([])) == "(an empty document)"


@pytest.mark.parametrize("layout", ["frame_tok", "level_tok"])
def test_tokens(layout: str, document: list[object], request: pytest.FixtureRequest) -> None:
    tok: UnifiedTokenizer = request.getfixturevalue(layout)
    ids = tok.encode(document)  # type: ignore[arg-type]
    view = show(ids, tok)
    page = view._repr_html_()
    assert "&lt;image&gt; 4 x 4, 22 ids" in page
    assert re.search(r"&lt;video&gt; \d x 2 x 2, \d+ ids", page)
    assert re.search(r"&lt;audio&gt; 20, \d+ ids", page)
    assert "&lt;bos&gt;" in page
    assert "&lt;eos&gt;" in page
    assert "&lt;user&gt;" in page
    for token in tok.text.encode("up") + tok.vocabulary["text"].start:
        assert f"id {token}" in page
    assert repr(view).startswith(f"{len(ids)} ids, 7 items\ntext (")
    assert "image 4 x 4 (22)" in repr(view)


def test_malformed_tokens_are_shown_all_the_same(frame_tok: UnifiedTokenizer) -> None:
    ids = frame_tok.encode(["seven", Image.new("RGB", (8, 8))])
    for damaged in (ids[:-4], ids.flip(0), torch.zeros(0, dtype=torch.int64)):
        page = show(damaged, frame_tok)._repr_html_()
        assert page.startswith("<div")
        assert len(repr(show(damaged, frame_tok)).splitlines()) <= 5


def test_codes_and_their_use(frame_tok: UnifiedTokenizer) -> None:
    codec = frame_tok.codecs["audio"]
    codes = torch.tensor([[[0, 1, 2, 3], [0, 0, 0, 0]]])
    view = show(codes, codec)
    assert repr(view).splitlines()[1:] == [
        "level 0: 50.0% of 8 codes used, 2.00 bits per code",
        "level 1: 12.5% of 8 codes used, 0.00 bits per code",
    ]
    assert view._repr_html_().count("<img") == 1
    assert "50.0% of 8" in view._repr_html_()


def test_reconstructions(frame_tok: UnifiedTokenizer) -> None:
    picture = Image.effect_noise((16, 12), 50).convert("RGB")
    view = reconstruct(picture, frame_tok.codecs["image"])
    assert isinstance(view.made, Image.Image)
    assert view.made.size == (16, 12)
    codec = frame_tok.codecs["image"]
    signal = (
        torch.tensor(list(picture.tobytes())).view(1, 12, 16, 3).permute(0, 3, 1, 2) / 127.5 - 1
    )
    made = codec.decode(codec.encode(signal), (12, 16))
    expected = 10 * torch.log10(4 / (made - signal).square().mean())
    assert float(view.figures["PSNR"].split()[0]) == pytest.approx(
        float(expected.detach()), abs=0.01
    )
    assert view.figures["codes"] == "12"
    assert view._repr_html_().count("<img") == 3
    sound = show(Audio(torch.rand(1, 80) - 0.5, 800), frame_tok.codecs["audio"])
    assert "SNR" in repr(sound)
    assert sound._repr_html_().count("<audio") == 3
    film = Video(torch.zeros(3, 8, 8, 3, dtype=torch.uint8), 10.0)
    assert show(film, codec)._repr_html_().count("<img") == 3
    assert show(Semantic(picture.resize((16, 16))), frame_tok.codecs["semantic"])


def test_cards(frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    page = frame_tok._repr_html_()
    assert "VisionCodec" in page
    assert "audio.0" in page
    assert f"{tiny_lm.num_parameters:,}" in tiny_lm._repr_html_()
    assert "float32 on cpu" in repr(tiny_lm)
    for thing in (frame_tok, tiny_lm, frame_tok.text, frame_tok.vocabulary):
        assert len(repr(thing).splitlines()) <= 5


@pytest.mark.parametrize("name", presets())
def test_every_codec_has_a_card(name: str) -> None:
    codec = build_codec(name)
    assert len(repr(codec).splitlines()) == 1
    assert f"{codec.codebook_size:,}" in repr(codec)
    assert codec.name in codec._repr_html_()


def test_what_has_no_view_is_refused(frame_tok: UnifiedTokenizer) -> None:
    with pytest.raises(ValueError, match="needs what it is of"):
        show(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="there is no view of a dict"):
        show({})
    with pytest.raises(ValueError, match="'vision' is a codec for image, video, not audio"):
        reconstruct(Audio(torch.zeros(1, 9), 800), frame_tok.codecs["image"])
    assert repr(show("seven")) == "text 'seven'"
