"""The house rules that a program can check. import-linter checks the direction of imports.

Every rule walks all files and reports all offenders at once, each as `path:line`.
"""

import ast
import functools
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import unimm

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "unimm": ROOT,
    "unimm_kernels": ROOT / "kernels",
    "unimm_tokenizers": ROOT / "tokenizers",
}
SOURCES = {
    path: ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    for package, root in PACKAGES.items()
    for path in sorted((root / package).rglob("*.py"))
}
OTHERS = [
    path
    for folder in ("tests", "benchmarks", "recipes")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
MAX_LINES = 600
MAX_PARAMETERS = 8
RUNS_CODE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}
RUNS_CODE_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
# Arguments without which a call trusts what it reads: call -> (keyword, the only value allowed).
REQUIRED_ARGUMENTS = {
    "torch.load": ("weights_only", "True"),
    "extractall": ("filter", "'data'"),
    "extract": ("filter", "'data'"),
}
FORBIDDEN_ARGUMENTS = {"allow_pickle", "trust_remote_code", "shell"}


@functools.cache
def library_nodes() -> list[tuple[str, ast.AST]]:
    """Every syntax node of the three packages, with where it stands."""
    return [
        (f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(), filename=str(path)))
    ]


def fresh_python(script: str) -> dict[str, object]:
    """Run `script` in a new interpreter and return the JSON object that it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_room_has_its_layer() -> None:
    """A room that the layers do not name could import whatever it liked."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = " | ".join(contracts["contracts"][0]["layers"]).split(" | ")
    rooms = {".".join(name.split(".")[:2]) for name in SOURCES.values()}
    library_rooms = {room for room in rooms if room.startswith("unimm.")}
    assert library_rooms | (PACKAGES.keys() - {"unimm"}) == set(layers)


def test_every_file_tells_one_story() -> None:
    lengths = {str(p.relative_to(ROOT)): p.read_text().count("\n") for p in [*SOURCES, *OTHERS]}
    assert lengths
    assert {path: count for path, count in lengths.items() if count > MAX_LINES} == {}


def is_config(argument: ast.arg) -> bool:
    """Whether a parameter is a config dataclass."""
    kind = "" if argument.annotation is None else ast.unparse(argument.annotation)
    return argument.arg == "config" or kind.removesuffix(" | None").endswith("Config")


def test_constructors_stay_small() -> None:
    """At most eight parameters beside a config dataclass: a new idea is a new small class."""
    large = []
    for where, node in library_nodes():
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            count = sum(a.arg != "self" and not is_config(a) for a in arguments)
            if count > MAX_PARAMETERS:
                large.append(f"{where} takes {count} parameters")
    assert large == []


def test_no_error_is_swallowed() -> None:
    swallowed = []
    for where, node in library_nodes():
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = "everything" if node.type is None else ast.unparse(node.type)
        silent = all(isinstance(line, ast.Pass) for line in node.body)
        if node.type is None or (silent and caught in ("Exception", "BaseException")):
            swallowed.append(f"{where} catches {caught}")
    assert swallowed == []


def test_nothing_that_is_read_can_run_code() -> None:
    """No pickle in any spelling, no eval, no shell, archives only through the data filter."""
    unsafe = []
    for where, node in library_nodes():
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
            unsafe += [f"{where} imports {name}" for name in names & RUNS_CODE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in RUNS_CODE_MODULES:
                unsafe.append(f"{where} imports from {node.module}")
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
            if called in RUNS_CODE_CALLS:
                unsafe.append(f"{where} calls {called}")
            for name in (called, called.rpartition(".")[2]):
                keyword, value = REQUIRED_ARGUMENTS.get(name, ("", ""))
                if keyword and given.get(keyword) != value:
                    unsafe.append(f"{where} calls {called} without {keyword}={value}")
            for keyword in FORBIDDEN_ARGUMENTS & given.keys():
                if given[keyword] != "False":
                    unsafe.append(f"{where} passes {keyword}={given[keyword]}")
    assert unsafe == []


def test_importing_the_library_loads_nothing_heavy() -> None:
    heavy = ["torch", "numpy", "lightning", "webdataset", "PIL", "triton"]
    loaded = fresh_python(
        "import json, sys, unimm;"
        f"print(json.dumps({{name: name in sys.modules for name in {heavy}}}))"
    )
    assert loaded == dict.fromkeys(heavy, False)


def test_kernels_and_codecs_do_not_load_the_library() -> None:
    above = ["unimm", "lightning", "webdataset"]
    loaded = fresh_python(
        "import json, sys, unimm_kernels, unimm_tokenizers;"
        f"print(json.dumps({{name: name in sys.modules for name in {above}}}))"
    )
    assert loaded == dict.fromkeys(above, False)


def test_every_public_name_resolves() -> None:
    assert [name for name in unimm.__all__ if not hasattr(unimm, name)] == []


def test_importing_every_module_does_no_work() -> None:
    """Modules import without their extras, draw no number and change no global setting."""
    states = fresh_python(f"""
import hashlib, importlib, json, os, signal
import lightning.pytorch.cli, torch, torchaudio, webdataset

def state():
    return {{
        "random numbers": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "default dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "device asked for": torch.cuda.is_initialized(),
        "SIGTERM handler": str(signal.getsignal(signal.SIGTERM)),
        "folder": os.getcwd(),
    }}

before = state()
for name in {list(SOURCES.values())!r}:
    importlib.import_module(name)
print(json.dumps({{"before": before, "after": state()}}))
""")
    assert states["after"] == states["before"]
