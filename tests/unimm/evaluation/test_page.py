"""The page of a judged bundle, from results that a test made."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from unimm.data import dialpad
from unimm.evaluation.accuracy import Direction, DirectionResult, measure, read_text
from unimm.evaluation.page import write_answers, write_page
from unimm.evaluation.worlds import Judged, prompts_for
from unimm.signals import Audio, Document, Item
from unimm.tokenizer import UnifiedTokenizer

SCENES = [dialpad.make_scene(3, index) for index in range(4)]
JUDGED = Judged({"text": read_text}, {"image": 0.9951, "audio": 1.0})


def always_seven(prompts: list[Document], direction: Direction, seeds: list[int]) -> list[Document]:
    return [["seven"] for _ in prompts]


def answered(target: str, items: list[Item]) -> DirectionResult:
    """A direction in which a model answered with these."""
    way = Direction(source="text", target=target)
    prompts = prompts_for(way, SCENES[: len(items)])

    def give(asked: list[Document], direction: Direction, seeds: list[int]) -> list[Document]:
        return [[item] for item in items]

    def unread(given: list[Item]) -> list[None]:
        return [None for _ in given]

    return measure(way, prompts.documents, prompts.answers, give, unread)


def result(goal: float | None) -> DirectionResult:
    way = Direction(source="image", target="text", goal=goal)
    prompts = prompts_for(way, SCENES)
    return measure(way, prompts.documents, prompts.answers, always_seven, read_text)


@pytest.fixture(scope="module")
def tok(tokenizer_bundle: Path) -> UnifiedTokenizer:
    return UnifiedTokenizer.from_pretrained(tokenizer_bundle)


def test_everything_stands_in_one_file(tok: UnifiedTokenizer, tmp_path: Path) -> None:
    seconds = {"raw shards": 1.5, "codecs": 61.0}
    path = write_page(tmp_path, tok, [result(0.0)], JUDGED, SCENES, seconds)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"] == [path.name]
    html = path.read_text()
    # Nothing is fetched: every address is data.
    assert set(re.findall(r'(?:src|href)="(\w+):', html)) == {"data"}
    assert "<script" not in html
    for shown in ("1 of 1", "99.51%", "image, video, audio in one sequence", "codecs"):
        assert shown in html
    for modality in ("image", "audio", "video"):
        assert f"<h3>{modality}</h3>" in html
    assert html.count("<audio") >= 2 * len(SCENES)  # originals, and what the codes hold
    assert "What was read for what" in html
    assert f"{tok.vocabulary['text'].start} to {tok.vocabulary['text'].end - 1}" in html


def test_goals_are_counted_where_there_are_some(tok: UnifiedTokenizer, tmp_path: Path) -> None:
    def page(*results: DirectionResult) -> str:
        return write_page(tmp_path, tok, results, JUDGED, SCENES[:1], {}).read_text()

    html = page(result(0.0), result(1.0), result(None))
    assert "1 of 2" in html
    assert "answers judged" in html
    assert ">12<" in html
    assert "goals met" not in page(result(None))


def test_curves_come_from_the_runs_beside_it(tok: UnifiedTokenizer, tmp_path: Path) -> None:
    rows = {
        "lm": "step,train/loss,val/loss\n20,3.5,\n40,2.5,\n40,,2.75\n",
        "audio": "step,train/loss\n20,1.5\n40,1.25\n",
        "empty": "step,train/loss\n",
    }
    for run, text in rows.items():
        log = tmp_path / run / "logs/metrics.csv"
        log.parent.mkdir(parents=True)
        log.write_text(text)
    html = write_page(tmp_path, tok, [result(None)], JUDGED, SCENES[:1], {}).read_text()
    assert "<h2>Training</h2>" in html
    curves = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    named = {run for run in rows if re.search(rf">{run}<", html)}
    assert named == {"lm", "audio"}
    assert len(curves) >= 2
    assert "val/loss" in html


def test_without_runs_there_are_no_curves(tok: UnifiedTokenizer, tmp_path: Path) -> None:
    html = write_page(tmp_path, tok, [result(None)], JUDGED, SCENES[:1], {}).read_text()
    assert "<h2>Training</h2>" not in html


def test_answers_are_one_picture_with_a_row_for_each_direction(tmp_path: Path) -> None:
    pictures = answered("image", [scene.image for scene in SCENES])
    sounds = answered("audio", [scene.audio for scene in SCENES])
    films = answered("video", [scene.video for scene in SCENES])
    path = write_answers(tmp_path, [pictures, result(None), sounds, films])
    assert path is not None
    assert path == tmp_path / "answers.png"
    with Image.open(path) as sheet:
        width, height = sheet.size
    # Four pictures of 32 pixels, then two films of nine frames; all drawn at twice their size.
    assert height == 2 * 3 * 32 + 2 * 2
    assert width > 2 * 9 * 32 * 2


def test_words_alone_make_no_picture(tmp_path: Path) -> None:
    assert write_answers(tmp_path, [result(None)]) is None
    assert list(tmp_path.iterdir()) == []


def test_a_sound_without_samples_is_shown_too(tok: UnifiedTokenizer, tmp_path: Path) -> None:
    """What an untrained model may write."""
    empty = answered("audio", [Audio(torch.zeros(1, 0), 8000), Audio(torch.zeros(1, 3), 8000)])
    assert write_answers(tmp_path, [empty]) is not None
    assert write_page(tmp_path, tok, [empty], JUDGED, SCENES[:1], {}).is_file()
