import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from webdataset import tariterators
from webdataset.writer import TarWriter

from unimm.data.manifest import Manifest
from unimm.data.shards import BLOCK, ShardReader, ShardWriter, expand

FILES = {"txt": b"seven", "json": b"{}"}


def write(path: Path, members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar as other programs make it."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def contents(path: Path) -> dict[str, dict[str, bytes]]:
    return {s.key: {e: s[e] for e in s.members} for s in ShardReader(path)}


# Which shards


def test_patterns_name_shards(tmp_path: Path) -> None:
    for name in ("a-000", "a-001", "a-002", "b-010"):
        (tmp_path / f"{name}.tar").touch()

    def names(pattern: Any) -> list[str]:
        return [path.stem for path in expand(pattern)]

    assert names(tmp_path) == ["a-000", "a-001", "a-002", "b-010"]
    assert names(f"{tmp_path}/a-{{000..002}}.tar") == ["a-000", "a-001", "a-002"]
    assert names(f"{tmp_path}/{{b-010,a-001}}.tar") == ["b-010", "a-001"]
    assert names(f"{tmp_path}/a-*.tar, {tmp_path}/b-010.tar") == [
        "a-000",
        "a-001",
        "a-002",
        "b-010",
    ]
    assert names([tmp_path / "b-010.tar", str(tmp_path)]) == ["b-010", "a-000", "a-001", "a-002"]
    assert names(tmp_path / "a-001.tar") == ["a-001"]


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path: Path) -> None:
    path = tmp_path / "a[1]{0..1}.tar"
    path.touch()
    assert expand(path) == [path]


def test_missing_shards_are_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "a-1.tar").touch()
    with pytest.raises(ValueError, match=r"^3 missing shards: .*a-0\.tar, .*a-2\.tar, .*x-\*\.tar"):
        expand(f"{tmp_path}/a-{{0..2}}.tar,{tmp_path}/x-*.tar")


@pytest.mark.parametrize(
    "pattern", ["pipe:touch owned; cat x.tar", "s3://b/x.tar", "http://x/y.tar"]
)
def test_only_local_files_are_read(pattern: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="only local files are read"):
        expand(pattern)
    assert not Path("owned").exists()


def test_nothing_named_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 missing shards"):
        expand(tmp_path)
    with pytest.raises(ValueError, match="no shards are named"):
        expand("")
    with pytest.raises(ValueError, match="counts down"):
        expand("a-{9..3}.tar")


# Writing


def test_samples_come_back(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("folder/0", {"txt": b"", "left.png": b"x" * 1000, "json": b"{}"})
        writer.write("folder/1", FILES)
    assert contents(tmp_path / "a.tar") == {
        "folder/0": {"txt": b"", "left.png": b"x" * 1000, "json": b"{}"},
        "folder/1": dict(FILES),
    }
    assert writer.samples == 2
    assert writer.bytes == (tmp_path / "a.tar").stat().st_size


def test_equal_samples_make_equal_bytes(tmp_path: Path) -> None:
    hashes = []
    for name in ("a.tar", "b.tar"):
        with ShardWriter(tmp_path / name) as writer:
            writer.write("0", FILES)
        hashes.append(writer.sha256)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert hashes[0] == hashes[1]
    manifest = Manifest(shard="a.tar", samples=1, bytes=writer.bytes, sha256=hashes[0])
    manifest.check(tmp_path / "a.tar", verify=True)


@pytest.mark.parametrize(
    "name", ["0.txt", "sub/0001.ids.npy", "ä.txt", "x" * 96 + ".txt", "d/" * 60 + "a.txt"]
)
def test_members_have_the_headers_of_tarfile(tmp_path: Path, name: str) -> None:
    key, _, extension = name.partition(".")
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write(key, {extension: b"seven" * 300})
    member = tarfile.TarInfo(name)
    member.size = 1500
    with (tmp_path / "a.tar").open("rb") as file:
        assert file.read(BLOCK) == member.tobuf(tarfile.USTAR_FORMAT)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path / "a.tar") as writer:
            writer.write("0", FILES)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_keys_that_would_be_read_as_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have no dot"), ShardWriter(tmp_path / "a") as writer:
        writer.write("a.b", FILES)


# What others write, and what others read


