"""The Ray engine makes the bytes of the local one. Ray runs in a process of its own: it starts
servers, sets variables and catches signals."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from unimm.data.manifest import Manifest
from unimm.data.shards import expand
from unimm.data.templates import load_templates
from unimm.data.tokenize import TokenizeConfig
from unimm.data.tokenize_many import RunConfig, tokenize_shards

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray (the ray extra)")
TEMPLATES = [{"parts": ["{txt}", "{png}"]}, {"parts": ["{wav}", "{txt}"]}]
SCRIPT = """
import json, os, sys
from unimm.data import ray_engine
from unimm.data.templates import load_templates
from unimm.data.tokenize import TokenizeConfig
from unimm.data.tokenize_many import RunConfig, tokenize_shards

raw, out, bundle, templates, tasks = sys.argv[1:]
if tasks == "tasks":  # as with a GPU: an actor of no CPU, whose samples are decoded by tasks
    class Actor(ray_engine.TokenizeActor):
        def __init__(self, job, sources):
            self._worker = job.worker("cpu", ray_engine.decode_by_tasks)
            self._job, self._sources = job, sources
    ray_engine.TokenizeActor = Actor
start = ray_engine._ray
def started(address):
    ray = start(address)
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    node = ray._private.worker.global_worker.node
    print(json.dumps({"token": is_token_auth_enabled(), "dashboard": node.webui_url or ""}))
    return ray
ray_engine._ray = started
run = RunConfig(engine="ray", workers=1)
config = TokenizeConfig(documents_per_sample=None)
made = tokenize_shards(raw, out, bundle, load_templates(templates), config, run, progress=False)
print(json.dumps({"written": made.written, "kept": made.kept, "failed": made.failed}))
"""


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    path = tmp_path / "templates.yaml"
    path.write_text(yaml.safe_dump(TEMPLATES))
    return path


# Ray gives its processes 30 s to start, whatever else the machine does, and has no option for it.
ATTEMPTS = 3


def ray_run(*arguments: Any) -> list[dict[str, Any]]:
    """What the run printed: how Ray was set up, and what became of the shards."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    for _ in range(ATTEMPTS):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        if "Ray did not start" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.timeout(900)  # Ray starts a dozen processes, which take their time on a busy machine
@pytest.mark.parametrize("decoding", ["threads", pytest.param("tasks", marks=pytest.mark.slow)])
def test_ray_makes_the_bytes_of_the_local_engine(
    make: Any, bundle: Path, templates: Path, tmp_path: Path, decoding: str
) -> None:
    raw = make.raw(3, 5)
    os.truncate(raw / "raw-001.tar", 2000)
    local, out = tmp_path / "local", tmp_path / "ray"
    every = TokenizeConfig(documents_per_sample=None)
    here = tokenize_shards(raw, local, bundle, load_templates(templates), every, progress=False)
    setup, made = ray_run(raw, out, bundle, templates, decoding)
    assert setup == {"token": True, "dashboard": ""}
    assert made["written"] == here.written == ["raw-000.tar", "raw-002.tar"]
    assert list(made["failed"]) == list(here.failed) == ["raw-001.tar"]
    assert "cut at byte 2000" in made["failed"]["raw-001.tar"]
    assert shard_bytes(out) == shard_bytes(local)
    assert [Manifest.read(path).samples for path in expand(out)] == [10, 10]
    note = json.loads((out / "failed/raw-001.tar.json").read_text())
    assert note["traceback"].startswith("Traceback")


def test_ray_is_asked_for_only_when_there_is_work(make: Any, bundle: Path, tmp_path: Path) -> None:
    raw = make.raw(1, 2)
    first = tokenize_shards(raw, tmp_path / "out", bundle, progress=False)
    run = RunConfig(engine="ray")
    again = tokenize_shards(raw, tmp_path / "out", bundle, None, None, run, progress=False)
    assert (first.written, again.kept) == (["raw-000.tar"], ["raw-000.tar"])


def test_a_ray_that_was_imported_without_its_token_is_refused(
    make: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", sys)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    run = RunConfig(engine="ray")
    with pytest.raises(ValueError, match="set RAY_AUTH_MODE=token before it is"):
        tokenize_shards(make.raw(1, 1), tmp_path / "out", bundle, run=run, progress=False)


@pytest.mark.timeout(300)
def test_a_cluster_that_can_not_be_reached_is_one_line(
    make: Any, bundle: Path, tmp_path: Path
) -> None:
    given = ["tokenize", str(make.raw(1, 1)), "--tokenizer", str(bundle), "--quiet"]
    ray = ["--out", str(tmp_path / "out"), "--engine", "ray", "--ray-address", "nowhere"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "unimm.cli", *given, *ray],
        env={**environment, "RAY_AUTH_TOKEN": "0" * 64},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("unimm: error: Ray did not start at nowhere: ")
