"""What commands say, and where: for people, for programs, and not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unimm.cli import main

Captured = pytest.CaptureFixture[str]


def told(capsys: Captured, *arguments: str | Path, code: int = 0) -> dict:
    """The one JSON object on the standard output."""
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_results_as_json(capsys: Captured, model_bundle: Path, tmp_path: Path) -> None:
    checks = told(capsys, "doctor")
    assert checks["command"] == "doctor"
    assert {"name", "found", "advice"} == checks["checks"][0].keys()
    made = told(capsys, "shards", "dialpad", "--out", tmp_path / "raw", "--count", "3")
    assert (made["out"], made["samples"]) == (str(tmp_path / "raw"), 3)
    coded = told(
        capsys,
        *("tokenize", tmp_path / "raw", "--tokenizer", model_bundle, "--out", tmp_path / "tokens"),
    )
    assert coded["written"] == ["dialpad-000000.tar"]
    assert coded["documents"] == 3
    found = told(capsys, "inspect", tmp_path / "tokens")
    assert (found["command"], found["kind"], found["samples"]) == ("inspect", "shards", 3)


def test_an_error_as_json(capsys: Captured) -> None:
    found = told(capsys, "inspect", "./nowhere", code=1)
    assert "no folder './nowhere'" in found["error"]


def test_numbers_that_are_none_stay_valid_json(capsys: Captured, tmp_path: Path) -> None:
    """JSON knows no NaN, and a benchmark of one flat picture has some."""
    from PIL import Image

    Image.new("RGB", (16, 16), "teal").save(tmp_path / "flat.png")
    assert (
        main(["bench", "jpeg:60", "--data", str(tmp_path), "--out", str(tmp_path / "o"), "--json"])
        == 0
    )
    out = capsys.readouterr().out
    json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_quiet_leaves_the_result(
    capfd: pytest.CaptureFixture[str], model_bundle: Path, tmp_path: Path
) -> None:
    given = ["--count", "3", "--quiet"]
    assert main(["shards", "dialpad", "--out", str(tmp_path / "raw"), *given]) == 0
    coding = ["tokenize", str(tmp_path / "raw"), "--tokenizer", str(model_bundle)]
    assert main(["--quiet", *coding, "--out", str(tmp_path / "tokens")]) == 0
    said = capfd.readouterr()
    assert said.err == ""
    first, second = said.out.splitlines()
    assert first.startswith(str(tmp_path / "raw"))
    assert second.startswith("1 shards written")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As in `unimm inspect dialpad | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "unimm.cli", "completion", "bash"]
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command(capsys: Captured, shell: str) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("tokenize", "inspect", "--tokenizer", "--json"):
        assert word.lstrip("-") in script
    if shell == "bash":
        done = subprocess.run(["bash", "-n"], input=script, text=True, timeout=20, check=False)
        assert done.returncode == 0