def test_webdataset_reads_what_we_write(make: Any) -> None:
    path = make.raw(1, 3) / "raw-000.tar"
    with path.open("rb") as file:
        members = ({**m, "__url__": ""} for m in tariterators.tar_file_iterator(file))
        theirs: list[Any] = list(tariterators.group_by_keys(members))
    ours = ShardReader(path)
    assert [entry["__key__"] for entry in theirs] == [sample.key for sample in ours]
    for entry, sample in zip(theirs, ours, strict=True):
        assert {e: entry[e] for e in sample.members} == {e: sample[e] for e in sample.members}


def test_what_webdataset_writes_is_read(tmp_path: Path) -> None:
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for key in ("x/000", "x/001"):
            writer.write({"__key__": key, "txt": "seven", "cls": 7, "seg.png": b"data"})
    assert contents(tmp_path / "a.tar") == {
        key: {"cls": b"7", "seg.png": b"data", "txt": b"seven"} for key in ("x/000", "x/001")
    }


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_read(tmp_path: Path, form: int) -> None:
    name = "folder/" + "ä" * 120 + ".txt"
    path = write(tmp_path / "a.tar", {name: b"one", "b.txt": b"two"}, form)
    assert contents(path) == {name.removesuffix(".txt"): {"txt": b"one"}, "b": {"txt": b"two"}}


def test_the_layout_of_img2dataset_is_read(shared_data: Path) -> None:
    reader = ShardReader(shared_data / "photos" / "photos-000000.tar")
    assert len(reader) == 100
    assert all(set(sample.members) == {"jpg", "txt"} for sample in reader)
    assert reader.samples[0]["jpg"][:2] == b"\xff\xd8"


# Damage: every one is named, none is silent


@pytest.fixture
def shard(make: Any) -> Path:
    return make.raw(1, 4) / "raw-000.tar"


def members_of(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


@pytest.mark.parametrize(
    "cut",
    [
        "at a member's end",
        "between samples",
        "in a header",
        "in data",
        "in the end",
        "to zero",
    ],
)
def test_cuts_are_found(shard: Path, cut: str) -> None:
    members = members_of(shard)
    last = members[-1]
    end = last.offset_data + -(-last.size // BLOCK) * BLOCK
    at = {
        "at a member's end": members[5].offset,
        "between samples": members[8].offset,
        "in a header": members[6].offset + 100,
        "in data": members[6].offset_data + 20,
        "in the end": end + BLOCK,
        "to zero": 0,
    }[cut]
    os.truncate(shard, at)
    with pytest.raises(ValueError, match=rf"{shard}: cut at byte {at}"):
        ShardReader(shard)


def test_zeroed_blocks_are_found(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    header = members_of(shard)[5].offset
    data[header : header + 2 * BLOCK] = bytes(2 * BLOCK)
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=f"a block of zeros at byte {header}"):
        ShardReader(shard)


@pytest.mark.parametrize("at", [0, 124, 148, 156, 257])
def test_damaged_headers_are_found(shard: Path, at: int) -> None:
    data = bytearray(shard.read_bytes())
    header = members_of(shard)[5].offset
    data[header + at] ^= 4
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=f"damaged tar header at byte {header}"):
        ShardReader(shard)


def test_a_flipped_payload_bit_is_found_by_the_manifest(shard: Path) -> None:
    with ShardWriter(shard) as writer:
        writer.write("0", FILES)
    manifest = Manifest(shard=shard.name, samples=1, bytes=writer.bytes, sha256=writer.sha256)
    data = bytearray(shard.read_bytes())
    data[members_of(shard)[0].offset_data] ^= 1
    shard.write_bytes(data)
    assert len(ShardReader(shard)) == 1
    manifest.check(shard)
    with pytest.raises(ValueError, match=f"{shard}: its bytes differ from its manifest"):
        manifest.check(shard, verify=True)


def test_the_sample_with_the_flipped_bit_is_named(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with ShardWriter(path) as writer:
        for number in range(4):
            writer.write(f"{number}", make.sample(number))
    manifest = Manifest(
        shard=path.name,
        samples=4,
        bytes=writer.bytes,
        sha256=writer.sha256,
        checks=tuple(writer.checks),
    )
    manifest.check(path, verify=True)
    data = bytearray(path.read_bytes())
    data[ShardReader(path).samples[2].members["wav"].offset + 99] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar: sample 2: its bytes differ"):
        manifest.check(path, verify=True)


def test_a_missing_member_is_found_by_the_manifest(shard: Path) -> None:
    manifest = Manifest(shard=shard.name, samples=4, bytes=1, sha256="")
    write(shard, {"0.txt": b"a"})
    with pytest.raises(ValueError, match="bytes, its manifest says 1"):
        manifest.check(shard)
    with pytest.raises(ValueError, match="holds 1 samples, its manifest says 4"):
        manifest.check_samples(shard, len(ShardReader(shard)))


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {"0.txt": b"a", "1.txt": b"b", "0.png": b"c"})
    with pytest.raises(ValueError, match="sample 0 comes twice"):
        ShardReader(path)
    path = write(tmp_path / "b.tar", {"0.txt": b"a", "0.TXT": b"b"})
    with pytest.raises(ValueError, match=r"sample 0 has \.txt twice"):
        ShardReader(path)


@pytest.mark.parametrize("name", ["/etc/x.txt", "../x.txt", "a/../../x.txt"])
def test_names_that_point_outside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="points outside the shard"):
        ShardReader(write(tmp_path / "a.tar", {name: b"x"}))


