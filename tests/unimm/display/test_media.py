"""Pictures, sounds and films inside a page: what the bytes hold is what was given."""

import base64
import io
import re
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from unimm import Audio, Semantic, Video, Vocabulary
from unimm.display import html, media


def data_of(page: str, kind: str) -> bytes:
    (found,) = re.findall(rf'src="data:{kind};base64,([^"]+)"', page)
    return base64.b64decode(found)


def test_a_picture_is_itself_enlarged_by_whole_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    page = media.picture(Image.fromarray(pixels))
    shown = np.asarray(Image.open(io.BytesIO(data_of(page, "image/webp"))).convert("RGB"))
    assert shown.shape == (80, 120, 3)
    assert (shown[::4, ::4] == pixels).all()
    assert "30 x 20" in page


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_any_mode(mode: str) -> None:
    page = media.picture(Image.new(mode, (9, 5)))
    assert Image.open(io.BytesIO(data_of(page, "image/webp"))).size == (126, 70)


def test_a_large_picture_is_shrunk() -> None:
    page = media.picture(Image.new("RGB", (3000, 1500)))
    assert Image.open(io.BytesIO(data_of(page, "image/webp"))).size == (512, 256)
    assert "3000 x 1500" in page


@pytest.mark.parametrize("channels", [1, 2])
def test_a_sound_plays(channels: int) -> None:
    samples = torch.rand(channels, 4000) * 2 - 1
    page = Audio(samples, 8000)._repr_html_()
    with wave.open(io.BytesIO(data_of(page, "audio/wav"))) as file:
        assert (file.getframerate(), file.getnchannels()) == (8000, channels)
        bytes_ = np.frombuffer(file.readframes(4000), "<i2").reshape(-1, channels).T
    assert np.abs(bytes_ / 32767 - samples.numpy()).max() < 1 / 32767
    assert Image.open(io.BytesIO(data_of(page, "image/webp"))).size == (65, 129)
    assert "0.50 s, 8000 Hz" in page


def test_a_long_sound_is_cut_and_says_so() -> None:
    page = Audio(torch.zeros(1, 31 * 1000), 1000)._repr_html_()
    assert "the first 30 s shown" in page
    assert len(data_of(page, "audio/wav")) == 44 + 2 * 30_000
    assert "<figure" in Audio(torch.zeros(1, 0), 1000)._repr_html_()


def test_a_tone_stands_at_its_height() -> None:
    rate, tone = 8000, 2000
    spectrum = media.spectrogram(np.sin(2 * np.pi * tone * np.arange(rate) / rate))
    loudest = 128 - spectrum[:, 60].argmax()  # the lowest row is 0 Hz
    assert loudest * rate / 256 == pytest.approx(tone, abs=rate / 256)
    assert media.spectrogram(np.zeros(100)).max() == 0


def test_a_film_moves() -> None:
    frames = (torch.rand(70, 8, 8, 3) * 255).byte()
    page = Video(frames, 10.0)._repr_html_()
    film = Image.open(io.BytesIO(data_of(page, "image/webp")))
    assert getattr(film, "n_frames", 1) == 64
    film.seek(1)
    film.load()
    assert film.info["duration"] == 100
    assert "70 frames of 8 x 8, 10 fps, the first 64 shown" in page


def test_semantic_pictures_are_pictures() -> None:
    assert "by regions" in Semantic(Image.new("RGB", (8, 8)))._repr_html_()


def test_codes_are_told_apart() -> None:
    codes = np.arange(16).reshape(4, 4)
    codes[0, 0] = -1
    page = media.code_grid(codes, 16)
    shown = np.asarray(Image.open(io.BytesIO(data_of(page, "image/webp"))).convert("RGB"))
    cells = shown[::32, ::32].reshape(-1, 3)
    assert len(np.unique(cells, axis=0)) == 16
    assert cells[0].tolist() == [255, 255, 255]


def test_what_comes_from_data_is_escaped() -> None:
    evil = '<script>alert("x")</script>'
    for page in (
        html.swatch(evil, "#fff", evil),
        html.table((evil,), [(evil,)]),
        html.card(evil, [(evil, evil)]),
        html.figure("", evil),
        media.picture(Image.new("L", (4, 4)), evil),
    ):
        assert "<script" not in page
        assert "&lt;script&gt;" in page
    assert "<b>" in html.table((), [(html.Raw("<b>done</b>"),)])


def test_the_vocabulary_is_a_table_of_ranges() -> None:
    vocabulary = Vocabulary(300, {"image": [512], "audio": [64, 64]})
    page = vocabulary._repr_html_()
    assert page.count("<tr") == 7  # a head and a row for each block
    assert re.search(r"image\.0</td><td[^>]*>588</td><td[^>]*>1099</td><td[^>]*>512<", page)
    assert html.COLOURS["audio"] in page
    assert vocabulary.fingerprint[:12] in page
    assert len(repr(vocabulary).splitlines()) == 1
