"""The card: metadata that the Hub can read, and hashes that are true."""

from pathlib import Path

import yaml

from unimm.checkpoint import Card, Score, sha256


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
    unknown = Card(title="Other").text({})
    assert "not stated" in unknown
    assert "Not measured" in unknown
