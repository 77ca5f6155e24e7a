"""The page of a judged bundle, from results that a test made."""

import re
from pathlib import Path

import pytest

from unimm.data import dialpad
from unimm.evaluation.accuracy import Direction, DirectionResult, measure, read_text
from unimm.evaluation.page import write_page
from unimm.evaluation.worlds import Judged, prompts_for
from unimm.signals import Document
from unimm.tokenizer import UnifiedTokenizer

SCENES = [dialpad.make_scene(3, index) for index in range(4)]
JUDGED = Judged({"text": read_text}, {"image": 0.9951, "audio": 1.0})


def always_seven(prompts: list[Document], direction: Direction, seeds: list[int]) -> list[Document]:
    return [["seven"] for _ in prompts]


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
        assert f"<h3>{modality}</h3>" in html or modality in html
    assert html.count("<audio") >= 2 * len(SCENES)  # originals, and what the codes hold
    assert re.search(r"<td>text</td>|text</th>", html)
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
