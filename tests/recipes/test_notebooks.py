"""The notebooks: each runs as it stands, and its stored outputs are real, small and clean."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "recipes/notebooks").glob("*.ipynb"))
MAX_BYTES = 250_000
MAX_LINES = 100  # of code, in the notebook that brings a modality of its own


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_five() -> None:
    assert [path.stem[0] for path in NOTEBOOKS] == list("12345")


def test_outputs_are_small_and_clean(notebook: nbformat.NotebookNode) -> None:
    assert len(nbformat.writes(notebook)) < MAX_BYTES
    assert [cell.execution_count for cell in code(notebook)] == list(
        range(1, len(code(notebook)) + 1)
    )
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert outputs
    assert {o.output_type for o in outputs} <= {"stream", "execute_result", "display_data"}
    assert [o.text for o in outputs if o.get("name") == "stderr"] == []
    told = str([{**o.get("data", {}), "text": o.get("text", "")} for o in outputs])
    assert [word for word in ("/tmp/", "/home/", "/work/", "site-packages") if word in told] == []


def test_a_modality_of_ones_own_is_brought_in_under_100_lines() -> None:
    notebook = nbformat.read(NOTEBOOKS[4], as_version=4)
    start = next(n for n, cell in enumerate(code(notebook)) if "@register_codec" in cell.source)
    lines = "\n".join(cell.source for cell in code(notebook)[start:]).splitlines()
    assert sum(bool(line.strip()) for line in lines) < MAX_LINES


@pytest.mark.timeout(1600)  # a hundred seconds of a core, which a loaded machine takes long to give
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    """As `jupyter execute` runs it; a cell that raises ends it with an error."""
    out = tmp_path / path.name
    command = "from nbclient.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, str(path), f"--output={out}", "--timeout=1400"],
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    made, stored = (nbformat.read(name, as_version=4) for name in (out, path))
    # How a cell's prints are cut into messages is chance; what kinds of output it has is not.
    kinds = [[{o.output_type for o in cell.outputs} for cell in code(n)] for n in (made, stored)]
    assert kinds[0] == kinds[1]
