import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from unimm.data import sources as module
from unimm.data.manifest import Manifest
from unimm.data.shards import ShardReader
from unimm.data.sources import INCOMING, Source, find_sources
from unimm.data.templates import Template
from unimm.data.tokenize import ShardTokenizer
from unimm.data.tokenize_many import RunConfig, tokenize_shards
from unimm.tokenizer import UnifiedTokenizer

TEMPLATES = [Template(["{txt}", "{png}"])]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address in fsspec's own store in memory, which behaves like an object store."""
    monkeypatch.setattr(module, "SCHEMES", (*module.SCHEMES, "memory"))
    folder = f"/{uuid.uuid4().hex}"
    yield f"memory:/{folder}"
    files = fsspec.filesystem("memory")
    if files.exists(folder):
        files.rm(folder, recursive=True)


def put(url: str, data: bytes) -> None:
    fsspec.filesystem("memory").pipe_file(url, data)


@pytest.mark.parametrize(
    "url", ["http://x/a.tar", "file:///a.tar", "ftp://x/a.tar", "github://a.tar"]
)
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"scheme '\w+' is not allowed; .*https://, s3://"):
        find_sources(url)


def test_chained_addresses_are_refused() -> None:
    with pytest.raises(ValueError, match="chained addresses"):
        find_sources("https://x/a.tar::file:///etc/passwd")


