"""One distribution, three import packages, two folders whose names belong to others.

Hugging Face owns the import names `kernels` and `tokenizers`. Our folders of those names are source
roots: a single stray `__init__.py` in one of them breaks `transformers` in any notebook started at
the repository's root, and importlib mode hides that from pytest. Hence tests that look at files.
"""

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
OURS = {"unimm": ".", "unimm_kernels": "kernels", "unimm_tokenizers": "tokenizers"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("folder", ["kernels", "tokenizers", "recipes", "benchmarks", "tests"])
def test_folder_is_not_a_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), (
        f"{folder}/__init__.py shadows an installed package"
    )


@pytest.mark.parametrize("folder", ["recipes", "benchmarks", "tests"])
def test_nothing_below_is_a_package_either(folder: str) -> None:
    assert list((ROOT / folder).rglob("__init__.py")) == []


@pytest.mark.parametrize("name", ["tokenizers", "kernels"])
def test_hugging_face_name_is_not_our_folder(name: str) -> None:
    """The name is theirs, or nobody's: an empty namespace, which gives way once installed."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is None or not Path(spec.origin).is_relative_to(ROOT / name)


@pytest.mark.parametrize(("name", "folder"), OURS.items())
def test_package_comes_from_this_checkout(name: str, folder: str) -> None:
    found = importlib.import_module(name).__file__
    assert found is not None
    assert Path(found) == ROOT / folder / name / "__init__.py"


@pytest.mark.parametrize("target", PROJECT["scripts"].values())
def test_console_script_exists(target: str) -> None:
    module, _, attribute = target.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[zipfile.ZipInfo]:
    """The members of the wheel that this checkout builds."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("unimm-*.whl")
    with zipfile.ZipFile(path) as file:
        return file.infolist()


def test_wheel_holds_three_packages_and_nothing_else(wheel: list[zipfile.ZipInfo]) -> None:
    tops = {member.filename.split("/")[0] for member in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(OURS)


def test_wheel_holds_every_source_file(wheel: list[zipfile.ZipInfo]) -> None:
    names = {member.filename for member in wheel}
    sources = {
        path.relative_to(ROOT / folder).as_posix()
        for name, folder in OURS.items()
        for path in (ROOT / folder / name).rglob("*.py")
    }
    assert sources - names == set()
    assert "unimm/py.typed" in names


def test_wheel_holds_what_was_measured_of_kernels(wheel: list[zipfile.ZipInfo]) -> None:
    """Without the table every device would take the defaults, and nobody would notice."""
    sizes = {member.filename: member.file_size for member in wheel}
    tables = {path.name: path.stat().st_size for path in (ROOT / "kernels").rglob("*.json")}
    assert "tuning.json" in tables
    assert {name: sizes[f"unimm_kernels/{name}"] for name in tables} == tables


def test_wheel_holds_recipes_and_bundles(wheel: list[zipfile.ZipInfo]) -> None:
    sizes = {member.filename: member.file_size for member in wheel}
    shipped = {
        f"unimm/{path.relative_to(ROOT).as_posix()}"
        for recipe in ("dialpad", "digits")
        for path in (ROOT / "recipes" / recipe).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    shipped |= {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "unimm" / "pretrained").rglob("*")
        if path.is_file()
    }
    assert shipped - sizes.keys() == set()
    bundles = sum(size for name, size in sizes.items() if name.startswith("unimm/pretrained/"))
    assert bundles < 40e6


def imported(path: Path) -> tuple[set[str], set[str]]:
    """Top-level names that a file imports: at import, and only when some function runs."""
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    # For the type checker alone: never run.
    typing = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
    ]
    inside = {id(node) for part in (*functions, *typing) for node in ast.walk(part)}
    early, late = set(), set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        (late if id(node) in inside else early).update(name.split(".")[0] for name in names)
    return (
        early - sys.stdlib_module_names - OURS.keys(),
        late - sys.stdlib_module_names - OURS.keys(),
    )


def test_every_import_is_a_requirement() -> None:
    """What a module imports is a dependency; what a function imports may come with an extra."""
    core = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    extras = {
        canonicalize_name(Requirement(line).name)
        for extra, lines in PROJECT["optional-dependencies"].items()
        for line in lines
        if extra != "dev"
    }
    # No extra that the checks install holds it, so its distribution is not found by import name.
    distributions = {"visqol": ["visqol-python"], **importlib.metadata.packages_distributions()}
    undeclared = []
    for name, folder in OURS.items():
        for path in (ROOT / folder / name).rglob("*.py"):
            early, late = imported(path)
            for names, allowed in ((early, core), (late, core | extras)):
                undeclared += [
                    f"{path.relative_to(ROOT)} imports {found}"
                    for found in names
                    if not {canonicalize_name(d) for d in distributions.get(found, [found])}
                    & allowed
                ]
    assert undeclared == []


def security_floors() -> list[tuple[str, str]]:
    """Rows of SECURITY.md's table of floors: package and the first version that is safe."""
    rows = re.findall(r"^\| `([a-z-]+)` \| ([\d.]+) \|", (ROOT / "SECURITY.md").read_text(), re.M)
    assert {"torch", "lightning", "pillow", "ray"} <= {package for package, _ in rows}
    return rows


@pytest.mark.parametrize(("package", "floor"), security_floors())
def test_requirement_keeps_the_security_floor(package: str, floor: str) -> None:
    extras = PROJECT["optional-dependencies"].values()
    lines = PROJECT["dependencies"] + [line for extra in extras for line in extra]
    found = [r for r in map(Requirement, lines) if r.name == package]
    assert found, f"{package} has a floor in SECURITY.md and no requirement in pyproject.toml"
    for requirement in found:
        lower = [Version(s.version) for s in requirement.specifier if s.operator in (">=", "==")]
        assert lower, f"{requirement} has no lower bound"
        assert max(lower) >= Version(floor)
