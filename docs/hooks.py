"""Pages of the site made of other files: notebooks, and benchmark results by date and device."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOTEBOOKS = ROOT / "recipes" / "notebooks"
RESULTS_MARK = "<!-- results -->"
RESULT_NAME = re.compile(r"(\d{4}-\d\d-\d\d)-(.+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, outputs included, and for each file of results."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, _ = MarkdownExporter().from_filename(str(path))
        # Notebooks point at each other, and a style that only Jupyter needs stands in some outputs.
        text = re.sub(r"\]\(([\w-]+)\.ipynb\)", r"](\1.md)", text)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    for path in sorted(RESULTS.glob("*.md")):
        date, what = _parts(path)
        text = f"# {what}\n\nMeasured on {date}.\n\n{path.read_text(encoding='utf-8')}"
        files.append(File.generated(config, f"benchmarks/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """List the results where a page asks for them, the newest first."""
    rows = [
        f"| {date} | [{what}](benchmarks/{path.stem}.md) |"
        for path in sorted(RESULTS.glob("*.md"), reverse=True)
        for date, what in [_parts(path)]
    ]
    table = "\n".join(["| date | device and what |", "|---|---|", *rows])
    return markdown.replace(RESULTS_MARK, table)


def _parts(path: Path) -> tuple[str, str]:
    """Date and the rest of a name such as 2026-11-20-cpu-x86_64-kernels.md."""
    found = RESULT_NAME.fullmatch(path.stem)
    if found is None:
        raise ValueError(f"{path}: results are named <date>-<device>-<what>.md")
    return found[1], found[2]