@pytest.mark.parametrize(("url", "package"), [("s3://b/a.tar", "s3fs"), ("gs://b/a.tar", "gcsfs")])
def test_a_scheme_without_its_package_says_which(
    url: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install {package}"):
        find_sources(url)


def test_patterns_name_remote_shards(store: str) -> None:
    for name in ("a-000", "a-001", "b"):
        put(f"{store}/{name}.tar", b"x")
    put(f"{store}/notes.txt", b"x")
    names = [f"{store}/a-000.tar", f"{store}/a-001.tar"]
    assert [source.url for source in find_sources(f"{store}/a-{{000..001}}.tar")] == names
    found = [source.url.replace(":///", "://") for source in find_sources(f"{store}/a-*.tar")]
    assert found == names
    assert [source.name for source in find_sources(f"{store}/")] == [
        "a-000.tar",
        "a-001.tar",
        "b.tar",
    ]
    with pytest.raises(ValueError, match="1 missing shards"):
        find_sources(f"{store}/none-*.tar")
    with pytest.raises(ValueError, match=r"name a \.tar, a folder"):
        find_sources(f"{store}/notes.txt")


def test_two_shards_of_one_name_are_refused(store: str) -> None:
    with pytest.raises(ValueError, match=r"several raw shards are named a\.tar"):
        find_sources([f"{store}/x/a.tar", f"{store}/y/a.tar"])
    assert len(find_sources([f"{store}/x/a.tar", f"{store}/x/a.tar"])) == 1


def test_a_remote_shard_makes_the_bytes_of_the_local_one(
    make: Any, tokenizer: UnifiedTokenizer, store: str, tmp_path: Path
) -> None:
    local = make.raw(2, 3)
    for path in sorted(local.iterdir()):
        put(f"{store}/{path.name}", path.read_bytes())
    made = {}
    for out, given in (("here", local), ("there", f"{store}/raw-{{000..001}}.tar")):
        tokenize_shards(given, tmp_path / out, tokenizer, TEMPLATES, progress=False)
        made[out] = [path.read_bytes() for path in sorted((tmp_path / out).glob("*.tar"))]
    assert made["here"] == made["there"]
    assert not (tmp_path / "there" / INCOMING).exists()
    assert store in Manifest.read(tmp_path / "there/raw-000.tar").origin


def test_a_second_run_asks_only_for_the_version_of_a_remote_shard(
    make: Any, tokenizer: UnifiedTokenizer, store: str, tmp_path: Path, monkeypatch: Any
) -> None:
    data = (make.raw(1, 2) / "raw-000.tar").read_bytes()
    put(f"{store}/raw-000.tar", data)
    out = tmp_path / "out"
    tokenize_shards(f"{store}/", out, tokenizer, TEMPLATES, progress=False)
    fetched: list[str] = []
    fetch = Source._fetch

    def counted(self: Source, place: Path) -> None:
        fetched.append(self.name)
        fetch(self, place)

    monkeypatch.setattr(Source, "_fetch", counted)
    again = tokenize_shards(f"{store}/", out, tokenizer, TEMPLATES, progress=False)
    assert (again.kept, fetched) == (["raw-000.tar"], [])
    put(f"{store}/raw-000.tar", data)  # uploaded again: another version of the same bytes
    again = tokenize_shards(f"{store}/", out, tokenizer, TEMPLATES, progress=False)
    assert (again.kept, fetched) == (["raw-000.tar"], ["raw-000.tar"])
    other = make.shard([make.sample(9)], "other.tar").read_bytes()
    put(f"{store}/raw-000.tar", other)
    with pytest.raises(ValueError, match="was made with source"):
        tokenize_shards(f"{store}/", out, tokenizer, TEMPLATES, progress=False)


def test_a_remote_shard_is_held_against_its_manifest(
    make: Any, tokenizer: UnifiedTokenizer, store: str, tmp_path: Path
) -> None:
    path = make.raw(1, 3) / "raw-000.tar"
    put(f"{store}/raw-000.tar", path.read_bytes())
    size = path.stat().st_size
    Manifest(shard=path.name, samples=3, bytes=size, sha256="0" * 64).write(path.parent)
    put(f"{store}/raw-000.tar.json", (path.parent / "raw-000.tar.json").read_bytes())
    summary = tokenize_shards(f"{store}/", tmp_path / "out", tokenizer, TEMPLATES, progress=False)
    assert "its bytes differ from its manifest" in summary.failed["raw-000.tar"]


def test_a_shard_that_is_not_there_fails_alone(
    make: Any, tokenizer: UnifiedTokenizer, store: str, tmp_path: Path
) -> None:
    put(f"{store}/raw-000.tar", (make.raw(1, 2) / "raw-000.tar").read_bytes())
    pattern = f"{store}/raw-{{000..001}}.tar"
    summary = tokenize_shards(pattern, tmp_path / "out", tokenizer, TEMPLATES, progress=False)
    assert summary.written == ["raw-000.tar"]
    assert "no such shard" in summary.failed["raw-001.tar"] or summary.failed["raw-001.tar"]
    assert not (tmp_path / "out/raw-001.tar").exists()


def test_a_fetch_that_comes_short_is_tried_again_and_then_named(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(f"{store}/a.tar", b"x" * 1000)
    files = fsspec.filesystem("memory")
    opened: list[str] = []
    whole = type(files).open

    def short(self: Any, path: str, *given: Any, **more: Any) -> Any:
        opened.append(path)
        file = whole(self, path, *given, **more)
        file.seek(400)  # 600 bytes are left
        return file

    monkeypatch.setattr(type(files), "open", short)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with (
        pytest.raises(ValueError, match=r"a\.tar: can't be fetched: 600 of 1000 bytes came"),
        Source(f"{store}/a.tar", "a.tar").local(tmp_path),
    ):
        pass
    assert len(opened) == 3
    assert list(tmp_path.iterdir()) == []


def test_commands_run_only_when_they_are_allowed(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    raw = make.raw(1, 2) / "raw-000.tar"
    command = f"pipe:cat {raw}"
    with pytest.raises(ValueError, match="commands are not run unless they are allowed"):
        find_sources(command)
    run = RunConfig(allow_pipe=True)
    tokenize_shards(command, tmp_path / "piped", tokenizer, TEMPLATES, run=run, progress=False)
    tokenize_shards(raw, tmp_path / "plain", tokenizer, TEMPLATES, progress=False)
    piped, plain = (tmp_path / out / "raw-000.tar" for out in ("piped", "plain"))
    assert piped.read_bytes() == plain.read_bytes()
    failing = find_sources(f"pipe:cat {raw}; exit 3 # x.tar", allow_pipe=True)[0]
    with pytest.raises(ValueError, match="failed with exit code 3"):
        ShardTokenizer(tokenizer, TEMPLATES).run(failing, tmp_path / "out")
    with pytest.raises(ValueError, match=r"must name a \.tar"):
        find_sources("pipe:cat x", allow_pipe=True)


def test_what_a_killed_process_fetched_is_removed(store: str, tmp_path: Path, make: Any) -> None:
    left = tmp_path / INCOMING / "999999999" / "old.tar"
    left.parent.mkdir(parents=True)
    left.touch()
    put(f"{store}/a.tar", make.raw(1, 1).joinpath("raw-000.tar").read_bytes())
    with Source(f"{store}/a.tar", "a.tar").local(tmp_path) as path:
        assert len(ShardReader(path)) == 1
        assert not left.exists()
    assert not (tmp_path / INCOMING).exists()
