"""Cards made from what a folder holds, and `unimm card`."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from unimm.checkpoint import scores_of, sha256, verify
from unimm.cli import main
from unimm.evaluation.card import folder_card, write_card
from unimm.evaluation.inspection import inspect


@pytest.fixture
def bundle(model_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_bundle, tmp_path / "toy")


def metadata(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_bundle_gets_a_card_and_stays_sealed(bundle: Path) -> None:
    assert main(["card", str(bundle), "--licence", "mit", "--data", "made by rule"]) == 0
    verify(bundle)
    sealed = json.loads((bundle / "index.json").read_text())["sha256"]
    assert sealed["README.md"] == sha256(bundle / "README.md")
    card, found = (bundle / "README.md").read_text(), inspect(bundle).data()
    assert metadata(card)["license"] == "mit"
    assert metadata(card)["pipeline_tag"] == "any-to-any"
    assert "# toy\n" in card
    assert "## Training data\n\nmade by rule\n" in card
    fingerprint = found["vocabulary"]["fingerprint"]
    assert f"| vocabulary | {found['vocabulary']['ids']:,} ids, {fingerprint[:12]} |" in card
    assert "| image codec | `vision`, 1 x 16 codes, 0.0625 bits per pixel, " in card
    assert "| audio codec | `spectral`, 2 x 16 codes, 0.2 kbit/s, " in card
    assert "| decoder | 1 layers of width 32, " in card
    assert f"| lm/model.safetensors | {sha256(bundle / 'lm/model.safetensors')} |" in card


def test_what_is_not_told_is_unknown(model_bundle: Path, tmp_path: Path) -> None:
    codec = shutil.copytree(model_bundle / "codecs/audio", tmp_path / "sound")
    write_card(codec)
    card = (codec / "README.md").read_text()
    assert metadata(card)["pipeline_tag"] == "audio-to-audio"
    assert metadata(card)["license"] == "unknown"
    assert "## Training data\n\nnot stated\n" in card
    assert "Not measured" in card
    assert not (codec / "index.json").exists()


def test_a_card_that_is_there_stays(bundle: Path) -> None:
    (bundle / "index.json").unlink()
    (bundle / "README.md").write_text("by hand")
    with pytest.raises(ValueError, match=r"README\.md: a card is there already; --overwrite"):
        write_card(bundle)
    assert (bundle / "README.md").read_text() == "by hand"
    write_card(bundle, title="Other", overwrite=True)
    assert "# Other\n" in (bundle / "README.md").read_text()


def test_measured_figures(bundle: Path, tmp_path: Path) -> None:
    summary = {"codec": "toy/image", "classical": False, "modality": "image", "samples": 3}
    figures = {"means": {"psnr": {"value": 21.5}}, "whole": {}, "tokens": 16.0}
    measured = {"protocol": {"split": "squares"}, "summaries": [summary | figures]}
    (tmp_path / "results.json").write_text(json.dumps(measured))
    write_card(bundle, results=tmp_path)
    (score, codes) = scores_of(tmp_path)
    assert (score.figure, score.value, codes.value) == ("psnr", "21.5", "16")
    assert f"| {' | '.join(score)} |" in (bundle / "README.md").read_text()
    verify(bundle)


def test_nothing_is_written_where_something_is_wrong(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder; name a bundle or a codec"):
        write_card("dialpad")
    with pytest.raises(ValueError, match=r"results\.json"):
        write_card(bundle, results=tmp_path)
    (bundle / "generation.json").write_text('{"text": {"top_k": 1}}')
    with pytest.raises(ValueError, match=r"generation\.json: the file differs from index\.json"):
        write_card(bundle)
    assert not (bundle / "README.md").exists()
    assert (bundle / "index.json").exists()
    vocabulary = tmp_path / "words/vocabulary.json"
    vocabulary.parent.mkdir()
    shutil.copy(bundle / "vocabulary.json", vocabulary)
    with pytest.raises(ValueError, match="only bundles and codecs have cards"):
        folder_card(vocabulary)
