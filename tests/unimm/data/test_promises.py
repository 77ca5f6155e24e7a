"""What is promised of raw and token shards under kills, damage, hostile files and bombs."""

import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from webdataset.writer import ShardWriter as TheirShardWriter

from unimm.data.manifest import Manifest, manifest_path
from unimm.data.media import MediaError, decode
from unimm.data.shards import BLOCK, ShardReader, ShardWriter
from unimm.data.sources import find_sources
from unimm.data.templates import Template, load_templates
from unimm.data.tokenize import TokenizeConfig, tokenize_shard
from unimm.data.tokenize_many import tokenize_shards
from unimm.tokenizer import UnifiedTokenizer

TEMPLATES = [Template(["{txt}", "{png}"]), Template(["{wav}", "{txt}"])]
EVERY = TokenizeConfig(documents_per_sample=None)


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar as other programs make it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


# Killed at any moment, and run again


def run_and_kill(work: Callable[[], object], seconds: float) -> bool:
    """Do some work in a child process and kill it after a while; whether it was still at it."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path, kills: int
) -> None:
    raw, out = make.raw(6, 8), tmp_path / "out"

    def work() -> None:
        tokenize_shards(raw, out, tokenizer, TEMPLATES, EVERY, progress=False)

    begun = time.perf_counter()
    tokenize_shards(raw, tmp_path / "whole", tokenizer, TEMPLATES, EVERY, progress=False)
    seconds = time.perf_counter() - begun
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    moments = random.Random(0)
    killed = 0
    while killed < kills:
        before = {path: path.stat().st_ino for path in out.glob("*.tar.json")}
        killed += run_and_kill(work, moments.uniform(0.05, 0.5) * seconds)
        for path in out.glob("*.tar"):  # what is visible is whole, committed or not
            assert path.read_bytes() == whole[path.name]
        for path in out.glob("*.tar.json"):
            assert path.read_bytes() == whole[path.name]
        assert all(path.stat().st_ino == inode for path, inode in before.items())
        if len(list(out.glob("*.tar.json"))) == 6:
            for path in out.iterdir():  # all is done: begin anew
                path.unlink()
    work()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


# Faults: 3 cuts, a zeroed block, a flipped bit, a missing member, a wrong extension, nothing in it


@pytest.fixture
def sealed(make: Any) -> Path:
    """A raw shard of six samples with its manifest."""
    path = make.folder / "raw/raw.tar"
    with ShardWriter(path) as writer:
        for number in range(6):
            writer.write(f"{number:04d}", make.sample(number))
    Manifest(
        shard=path.name,
        samples=6,
        bytes=writer.bytes,
        sha256=writer.sha256,
        checks=tuple(writer.checks),
    ).write(path.parent)
    return path


def members_of(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def edited(path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> None:
    """Write a tar again with other members, or without some."""
    with tarfile.open(path) as tar:
        members = {}
        for info in tar.getmembers():
            file = tar.extractfile(info)
            assert file is not None
            made = change(info.name, file.read())
            members |= {} if made is None else {made[0]: made[1]}
    write_tar(path, members)


def cut(path: Path, number: int, inside: int) -> None:
    os.truncate(path, members_of(path)[number].offset + inside)


def damage(path: Path, number: int, change: Callable[[bytearray, tarfile.TarInfo], None]) -> None:
    data = bytearray(path.read_bytes())
    change(data, members_of(path)[number])
    path.write_bytes(data)


def zero_header(data: bytearray, member: tarfile.TarInfo) -> None:
    data[member.offset : member.offset + BLOCK] = bytes(BLOCK)


def zero_data(data: bytearray, member: tarfile.TarInfo) -> None:
    data[member.offset_data : member.offset_data + BLOCK] = bytes(BLOCK)


def flip_data(data: bytearray, member: tarfile.TarInfo) -> None:
    data[member.offset_data + 50] ^= 1


def flip_header(data: bytearray, member: tarfile.TarInfo) -> None:
    data[member.offset + 3] ^= 1


# Members stand in the order json, png, txt, wav of each sample: number 9 is 0002.png.
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut between samples": (lambda p: cut(p, 12, 0), "after 0002.wav"),
    "cut in a header": (lambda p: cut(p, 9, 100), "after 0002.json"),
    "cut in data": (lambda p: cut(p, 9, BLOCK + 20), "inside 0002.png"),
    "zeroed header": (lambda p: damage(p, 9, zero_header), "after 0002.json"),
    "zeroed data": (lambda p: damage(p, 9, zero_data), "sample 0002"),
    "flipped bit in data": (lambda p: damage(p, 11, flip_data), "sample 0002"),
    "flipped bit in a header": (lambda p: damage(p, 9, flip_header), "after 0002.json"),
    "missing member": (
        lambda p: edited(p, lambda n, d: None if n == "0002.png" else (n, d)),
        "0002",
    ),
    "wrong extension": (
        lambda p: edited(p, lambda n, d: ("0002.wav2" if n == "0002.png" else n, d)),
        "0002",
    ),
    "swapped kinds": (
        lambda p: edited(p, lambda n, d: (n, b"RIFF" + d if n == "0002.png" else d)),
        "0002",
    ),
    "empty member": (
        lambda p: edited(p, lambda n, d: (n, b"" if n == "0002.png" else d)),
        "0002",
    ),
}


@pytest.mark.parametrize("sealing", ["with a manifest", "without"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_reported_with_shard_and_key(
    sealed: Path, tokenizer: UnifiedTokenizer, tmp_path: Path, fault: str, sealing: str
) -> None:
    if sealing == "without":
        if fault == "flipped bit in data":
            pytest.skip("a WAV has no checksum: only a manifest finds a changed sample value")
        manifest_path(sealed).unlink()
    make_fault, expected = FAULTS[fault]
    make_fault(sealed)
    out = tmp_path / "out"
    summary = tokenize_shards(sealed, out, tokenizer, TEMPLATES, EVERY, progress=False)
    if summary.failed:
        report = summary.failed["raw.tar"]
        assert not (out / "raw.tar").exists()
    else:
        manifest = Manifest.read(out / "raw.tar")
        report = f"{out / manifest.shard}: " + " ".join(map(str, manifest.skipped))
        assert "raw.tar" in report
        assert len(manifest.skipped) == 1
    assert "raw.tar" in report
    assert (expected if summary.failed else "0002") in report


@pytest.mark.parametrize(("samples", "poison", "fails"), [(1000, 1, False), (1000, 2, True)])
def test_poison_is_left_out_up_to_a_thousandth(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path, samples: int, poison: int, fails: bool
) -> None:
    files = [{"txt": b"seven" if n >= poison else b"\xff"} for n in range(samples)]
    source, out = make.shard(files), tmp_path / "out"
    summary = tokenize_shards(source, out, tokenizer, [Template(["{txt}"])], progress=False)
    assert bool(summary.failed) == fails
    if fails:
        assert "more than 1 of 1000 samples are unusable" in summary.failed["one.tar"]
        generous = TokenizeConfig(max_skipped=0.002)
        again = tokenize_shards(source, out, tokenizer, [Template(["{txt}"])], generous)
        assert (again.failed, again.skipped) == ({}, 2)
    else:
        assert summary.documents == samples - poison
        assert Manifest.read(out / "one.tar").skipped[0]["key"] == "0000"


# Hostile files: nothing runs, nothing is written outside


class Touch:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pickle", "pth", "pt", "npy", "py", "yaml"])
def test_files_that_could_run_code_do_not(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path, extension: str
) -> None:
    owned = tmp_path / "owned"
    evil = pickle.dumps(Touch(owned))
    assert pickle.loads(evil) == 0  # the corpus works
    assert owned.exists()
    owned.unlink()
    if extension == "npy":
        stream = io.BytesIO()
        np.save(stream, np.array([Touch(owned)], dtype=object), allow_pickle=True)
        evil = stream.getvalue()
    before = {path for path in tmp_path.rglob("*")}
    source = make.shard([{**make.sample(0), extension: evil}, make.sample(1)])
    summary = tokenize_shards(source, tmp_path / "out", tokenizer, TEMPLATES, progress=False)
    assert summary.failed == {}
    with pytest.raises(MediaError):
        decode(extension, evil, "")
    assert not owned.exists()
    new = {path for path in tmp_path.rglob("*")} - before
    assert all(path.is_relative_to(tmp_path / "out") or "raw" in path.parts for path in new)


@pytest.mark.parametrize("name", ["/tmp/owned.txt", "../owned.txt", "a/../../owned.txt"])
def test_names_that_lead_outside_are_refused(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path, name: str
) -> None:
    source = write_tar(tmp_path / "raw/a.tar", {name: b"seven"})
    summary = tokenize_shards(source, tmp_path / "out", tokenizer, [Template(["{txt}"])])
    assert "points outside the shard" in summary.failed["a.tar"]
    assert [path.name for path in tmp_path.rglob("owned*")] == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_refused(tokenizer: UnifiedTokenizer, tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("0.txt")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(member)
    summary = tokenize_shards(
        tmp_path / "a.tar", tmp_path / "out", tokenizer, [Template(["{txt}"])]
    )
    assert "'0.txt' at byte 512 is a link or a device" in summary.failed["a.tar"]


def test_commands_and_yaml_tags_do_not_run(tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    with pytest.raises(ValueError, match="commands are not run"):
        find_sources(f"pipe:touch {owned}; cat a.tar")
    templates = tmp_path / "templates.yaml"
    templates.write_text(f"- !!python/object/apply:os.system ['touch {owned}']\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_templates(templates)
    assert not owned.exists()


# Bombs: an error, soon and small

BOMBS = """
import resource, sys, time
from pathlib import Path
from unimm.data.media import MediaError, decode
from unimm.data.shards import ShardReader

