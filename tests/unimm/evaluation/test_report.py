import base64
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unimm.evaluation import figures
from unimm.evaluation.accuracy import Direction, DirectionResult, measure
from unimm.evaluation.metrics import mel_filters
from unimm.evaluation.report import Card, Part, Report, Tile, environment, write_results
from unimm.evaluation.report_parts import duration, markdown_table, render_item
from unimm.evaluation.statistics import Mean, Share
from unimm.signals import Audio, Document, Semantic, Turn, Video

VOID = {"meta", "img"}
ATTACK = "</td></script><script>alert('x')</script><img src=http://example.org onerror=alert(1)>"


class Page(HTMLParser):
    """Checks that elements nest, and collects them with their attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] != ["style"]:
            self.text += data + " "  # cells stand apart

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def _picture(side: int = 8, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _sound(seconds: float = 0.1, hz: float = 440.0, rate: int = 8000) -> Audio:
    time = torch.arange(round(seconds * rate)) / rate
    return Audio(0.5 * torch.sin(2 * math.pi * hz * time)[None], rate)


def _film(frames: int = 4) -> Video:
    return Video(torch.randint(0, 256, (frames, 8, 8, 3), dtype=torch.uint8), 10.0)


def _result(goal: float | None = 0.9) -> DirectionResult:
    direction = Direction(source="text", target="image", goal=goal, guidance=2.0)
    prompts: list[Document] = [[ATTACK] for _ in range(10)]

    def judge(items: list[Image.Image]) -> list[str | None]:
        return [ATTACK if item.width == 8 else "other" for item in items]

    right: Document = [_picture()]
    other: Document = [_picture(4)]
    written = [right] * 7 + [other] * 2 + [[]]
    return measure(direction, prompts, [ATTACK] * 10, lambda p, d, s: written, judge)


def _full_report() -> Report:
    report = Report(ATTACK, ATTACK)
    report.tiles([Tile("goals", "5 of 6", ATTACK, False), Tile("time", "7 min", good=True)])
    report.section("Accuracy", ATTACK)
    report.accuracies([_result(), _result(goal=0.5), _result(goal=None)], ATTACK)
    report.seconds("Wall time", {"train": 215.0, ATTACK: 0.4})
    report.section("Generated")
    report.direction(_result())
    media = [
        ATTACK,
        _picture(),
        _picture(200),
        _sound(),
        _film(),
        Semantic(_picture()),
        Turn("user"),
    ]
    report.gallery(ATTACK, [Card([Part(ATTACK, item)], ATTACK, right=False) for item in media])
    report.section(ATTACK)
    report.table(ATTACK, ["codec", ATTACK], [[ATTACK, 1.5], ["b", None]], note=ATTACK)
    points = [(float(x), 5.0 * 0.99**x) for x in range(1000)]
    report.curve(ATTACK, {ATTACK: points, "b": points[::50]}, x_label=ATTACK, y_label=ATTACK)
    report.curve("log", {"a": points}, log_y=True, markers=True)
    report.facts(ATTACK, {ATTACK: ATTACK, "model": {"d_model": 192, "rates": [1, 2]}})
    return report


def test_a_page_is_whole_and_loads_and_runs_nothing(tmp_path: Path) -> None:
    path = _full_report().write(tmp_path / "report.html")
    html = path.read_text()
    page = Page(html)
    assert page.all("script") == page.all("link") == page.all("iframe") == []
    assert len(page.all("img")) == 17
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#"))
    assert "url(" not in html
    assert "@import" not in html
    policy = next(a for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")
    assert list(tmp_path.iterdir()) == [path]


def _sortable() -> str:
    report = Report("r")
    rows = [["b", 10.0], ["c", None], ["a", Mean(9.0, 8.0, 30.0, 4)], ["d", 110.0]]
    report.table("t", ["codec", ATTACK], rows, sortable=True)
    return report.html()


def test_a_sortable_table_brings_one_script_that_the_policy_knows_by_its_hash() -> None:
    html = _sortable()
    [script] = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert "alert('x')" not in script
    assert len(Page(html).all("button")) == 2


def test_a_table_sorts_at_a_click_and_the_browser_refuses_nothing(
    tmp_path: Path, browse: Any
) -> None:
    """The page as it is, and once more without its policy and with a click of our own."""
    html = _sortable()
    clicks = "document.querySelectorAll('th button')[1].click();"
    without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    shown = []
    for count in range(3):
        clicked = without.replace("</body>", f"<script>{clicks * count}</script></body>")
        (tmp_path / "page.html").write_text(clicked if count else html)
        done = browse(tmp_path / "page.html")
        assert "Content Security Policy" not in done.stderr
        body = done.stdout[done.stdout.index("<tbody>") :]
        shown.append("".join(re.findall(r"<tr><td>(\w)</td>", body)))
    assert shown == ["bcad", "dbac", "abdc"]


def test_captions_stay_captions() -> None:
    html = _full_report().html()
    assert "<script" not in html
    assert "example.org onerror" in Page(html).text


def test_links_lead_to_sections() -> None:
    page = Page(_full_report().html())
    anchors = {attributes["id"] for attributes in page.all("section")}
    assert {str(link["href"])[1:] for link in page.all("a")} == anchors
    assert len(anchors) == 3


def test_verdicts_and_goals_are_words_too() -> None:
    report = Report("r")
    report.accuracies([_result(), _result(goal=0.5)])
    report.direction(_result())
    text = Page(report.html()).text
    assert "70.0%" in text
    assert "39.7% to 89.2%" in text  # Wilson, 7 of 10
    assert len(re.findall(r"\bmissed\b", text)) == len(re.findall(r"\bmet\b", text)) == 1
    assert "✓ right" in text
    assert "✗ wrong" in text
    assert "wrote nothing" in text
    assert "read as other" in text


def test_pages_that_are_too_large_are_refused_and_not_written(tmp_path: Path) -> None:
    report = Report("r")
    noise = Audio(torch.rand(2, 1_000_000) * 2 - 1, 44100)  # 4 MB of PCM, 5.3 MB in base64
    report.gallery("sounds", [Card([Part("a", noise)]), Card([Part("b", noise)])])
    with pytest.raises(ValueError, match="MB are allowed; show fewer examples"):
        report.write(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_table_needs_a_cell_for_every_column() -> None:
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        Report("r").table("t", ["a", "b"], [[1, 2], [3]])


def test_cells_show_intervals_and_a_dash_for_the_unknown() -> None:
    rows = [["a", Share(1, 2), Mean(2.0, 1.0, 3.0, 9), None, math.nan, True]]
    report = Report("r")
    report.table("", ["x"] * 6, rows)
    text = Page(report.html()).text
    for shown in ("50.0%", "9.5% to 90.5%", "1 to 3", "\u2013 \u2013", "yes"):
        assert shown in text
    assert markdown_table(["a", "m"], [["x|y", Mean(2.0, 1.0, 3.0, 9)], ["z", None]]) == (
        "| a | m |\n| --- | --- |\n| x\\|y | 2 (1 to 3) |\n| z | - |\n"
    )


def _embedded(html: str, media_type: str) -> list[bytes]:
    found = re.findall(rf"data:{media_type};base64,([A-Za-z0-9+/=]+)", html)
    return [base64.b64decode(text) for text in found]


def test_small_pictures_are_embedded_exactly_and_large_ones_reduced() -> None:
    picture = _picture(32)
    [data] = _embedded(render_item(picture), "image/png")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(picture))
    [data] = _embedded(render_item(_picture(700)), "image/webp")
    assert Image.open(io.BytesIO(data)).size == (512, 512)


def test_sounds_are_embedded_as_16_bit_wav() -> None:
    sound = _sound()
    [data] = _embedded(render_item(sound), "audio/wav")
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == 8000
    assert np.abs(samples - sound.samples[0].numpy()).max() < 1 / 32000
    clipped, _ = soundfile.read(io.BytesIO(figures.wav_bytes(Audio(torch.full((2, 4), 3.0), 8000))))
    assert clipped.shape == (4, 2)
    assert clipped.max() < 1.0001


def test_films_are_embedded_frame_by_frame() -> None:
    film = _film(4)
    [data] = _embedded(render_item(film), "image/webp")
    with Image.open(io.BytesIO(data)) as webp:
        assert getattr(webp, "n_frames", 1) == 4
        for index in range(4):
            webp.seek(index)
            assert np.array_equal(np.asarray(webp.convert("RGB")), film.frames[index].numpy())
    assert len(_embedded(render_item(_film(1)), "image/webp")) == 1


def test_codes_have_colours_of_their_own_and_padding_is_grey() -> None:
    colours = figures.code_colours(np.arange(1024)).astype(int)
    assert len(np.unique(colours, axis=0)) > 1000
    neighbours = np.abs(np.diff(colours, axis=0)).sum(axis=1)
    assert neighbours.min() > 60
    grid = figures.token_grid(torch.tensor([[3, 3, -1], [5, 3, -1]]), cell=10)
    pixels = np.asarray(grid)
    assert pixels.shape == (20, 30, 3)
    assert (pixels[5, 5] == pixels[15, 15]).all()
    assert (pixels[5, 5] != pixels[15, 5]).any()
    assert pixels[5, 25].tolist() == [128, 128, 128]
    with pytest.raises(ValueError, match="rows, columns"):
        figures.token_grid(torch.zeros(3))


def test_the_spectrogram_is_brightest_at_the_tone() -> None:
    for hz in (500.0, 3000.0):
        picture = np.asarray(figures.spectrogram(_sound(0.5, hz))).astype(int).sum(axis=2)
        brightest = picture.shape[0] - 1 - int(picture.mean(axis=1).argmax())
        bands = 256 // 8
        filters = mel_filters(8000, 256, bands)
        wanted = int(filters[:, round(hz / 8000 * 256)].argmax())
        assert brightest // (picture.shape[0] // bands) == wanted
    assert figures.spectrogram(Audio(torch.zeros(1, 0), 8000)).height == 64


def test_the_error_map_is_dark_where_pictures_agree() -> None:
    real = Image.new("RGB", (4, 4), (100, 100, 100))
    made = real.copy()
    made.putpixel((1, 2), (100, 164, 100))
    pixels = np.asarray(figures.error_map(made, real))
    assert pixels[2, 1].tolist() == [253, 231, 37]
    assert pixels[0, 0].tolist() == [68, 1, 84]
    with pytest.raises(ValueError, match="crop them alike"):
        figures.error_map(real, Image.new("RGB", (4, 5)))


def test_regions_are_laid_over_the_picture() -> None:
    picture = Image.new("RGB", (8, 8), (100, 100, 100))
    overlay = np.asarray(figures.region_overlay(picture, torch.tensor([[0, 1], [0, 1]])))
    assert overlay.shape == (8, 8, 3)
    assert (overlay[0, 0] == overlay[7, 3]).all()
    assert (overlay[0, 0] != overlay[0, 7]).any()
    with pytest.raises(ValueError, match="rows, columns"):
        figures.region_overlay(picture, torch.zeros(3))


def test_contact_sheets_and_film_strips_show_every_picture() -> None:
    sheet = figures.contact_sheet(
        [_picture(8, seed) for seed in range(5)], columns=3, gap=1, scale=2
    )
    assert sheet.size == (3 * 17 - 1, 2 * 17 - 1)
    strip = figures.film_strip(_film(20), frames=5, gap=1)
    assert strip.size == (5 * 9 - 1, 8)
    with pytest.raises(ValueError, match="no pictures"):
        figures.contact_sheet([])


@given(
    st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=20),
    st.booleans(),
)
def test_charts_draw_inside_their_frame(values: list[float], log_y: bool) -> None:
    values = [abs(value) + 1e-6 for value in values] if log_y else values
    chart = figures.line_chart({"a": list(enumerate(values))}, log_y=log_y, markers=True)
    circles = re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', chart)
    assert len(circles) == len(values)
    for x, y in circles:
        assert 52 <= float(x) <= 466
        assert 12 <= float(y) <= 214


def test_logarithmic_axes_space_powers_evenly_and_leave_out_zero() -> None:
    points = [(0.0, 1.0), (0.1, 1.0), (1.0, 2.0), (10.0, 3.0)]
    chart = figures.line_chart({"a": points}, log_x=True, markers=True)
    x = [float(value) for value in re.findall(r'cx="([-\d.]+)"', chart)]
    assert len(x) == 3
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)


def test_charts_leave_out_what_is_not_finite_and_refuse_nothing_at_all() -> None:
    chart = figures.line_chart(
        {"a": [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]}, markers=True
    )
    assert chart.count("<circle") == 2
    with pytest.raises(ValueError, match="no point of a"):
        figures.line_chart({"a": [(0, math.nan)]})
    with pytest.raises(ValueError, match="11 series"):
        figures.line_chart({str(i): [(0, 1.0)] for i in range(11)})
    long = figures.line_chart({"a": [(float(i), float(i)) for i in range(10_000)]})
    assert len(long) < 20_000


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.048, "48 ms"),
        (7.21, "7.2 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7830, "2 h 10 min"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_results_json_holds_numbers_by_direction_and_step(tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.json"
    write_results(path, accuracy={"text->image": 0.96}, seconds={"train": 12.5}, seed=3)
    assert json.loads(path.read_text()) == {
        "accuracy": {"text->image": 0.96},
        "seconds": {"train": 12.5},
        "seed": 3,
    }
    with pytest.raises(ValueError, match="not plain JSON"):
        write_results(path, accuracy={"text->image": math.nan}, seconds={})
    with pytest.raises(ValueError, match="not plain JSON"):
        write_results(path, model=torch.zeros(1))
    assert json.loads(path.read_text())["seed"] == 3  # what was there stays
    assert list(path.parent.iterdir()) == [path]


def test_the_environment_names_versions() -> None:
    facts = environment()
    assert facts["torch"] == torch.__version__
    assert {"unimm", "Python", "system", "CPU cores"} <= set(facts)