@pytest.mark.parametrize("name", ["noextension", ".hidden", "a/.b.txt"])
def test_names_without_key_or_extension_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"is not named key\.extension"):
        ShardReader(write(tmp_path / "a.tar", {name: b"x"}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("0.txt")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(member)
    with pytest.raises(ValueError, match="is a link or a device"):
        ShardReader(tmp_path / "a.tar")


def test_folders_in_a_tar_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("x")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        member = tarfile.TarInfo("./x/0.txt")
        tar.addfile(member)
    assert contents(tmp_path / "a.tar") == {"x/0": {"txt": b""}}


def test_a_shard_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the shard holds no samples"):
        ShardReader(write(tmp_path / "a.tar", {}))


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 4096)
    with pytest.raises(ValueError, match="damaged tar header at byte 0"):
        ShardReader(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="no such shard"):
        ShardReader(tmp_path / "b.tar")


def test_a_shard_that_shrinks_while_it_is_read_is_named(shard: Path) -> None:
    reader = ShardReader(shard)
    assert reader.samples[0]["txt"] == b"zero"
    os.truncate(shard, 600)
    with pytest.raises(ValueError, match=r"sample 0003: \.wav: the shard became shorter"):
        _ = reader.samples[3]["wav"]


def test_offsets_are_never_used_in_another_file(shard: Path, make: Any) -> None:
    """Neither before nor after the first reading, whose file stays open."""
    for reads in (0, 1):
        old = ShardReader(shard)
        for _ in range(reads):
            assert old.samples[0]["txt"] == b"zero"
        make.shard([make.sample(n) for n in (5, 6)], "raw/raw-000.tar")
        assert ShardReader(shard).samples[0]["txt"] == b"five"
        if reads:
            assert old.samples[3]["txt"] == b"three"
        else:
            with pytest.raises(ValueError, match="the shard was changed while it was read"):
                _ = old.samples[3]["txt"]
        make.raw(1, 4)


def test_a_field_that_a_sample_lacks_is_named(shard: Path) -> None:
    with pytest.raises(ValueError, match=r"sample 0002: has no \.mp4; it has \.json, \.png"):
        _ = ShardReader(shard).samples[2]["mp4"]


def test_a_member_of_terabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {"0.txt": b"x"})
    member = tarfile.TarInfo("0.txt")
    member.size = 300 * 2**20
    with path.open("wb") as file:
        file.write(member.tobuf())
        file.truncate(BLOCK + member.size + 2 * BLOCK)  # sparse: takes no space
    with pytest.raises(ValueError, match=r"sample 0: \.txt: 314572800 bytes; at most 268435456"):
        _ = ShardReader(path).samples[0]["txt"]


def test_many_shards_need_few_open_files(make: Any) -> None:
    folder = make.raw(80, 1)
    samples = [sample for path in expand(folder) for sample in ShardReader(path)]
    before = len(os.listdir("/proc/self/fd"))
    assert all(sample["txt"] for sample in samples * 2)
    assert len(os.listdir("/proc/self/fd")) - before <= 64
