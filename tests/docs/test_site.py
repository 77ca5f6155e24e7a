"""The documentation: its site builds with no broken link, and its examples run."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from pytest_examples import CodeExample, EvalExample, find_examples

import unimm

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def examples() -> dict[str, list[CodeExample]]:
    """The Python examples of each page, in order."""
    found = defaultdict(list)
    for example in find_examples(*PAGES):
        if example.prefix in ("python", "py"):
            found[example.path.relative_to(ROOT).as_posix()].append(example)
    return found


@pytest.mark.parametrize("page", examples())
def test_examples_of_a_page_run(
    page: str, eval_example: EvalExample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, in a folder of their own; what `#>` says is what is printed."""
    import torch
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    # The README's examples stand for any sound and any picture.
    known = {"samples": torch.zeros(1, 3200), "image": Image.new("RGB", (32, 32))}
    eval_example.set_config(line_length=100)
    for example in examples()[page]:
        known |= eval_example.run_print_check(example, module_globals=known)


def test_site_builds_with_no_broken_link(tmp_path: Path) -> None:
    """Strict: a missing page, picture, anchor or function fails it."""
    out = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reference = (out / "reference/unimm/index.html").read_text()
    for name in ("UnifiedTokenizer", "UnifiedLM", "generate", "push_to_hub"):
        assert f"{name}" in reference
    for path in (ROOT / "benchmarks/results").glob("*.md"):
        assert (out / "benchmarks" / path.stem / "index.html").is_file()
    notebook = (out / "notebooks/1-tokenize-anything/index.html").read_text()
    assert "data:image/webp;base64," in notebook  # outputs are shown
    # Nothing is fetched from elsewhere when a page is read.
    page = (out / "index.html").read_text()
    assert (
        re.findall(r'(?:src|href)="(https?://[^"]+)"[^>]*rel="(?:stylesheet|preconnect)', page)
        == []
    )


def test_every_public_name_has_its_place_in_the_reference() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.md"))
    named = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)", pages, re.MULTILINE)}
    assert set(unimm.__all__) - named - {"__version__"} == set()


def test_links_of_files_beside_the_site_lead_somewhere() -> None:
    """README and its kind, which the site does not hold."""
    broken = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "recipes").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if not re.match(r"\w+:", target) and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert broken == []
