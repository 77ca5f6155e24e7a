"""`unimm convert`: both ways by one command, and one line where it can't."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from unimm import UnifiedLM, UnifiedTokenizer
from unimm.cli import main


def test_there_and_back(save_language_model: Any, tmp_path: Path) -> None:
    save_language_model()
    source, bundle, out = (str(tmp_path / name) for name in ("source", "bundle", "out"))
    assert main(["convert", source, bundle, "--codec", "digits/image"]) == 0
    tokenizer = UnifiedTokenizer.from_pretrained(bundle)
    assert tokenizer.vocabulary.modalities[:2] == ("text", "image")
    assert main(["convert", bundle, out]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == UnifiedLM.from_pretrained(bundle).config.vocab_size


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere", "no folder 'nowhere'"), ("digits", "rotary positions on three axes")],
)
def test_one_line_says_what_is_wrong(
    source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", source, str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("unimm: error: ")
    assert message in line
