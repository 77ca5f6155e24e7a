"""Pushed, pinned, cached, offline: against a small Hub on this machine, over real connections."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from unimm import UnifiedLM, UnifiedTokenizer
from unimm.checkpoint import Card, push_to_hub, seal

TREE, COMMIT = r"/api/models/(o/n)/(tree|revision)/([^?/]+)", r"/api/models/(o/n)/commit/([^/]+)"


class SmallHub(ThreadingHTTPServer):
    """Repositories as `huggingface_hub` sees them: commits that hold files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def resolve(self, revision: str) -> str:
        return self.branches.get(revision, revision)

    def commit(self, branch: str, lines: list[dict[str, Any]]) -> str:
        files = dict(self.commits.get(self.branches.get(branch, ""), {}))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        # A twin of each commit, its name reversed, with one byte that was changed on the way.
        damaged = {name: body + b" " for name, body in files.items() if name == "lm/config.json"}
        self.commits[oid[::-1]] = {**files, **damaged}
        self.branches[branch] = oid
        return oid


class _Handler(BaseHTTPRequestHandler):
    server: SmallHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        self.server.asked.append(format % args)

    def answer(
        self, body: bytes, kind: str = "application/json", code: int = 200, **more: str
    ) -> None:
        self.send_response(code)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), **more}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        hub = self.server
        if path == "/api/repos/create":
            made: Any = {"url": f"{hub.address}/o/n"}
        elif "/preupload/" in path:
            wanted = json.loads(body)["files"]
            made = {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in wanted
                ]
            }
        elif path == "/api/validate-yaml":
            made = {"errors": [], "warnings": []}
        elif "/branch/" in path:
            branch = path.rpartition("/")[2]
            hub.branches[branch] = hub.branches["main"]
            made = {}
        else:
            found = re.fullmatch(COMMIT, path)
            assert found, path
            oid = hub.commit(found[2], [json.loads(line) for line in body.splitlines()])
            made = {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{hub.address}/o/n/commit/{oid}",
            }
        self.answer(json.dumps(made).encode())

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        hub = self.server
        raw = re.fullmatch(r"/(o/n)/resolve/([^/]+)/(.+)", path)
        if raw:
            oid = hub.resolve(raw[2])
            body = hub.commits[oid][raw[3]]
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            self.answer(body, "application/octet-stream", ETag=etag, X_Repo_Commit=oid)
            return
        if path == "/api/models/o/n":
            path += "/revision/main"
        found = re.fullmatch(TREE, path)
        oid = hub.resolve(found[3]) if found else ""
        if oid not in hub.commits or found is None:
            more = {"X_Error_Code": "RevisionNotFound"}
            self.answer(b'{"error": "Revision Not Found"}', code=404, **more)
            return
        files = hub.commits[oid]
        if found[2] == "tree":
            made: Any = [
                {"type": "file", "path": n, "size": len(b), "oid": "0" * 40}
                for n, b in files.items()
            ]
        else:
            made = {"id": "o/n", "sha": oid, "siblings": [{"rfilename": n} for n in files]}
        self.answer(json.dumps(made).encode())

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    server = SmallHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


SCRIPT = """
import json, unimm
from unimm.checkpoint import push_to_hub
first = push_to_hub({folder!r}, "o/n")
tok = unimm.UnifiedTokenizer.from_pretrained({folder!r})
second = tok.push_to_hub("o/n", message="again")
other = tok.push_to_hub("o/n", revision="other")
print(json.dumps([first, second, other]))

def load(revision):
    try:
        tok = unimm.UnifiedTokenizer.from_pretrained("o/n", revision=revision)
        lm = unimm.UnifiedLM.from_pretrained("o/n@" + revision)
        print(json.dumps([tok.vocabulary.fingerprint, lm.num_parameters]))
    except ValueError as error:
        print(json.dumps(str(error)))

for revision in (first, "nowhere", first[::-1], first):
    load(revision)
"""


def test_pushed_pinned_cached(
    hub: SmallHub, tmp_path: Path, frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    """One process of its own: the Hub's client reads its settings at import."""
    bundle = tmp_path / "bundle"
    frame_tok.save_pretrained(bundle)
    tiny_lm.save_pretrained(bundle)
    Card(title="Toy").write(bundle)
    seal(bundle)
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_none",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=str(bundle))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    pushed, loaded, nowhere, damaged, again = map(json.loads, done.stdout.splitlines())
    first, second, other = pushed
    # A whole bundle goes up sealed; a part of one voids the seal.
    assert {"index.json", "README.md", "lm/model.safetensors"} <= hub.commits[first].keys()
    assert "index.json" not in hub.commits[second]
    assert hub.branches == {"main": second, "other": other}
    # Pinned to the first commit, though the branch has moved on.
    assert loaded == again == [frame_tok.vocabulary.fingerprint, tiny_lm.num_parameters]
    assert "the Hub gave no repository 'o/n@nowhere'" in nowhere
    assert "lm/config.json: the file differs from index.json" in damaged
    # What is cached is not asked for again.
    assert sum(f"GET /o/n/resolve/{first}/lm/model.safetensors" in line for line in hub.asked) == 1
    assert first not in hub.asked[-1]


@pytest.mark.parametrize("name", ["code.py", "lm/weights.bin", "judges/net.pt"])
def test_what_could_run_code_is_not_uploaded(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"?")
    with pytest.raises(ValueError, match=f"hold no such file as '{name}'"):
        push_to_hub(tmp_path, "o/n")
