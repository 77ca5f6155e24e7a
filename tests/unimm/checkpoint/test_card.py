"""The card: metadata that the Hub can read, and hashes that are true."""

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from unimm import build_codec
from unimm.checkpoint import Card, Score, scores_of, sha256
from unimm.evaluation.reconstruction import Protocol, make_sample, run
from unimm_tokenizers.adapters import classical


def test_the_card_says_what_is_known_and_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "lm").mkdir()
    weights = tmp_path / "lm" / "model.safetensors"
    weights.write_bytes(b"weights")
    (tmp_path / "index.json").write_text("{}")
    card = Card(
        title="A model: of words",
        licence="apache-2.0",
        data="MNIST (CC BY-SA 3.0)",
        base_model="owner/name",
        facts={"decoder": "12 parameters | two layers"},
        scores=[Score("image", "MNIST test", "PSNR", "21.3 dB")],
    )
    card.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "unimm",
        "license": "apache-2.0",
        "pipeline_tag": "any-to-any",
        "tags": ["unimm"],
        "base_model": "owner/name",
    }
    assert "# A model: of words" in body
    assert "| image | MNIST test | PSNR | 21.3 dB |" in body
    assert "12 parameters \\| two layers" in body
    assert f"| lm/model.safetensors | {sha256(weights)} |" in body
    assert "index.json" not in body
    assert "MNIST (CC BY-SA 3.0)" in body
    unknown = Card(title="Other", task=None).text({})
    assert "## Training data\n\nnot stated\n" in unknown
    assert "## Licence\n\nunknown\n" in unknown
    assert "Not measured" in unknown
    assert yaml.safe_load(unknown.split("---\n")[1]).keys() == {"library_name", "license", "tags"}


def test_sections_stand_between_data_and_reconstruction() -> None:
    card = Card(
        title="T", data="words", sections={"What it reaches": ["| a |", ""], "Again": ["x"]}
    )
    headings = re.findall(r"^## (.*)$", card.text({}), re.MULTILINE)
    assert headings[:4] == ["Training data", "What it reaches", "Again", "Reconstruction"]
    assert "\n\n\n" not in card.text({"model.safetensors": "ab"})


def test_a_measured_reconstruction_stands_in_the_card(tmp_path: Path) -> None:
    """What the benchmark wrote is read as it is; files to compare with are no part of the model."""
    sample = make_sample("one", Image.new("RGB", (16, 16), "teal"))
    codecs = {"mine": build_codec("vision-tiny-f8"), "jpeg:60": classical("jpeg:60")}
    results = run(codecs, [sample], Protocol(split="one square", probes=False, exactness=0))
    results.save(tmp_path)
    scores = scores_of(tmp_path)
    assert {score.codec for score in scores} == {"mine"}
    assert {score.data for score in scores} == {"one square, 1 images"}
    (psnr,) = [score.value for score in scores if score.figure == "psnr"]
    (summary, _) = results.summaries
    assert float(psnr) == pytest.approx(summary.means["psnr"].value, rel=1e-3)
    assert f"| mine | one square, 1 images | psnr | {psnr} |" in Card(
        title="M", scores=scores
    ).text({})
    (tmp_path / "results.json").write_text('{"accuracy": {}}')
    with pytest.raises(ValueError, match=r"results\.json: these are no results of `unimm bench`"):
        scores_of(tmp_path)
