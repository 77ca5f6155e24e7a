"""The web page: what it shows, what it refuses, and a click-through in a real browser."""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unimm import Audio, UnifiedLM, UnifiedTokenizer
from unimm.evaluation.figures import png_bytes, wav_bytes
from unimm.evaluation.serve import View, enlarged, grid_picture, prompt, serve, views

PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
SOUND = Audio(torch.linspace(-1, 1, 800)[None], 8000)


@pytest.fixture(scope="module")
def pair(model_bundle: Path) -> tuple[UnifiedLM, UnifiedTokenizer]:
    lm = UnifiedLM.from_pretrained(model_bundle)
    return lm, UnifiedTokenizer.from_pretrained(model_bundle)


def shown(
    pair: tuple[UnifiedLM, UnifiedTokenizer], modality: str | None, folder: Path
) -> list[View]:
    options: dict[str, Any] = {"seed": 0, "temperature": 2.0, "max_new_tokens": 60}
    return list(views(*pair, ["seven"], modality, folder=folder, **options))


def test_a_picture_and_its_tokens_fill(
    pair: tuple[UnifiedLM, UnifiedTokenizer], tmp_path: Path
) -> None:
    seen = shown(pair, "image", tmp_path)
    pictures = [view.picture for view in seen if isinstance(view.picture, Image.Image)]
    assert pictures
    assert all(view.codes is not None for view in seen)
    assert "tokens in" in seen[-1].status


def test_sound_film_and_words(pair: tuple[UnifiedLM, UnifiedTokenizer], tmp_path: Path) -> None:
    sound = shown(pair, "audio", tmp_path)[-1].sound
    assert sound is not None
    assert sound[0] == 8000
    assert sound[1].dtype == np.int16
    assert sound[1].ndim == 2
    film = shown(pair, "video", tmp_path)[-1].picture
    assert isinstance(film, str)
    with Image.open(film) as picture:
        assert picture.format == "GIF"
    assert shown(pair, "text", tmp_path)[-1].text


def test_files_come_before_the_words(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes(PICTURE))
    (tmp_path / "b.wav").write_bytes(wav_bytes(SOUND))
    items = prompt(" seven ", [tmp_path / "a.png", tmp_path / "b.wav"])
    assert isinstance(items[0], Image.Image)
    assert isinstance(items[1], Audio)
    assert items[2] == "seven"
    assert prompt("  ", []) == []


def test_what_can_not_be_decoded_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png"):
        prompt("", [tmp_path / "broken.png"])
    (tmp_path / "program.exe").write_bytes(b"MZ")
    with pytest.raises(ValueError, match=r"no decoder for \.exe"):
        prompt("", [tmp_path / "program.exe"])


def test_a_grid_shows_each_code_where_it_stands(
    frame_tok: UnifiedTokenizer, level_tok: UnifiedTokenizer
) -> None:
    grey = (128, 128, 128)
    rule = frame_tok.grammar.rules["image"]
    half = np.asarray(grid_picture(rule, (1, 2, 3), torch.tensor([5, 6, 7])))
    cell = half.shape[0] // 2
    assert half.shape == (2 * cell, 3 * cell, 3)
    middle = half[cell // 2 :: cell, cell // 2 :: cell]
    assert not (middle[0] == grey).all(1).any()
    assert (middle[1] == grey).all()
    film = np.asarray(grid_picture(frame_tok.grammar.rules["video"], (2, 1, 2), torch.arange(3)))
    assert film.shape[1] // (film.shape[0]) == 5  # two columns, a gap, two columns
    for tok in (frame_tok, level_tok):
        sound = np.asarray(grid_picture(tok.grammar.rules["audio"], (4, 1, 1), torch.arange(8)))
        assert sound.shape[1] == 2 * sound.shape[0]


def test_small_pictures_are_enlarged_by_whole_pixels() -> None:
    large = np.asarray(enlarged(PICTURE))
    assert large.shape == (256, 256, 3)
    assert np.array_equal(large[::8, ::8], np.asarray(PICTURE))


def test_senseless_numbers_are_refused(model_bundle: Path) -> None:
    with pytest.raises(ValueError, match="port 70000 must be 1 to 65535"):
        serve(model_bundle, port=70000)


# In a browser


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The page of the shipped dial-pad bundle, in a process of its own."""
    pytest.importorskip("gradio")
    port = free_port()
    command = [sys.executable, "-m", "unimm.cli", "serve", "--model", "dialpad"]
    command += ["--port", str(port), "--max-upload-mb", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 400
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    assert process.stdout is not None
                    pytest.fail(f"the page did not open: {process.stdout.read().decode()}")
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_click_through(address: str, tmp_path: Path) -> None:
    """Words to a picture, its tokens shown; a file to words; a file that is none; two at once."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    good, broken = tmp_path / "seven.png", tmp_path / "broken.png"
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    good.write_bytes(buffer.getvalue())
    broken.write_bytes(b"no picture")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1200, "height": 900})
        view.set_default_timeout(150_000)
        asked: list[str] = []
        view.on("request", lambda request: asked.append(request.url))
        view.goto(address)
        view.locator("#words textarea").fill("four")
        view.get_by_label("image", exact=True).check()
        other = browser.new_page()
        other.set_default_timeout(150_000)
        other.goto(address)
        other.locator("#words textarea").fill("nine")
        other.get_by_label("audio", exact=True).check()
        view.locator("#write").click()
        other.locator("#write").click()  # waits until the first is written
        view.locator("#picture img").wait_for()
        view.locator("#codes img").wait_for()
        expected = playwright.expect
        expected(view.locator("#status")).to_contain_text("tokens in", timeout=150_000)
        expected(other.locator("#status")).to_contain_text("first sound", timeout=150_000)
        if "UNIMM_SCREENSHOT" in os.environ:
            view.screenshot(path=os.environ["UNIMM_SCREENSHOT"])
        view.locator("#files input[type=file]").set_input_files(str(good))
        view.get_by_text("seven.png").first.wait_for()
        view.locator("#words textarea").fill("")
        view.get_by_label("text", exact=True).check()
        view.locator("#write").click()
        expected(view.locator("#text textarea")).not_to_have_value("", timeout=150_000)
        other.locator("#files input[type=file]").set_input_files(str(broken))
        other.get_by_text("broken").first.wait_for()
        other.locator("#write").click()
        other.get_by_text("broken.png: .png").first.wait_for()
        browser.close()
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert elsewhere == []