for path in map(Path, sys.argv[1:]):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    try:
        if path.suffix == ".tar":
            ShardReader(path)
        else:
            decode(path.suffix[1:], path.read_bytes(), path.name)
        error = "none"
    except ValueError as refused:
        error = f"{type(refused).__name__} {refused}"
    seconds = time.process_time() - begun
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{path.name}\\t{seconds}\\t{grown}\\t{error}")
"""


def png_bomb(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    rows = zlib.compress((b"\0" + bytes(side // 8)) * side)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def silence(form: str) -> bytes:
    """Ten hours."""
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", 1000, 1, format=form, subtype="PCM_16") as file:
        for _ in range(36):
            file.write(np.zeros(1_000_000, dtype=np.int16))
    return stream.getvalue()


def npy_bomb() -> bytes:
    stream = io.BytesIO()
    header: Any = {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + bytes(64)


def gif_bomb(frames: int) -> bytes:
    frame = b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0"
    return b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff" + frame * frames + b";"


def mp4_bomb(frames: int) -> bytes:
    """A frame, stored again and again."""
    av = pytest.importorskip("av", reason="films need PyAV (the video extra)")
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        track = container.add_stream("mpeg4", rate=30)
        track.width = track.height = 64
        track.pix_fmt = "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        (first, *_) = [*track.encode(picture), *track.encode()]
        data = bytes(first)
        for number in range(frames):
            packet = av.Packet(data)
            packet.stream, packet.time_base = track, first.time_base
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            container.mux(packet)
    return stream.getvalue()


def gzip_bomb() -> bytes:
    packer = zlib.compressobj(wbits=31)
    return b"".join([*(packer.compress(bytes(2**20)) for _ in range(300)), packer.flush()])


BOMB_FILES: dict[str, Callable[[], bytes]] = {
    "picture.png": lambda: png_bomb(12000),
    "text.gz": gzip_bomb,
    "shard.tar": gzip_bomb,
    "array.npy": npy_bomb,
    "silence.flac": lambda: silence("FLAC"),
    "silence.wav": lambda: silence("WAV"),
    "film.gif": lambda: gif_bomb(100_000),
    "film.mp4": lambda: mp4_bomb(100_000),
    "nested.json": lambda: b"[" * 10_000_000,
}


def test_bombs_are_refused_soon_and_in_little_memory(tmp_path: Path) -> None:
    paths = []
    for name, make_bomb in BOMB_FILES.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(make_bomb())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, *map(str, paths)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34)),
    )
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == list(BOMB_FILES)
    for name, seconds, grown, error in lines:
        assert error != "none", name
        assert float(seconds) < 2, (name, seconds)  # of this process: others may be busy, too
        assert float(grown) < 1000, (name, grown)


# Shards that others wrote


def test_shards_of_webdatasets_own_writer_are_tokenized(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    pattern = str(tmp_path / "theirs-%06d.tar")
    with TheirShardWriter(pattern, maxcount=3, verbose=0) as writer:
        for number in range(7):
            files = make.sample(number)
            writer.write(
                {
                    "__key__": f"sub/{number:06d}",
                    "png": files["png"],
                    "wav": files["wav"],
                    "txt": files["txt"].decode(),
                    "cls": number,
                    "json": {"digit": number},
                }
            )
    sources = f"{tmp_path}/theirs-{{000000..000002}}.tar"
    summary = tokenize_shards(sources, tmp_path / "out", tokenizer, TEMPLATES, EVERY)
    assert (summary.documents, summary.skipped, summary.failed) == (14, 0, {})


def test_shards_in_the_layout_of_img2dataset_are_tokenized(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    """00000.tar with jpg, json and txt of each key; 00000.parquet and 00000_stats.json beside."""
    folder = tmp_path / "downloaded"
    for shard in range(2):
        members: dict[str, bytes] = {}
        for number in range(3):
            key = f"{shard:05d}{number:04d}"
            facts = {"caption": f"a {number}", "url": "https://x/y", "status": "success"}
            members[f"{key}.jpg"] = make.png(number, form="JPEG")
            members[f"{key}.json"] = json.dumps({**facts, "key": key, "exif": "{}"}).encode()
            members[f"{key}.txt"] = facts["caption"].encode()
        write_tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 3}')
    summary = tokenize_shards(folder, tmp_path / "out", tokenizer, None, EVERY)
    assert (summary.documents, summary.skipped) == (24, 0)  # four templates of each sample
    assert set(summary.tokens) == {"text", "image", "semantic"}


def test_real_photographs_are_tokenized(
    shared_data: Path, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    source = tmp_path / "raw/few.tar"
    with ShardWriter(source) as writer:
        for sample in ShardReader(shared_data / "photos/photos-000000.tar").samples[:4]:
            writer.write(sample.key, {name: sample[name] for name in sample.members})
    manifest = tokenize_shard(source, tmp_path / "out", tokenizer, [Template(["{txt}", "{image}"])])
    assert (manifest.samples, manifest.skipped) == (4, ())
    assert manifest.tokens["image"] == 4 * (64 * 64 + 6)
