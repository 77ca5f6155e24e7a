import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimm.data.batch import structure_of
from unimm.data.manifest import Manifest, manifest_path, read_token_manifest
from unimm.data.media import decode
from unimm.data.shards import Sample, ShardReader, expand
from unimm.data.templates import Template
from unimm.data.tokenize import (
    Progress,
    ShardTokenizer,
    TokenizeConfig,
    coder_hashes,
    npy_header,
    read_ids,
    tokenize_shard,
)
from unimm.data.tokenize_many import RunConfig, tokenize_shards
from unimm.tokenizer import UnifiedTokenizer
from unimm.vocabulary import MODALITIES, Vocabulary

TEMPLATES = [
    Template(["{txt}", "{png}"], drop_condition=0.2),
    Template(["{png}", "{txt}"]),
    Template(["{wav}", "{json.note.word}"], name="hear"),
    Template(["{txt}", "{wav}", "{png}"]),
]
EVERY = TokenizeConfig(documents_per_sample=None)


def ids_of(sample: Sample) -> torch.Tensor:
    return torch.from_numpy(decode("npy", sample["ids.npy"], sample.where).astype(np.int64))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# One shard


def test_documents_come_back_from_their_ids(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    source = make.raw(1, 5) / "raw-000.tar"
    manifest = tokenize_shard(source, tmp_path / "out", tokenizer, TEMPLATES, EVERY)
    reader = ShardReader(tmp_path / "out" / "raw-000.tar")
    assert len(reader) == manifest.samples == 20
    raw = {sample.key: sample for sample in ShardReader(source)}
    tokens: Counter[str] = Counter()
    for sample in reader:
        ids, meta = ids_of(sample), json.loads(sample["meta.json"])
        segments = tokenizer.grammar.parse(ids)
        word = raw[meta["source"]]["txt"].decode()
        expected = f"{word} left" if meta["template"] == "hear" else word
        texts = [tokenizer.text.decode(s.codes) for s in segments if s.kind == "text"]
        assert texts in ([expected], [])
        assert meta["items"] == [list(item) for item in structure_of(segments)]
        picture = decode("png", raw[meta["source"]]["png"], "")
        alone = tokenizer.encode_items([picture])[0].codes
        for segment in segments:
            if segment.kind == "image":
                assert torch.equal(segment.codes, alone)
        counts = tokenizer.grammar.layout(ids).modality.bincount(minlength=len(MODALITIES))
        tokens.update(dict(zip(MODALITIES, counts.tolist(), strict=True)))
    assert manifest.tokens == {m: n for m, n in tokens.items() if n}


def test_the_manifest_says_what_was_made_of_what(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    source = make.raw(1, 3) / "raw-000.tar"
    manifest = tokenize_shard(source, tmp_path / "out", tokenizer, TEMPLATES)
    shard = tmp_path / "out" / "raw-000.tar"
    assert read_token_manifest(shard, tokenizer.vocabulary) == manifest
    manifest.check(shard, verify=True)
    assert manifest.recipe is not None
    assert manifest.recipe.vocabulary == tokenizer.vocabulary.fingerprint
    assert set(manifest.recipe.coders) == {"text", "image", "audio", "semantic"}
    assert manifest.skipped == ()


def test_the_same_input_makes_the_same_bytes(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    source = make.raw(1, 7) / "raw-000.tar"
    for out in ("a", "b"):
        tokenize_shard(source, tmp_path / out, tokenizer, TEMPLATES)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_a_picture_in_several_documents_is_coded_once(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded: Counter[str] = Counter()
    for kind in ("image", "audio"):
        codec = tokenizer.codecs[kind]

        def encode(x: torch.Tensor, kind: str = kind, encode: Any = codec.encode) -> torch.Tensor:
            coded[kind] += len(x)
            return encode(x)

        monkeypatch.setattr(codec, "encode", encode)
    tokenize_shard(make.raw(1, 6) / "raw-000.tar", tmp_path / "out", tokenizer, TEMPLATES, EVERY)
    assert coded == {"image": 6, "audio": 6}


def test_inputs_are_never_changed(make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path) -> None:
    folder = make.raw(1, 2)
    before = folder_bytes(folder)
    with pytest.raises(ValueError, match="would replace raw ones"):
        tokenize_shard(folder / "raw-000.tar", folder, tokenizer, TEMPLATES)
    with pytest.raises(ValueError, match="would replace raw ones"):
        tokenize_shards(folder, folder, tokenizer, TEMPLATES, progress=False)
    tokenize_shards(folder, tmp_path / "out", tokenizer, TEMPLATES, progress=False)
    assert folder_bytes(folder) == before


def test_a_template_is_refused_before_the_first_shard(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    words = UnifiedTokenizer(tokenizer.text)
    with pytest.raises(ValueError, match="needs 'image' tokens; the tokenizer has text"):
        tokenize_shards(make.raw(), tmp_path / "out", words, [Template(["{png}"])])
    assert not (tmp_path / "out").exists()


# Unusable samples


def test_one_unusable_sample_is_left_out_and_named(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path, caplog: Any
) -> None:
    files = [make.sample(n) for n in range(4)]
    del files[2]["png"]
    source = make.shard(files)
    manifest = tokenize_shard(source, tmp_path / "out", tokenizer, [Template(["{txt}", "{image}"])])
    reason = "a template wants {image}, but the sample has only .json, .txt, .wav"
    assert manifest.skipped == ({"key": "0002", "reason": reason},)
    assert manifest.samples == 3
    assert f"{source}: sample 0002: skipped: {reason}" in caplog.text
    assert Manifest.read(tmp_path / "out" / "one.tar") == manifest


def test_a_sample_that_a_codec_refuses_is_found_among_the_others(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    files = [make.sample(n) for n in range(4)]
    files[1]["png"] = make.png(0, 20, 16)  # the semantic codec takes 16 x 16 pixels only
    source, templates = make.shard(files), [Template(["{txt}", "{semantic}"])]
    manifest = tokenize_shard(source, tmp_path / "out", tokenizer, templates)
    assert [entry["key"] for entry in manifest.skipped] == ["0001"]
    assert "16" in manifest.skipped[0]["reason"]
    keys = [json.loads(s["meta.json"])["source"] for s in ShardReader(tmp_path / "out/one.tar")]
    assert keys == ["0000", "0002", "0003"]
    assert set(manifest.tokens) == {"text", "semantic"}


def test_pictures_are_cut_to_a_grid_that_the_vocabulary_fixes(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    fixed = UnifiedTokenizer(tokenizer.text, [tokenizer.codecs["image"]], grids={"image": (4, 4)})
    source = make.shard([{"png": make.png(0, width=23, height=19)}])
    manifest = tokenize_shard(source, tmp_path / "out", fixed, [Template(["{png}"])])
    (sample,) = ShardReader(tmp_path / "out/one.tar")
    picture = decode("png", ShardReader(source).samples[0]["png"], "")
    assert torch.equal(ids_of(sample), fixed.encode([picture]))
    assert manifest.tokens["image"] == 4 * 4 + 2


def test_too_many_unusable_samples_fail_the_shard(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    files = [make.sample(n) for n in range(6)]
    for number in (1, 4):
        files[number]["png"] = files[number]["png"][:60]
    source = make.shard(files)
    expected = r"more than 1 of 6 samples are unusable \(the first is 0001: \.png: damaged picture"
    with pytest.raises(ValueError, match=expected):
        tokenize_shard(source, tmp_path / "out", tokenizer, [Template(["{png}"])])
    assert list((tmp_path / "out").iterdir()) == []
    config = TokenizeConfig(max_skipped=0.5)
    manifest = tokenize_shard(source, tmp_path / "out", tokenizer, [Template(["{png}"])], config)
    assert [entry["key"] for entry in manifest.skipped] == ["0001", "0004"]


def test_a_shard_without_a_usable_sample_fails(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    source = make.shard([{"txt": b"seven"}])
    with pytest.raises(ValueError, match=r"holds no usable sample \(the first is 0000: a template"):
        tokenize_shard(source, tmp_path / "out", tokenizer, [Template(["{png}"])])


# Many shards


def test_a_second_run_does_only_what_is_missing(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    folder, out = make.raw(3, 2), tmp_path / "out"
    first = tokenize_shards(folder, out, tokenizer, TEMPLATES, progress=False)
    assert first.written == ["raw-000.tar", "raw-001.tar", "raw-002.tar"]
    before = folder_bytes(out)
    manifest_path(out / "raw-001.tar").unlink()  # not committed: it does not exist
    (out / "raw-001.tar").write_bytes(b"half a shard")
    again = tokenize_shards(folder, out, tokenizer, TEMPLATES, progress=False)
    assert (again.written, again.kept) == (["raw-001.tar"], ["raw-000.tar", "raw-002.tar"])
    assert folder_bytes(out) == before
    assert again.documents == first.documents == 6
    assert again.tokens == first.tokens


def test_what_was_made_from_something_else_is_refused(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    folder, out = make.raw(1, 2), tmp_path / "out"
    tokenize_shards(folder, out, tokenizer, TEMPLATES, progress=False)
    before = folder_bytes(out)
    with pytest.raises(ValueError, match=r"raw-000\.tar: was made with templates \w+ instead of"):
        tokenize_shards(folder, out, tokenizer, TEMPLATES[:1], progress=False)
    make.shard([make.sample(9)], "raw/raw-000.tar")
    with pytest.raises(ValueError, match="was made with source"):
        tokenize_shards(folder, out, tokenizer, TEMPLATES, progress=False)
    assert folder_bytes(out) == before
    made = tokenize_shards(folder, out, tokenizer, TEMPLATES, overwrite=True, progress=False)
    assert made.written == ["raw-000.tar"]
    assert folder_bytes(out) != before


def test_other_weights_are_something_else(tokenizer: UnifiedTokenizer) -> None:
    before = coder_hashes(tokenizer)
    assert coder_hashes(tokenizer) == before
    parameter = next(tokenizer.codecs["audio"].parameters())
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter[(0,) * parameter.ndim] += 1e-6
    after = coder_hashes(tokenizer)
    with torch.no_grad():
        parameter.copy_(kept)
    assert {name for name in before if before[name] != after[name]} == {"audio"}


def test_a_failed_shard_is_noted_and_the_others_go_on(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    folder, out = make.raw(3, 2), tmp_path / "out"
    good = (folder / "raw-001.tar").read_bytes()
    os.truncate(folder / "raw-001.tar", 3000)
    summary = tokenize_shards(folder, out, tokenizer, TEMPLATES, progress=False)
    assert summary.written == ["raw-000.tar", "raw-002.tar"]
    assert "cut at byte 3000" in summary.failed["raw-001.tar"]
    note = out / "failed" / "raw-001.tar.json"
    assert "cut at byte 3000" in json.loads(note.read_text())["error"]
    assert not (out / "raw-001.tar").exists()
    (folder / "raw-001.tar").write_bytes(good)
    again = tokenize_shards(folder, out, tokenizer, TEMPLATES, progress=False)
    assert (again.written, again.failed) == (["raw-001.tar"], {})
    assert not note.exists()


def test_shards_of_one_name_are_refused(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    paths = [make.shard([make.sample(0)], f"{folder}/a.tar") for folder in ("x", "y")]
    with pytest.raises(ValueError, match=r"several raw shards are named a\.tar"):
        tokenize_shards(paths, tmp_path / "out", tokenizer, TEMPLATES)


def test_missing_shards_are_named_before_anything_is_written(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    pattern = f"{make.raw(1, 1)}/raw-{{000..002}}.tar"
    with pytest.raises(ValueError, match=r"2 missing shards: .*raw-001\.tar, .*raw-002\.tar"):
        tokenize_shards(pattern, tmp_path / "out", tokenizer, TEMPLATES)
    assert not (tmp_path / "out").exists()


def test_templates_may_be_left_to_the_samples(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    config = TokenizeConfig(documents_per_sample=6)
    summary = tokenize_shards(make.raw(1, 8), tmp_path / "out", tokenizer, None, config)
    assert summary.documents == 48
    assert set(summary.tokens) == {"text", "image", "audio", "semantic"}


@pytest.mark.parametrize("moment", [1, 2, 4])
def test_a_killed_run_leaves_nothing_half(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path, moment: int
) -> None:
    """SIGKILL inside a shard; the next run makes the same bytes as one that was never killed."""
    source, out = make.raw(1, 6) / "raw-000.tar", tmp_path / "out"
    worker = ShardTokenizer(tokenizer, TEMPLATES, TokenizeConfig(batch_size=1, decoders=0))
    worker.run(source, tmp_path / "whole")
    child = os.fork()
    if child == 0:
        seen: list[Progress] = []

        def die(progress: Progress) -> None:
            seen.append(progress)
            if len(seen) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        worker.run(source, out, die)
        os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert not (out / "raw-000.tar").exists()
    assert not manifest_path(out / "raw-000.tar").exists()
    assert [path.suffix for path in out.iterdir()] == [".tmp"]
    worker.run(source, out)
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_processes_make_the_same_bytes(make: Any, bundle: Path, tmp_path: Path) -> None:
    folder = make.raw(3, 4)
    os.truncate(make.shard([make.sample(0)], "raw/raw-bad.tar"), 700)
    summaries = [
        tokenize_shards(
            folder, tmp_path / out, bundle, TEMPLATES, run=RunConfig(workers=n), progress=False
        )
        for out, n in (("one", 1), ("two", 2))
    ]
    assert summaries[0] == summaries[1]
    assert list(summaries[0].failed) == ["raw-bad.tar"]
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


@pytest.mark.parametrize("run", [RunConfig(workers=2), RunConfig(engine="ray")])
def test_several_workers_need_a_name(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path, run: RunConfig
) -> None:
    with pytest.raises(ValueError, match="by name or path"):
        tokenize_shards(make.raw(), tmp_path / "out", tokenizer, TEMPLATES, run=run)


def test_no_more_shards_are_begun_when_too_many_failed(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    folder = make.raw(6, 1)
    for number in (1, 2, 4):
        os.truncate(folder / f"raw-00{number}.tar", 700)

    def run(out: str, max_failed: float | None) -> tuple[list[str], list[str], list[str]]:
        given = RunConfig(max_failed=max_failed)
        made = tokenize_shards(folder, tmp_path / out, tokenizer, TEMPLATES, run=given)
        return made.written, sorted(made.failed), made.open

    names = [f"raw-00{number}.tar" for number in range(6)]
    assert run("a", 1) == (names[:1], names[1:3], names[3:])
    assert run("b", 0) == (names[:1], names[1:2], names[2:])
    assert run("c", 0.4) == ([names[0], names[3]], [names[1], names[2], names[4]], names[5:])
    assert run("d", None)[2] == []


def test_a_failure_leaves_its_traceback(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    folder = make.raw(1, 2)
    os.truncate(folder / "raw-000.tar", 700)
    tokenize_shards(folder, tmp_path / "out", tokenizer, TEMPLATES, progress=False)
    note = json.loads((tmp_path / "out/failed/raw-000.tar.json").read_text())
    assert note["shard"] == str(folder / "raw-000.tar")
    assert note["traceback"].startswith("Traceback")
    assert note["traceback"].strip().endswith(note["error"])


# Token shards


def test_another_vocabulary_names_both_fingerprints(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    tokenize_shards(make.raw(1, 1), tmp_path / "out", tokenizer, TEMPLATES, progress=False)
    other = Vocabulary(300)
    mine, theirs = tokenizer.vocabulary.fingerprint[:12], other.fingerprint[:12]
    with pytest.raises(ValueError, match=rf"raw-000\.tar was made with .* {mine}, .*{theirs}"):
        read_token_manifest(tmp_path / "out" / "raw-000.tar", other)


def test_raw_and_uncommitted_shards_are_no_token_shards(make: Any, tokenizer: Any) -> None:
    shard = make.raw(1, 1) / "raw-000.tar"
    with pytest.raises(ValueError, match="no token shard: it has no manifest"):
        read_token_manifest(shard, tokenizer.vocabulary)
    Manifest(shard=shard.name, samples=1, bytes=1, sha256="").write(shard.parent)
    with pytest.raises(ValueError, match="a raw shard, not a token shard"):
        read_token_manifest(shard, tokenizer.vocabulary)
    for text in ("{}", "[]", '{"format": 1, "shrad": "x"}', "{"):
        manifest_path(shard).write_text(text)
        with pytest.raises(ValueError, match=r"raw-000\.tar\.json: "):
            Manifest.read(shard)


def test_a_raw_manifest_is_held_against_its_shard(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    shard = make.raw(1, 2) / "raw-000.tar"
    size = shard.stat().st_size
    Manifest(shard=shard.name, samples=3, bytes=size, sha256="0" * 64).write(shard.parent)
    with pytest.raises(ValueError, match="holds 2 samples, its manifest says 3"):
        tokenize_shard(shard, tmp_path / "out", tokenizer, TEMPLATES)
    Manifest(shard=shard.name, samples=2, bytes=size, sha256="0" * 64).write(shard.parent)
    with pytest.raises(ValueError, match="its bytes differ from its manifest"):
        tokenize_shard(shard, tmp_path / "out", tokenizer, TEMPLATES)


def test_committed_shards_are_compared_byte_for_byte_when_asked(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    source = make.raw(1, 2) / "raw-000.tar"
    tokenize_shard(source, tmp_path, tokenizer, TEMPLATES)
    shard = tmp_path / "raw-000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    assert tokenize_shard(source, tmp_path, tokenizer, TEMPLATES).samples == 2
    with pytest.raises(ValueError, match=r"raw-000\.tar: its bytes differ from its manifest"):
        tokenize_shard(source, tmp_path, tokenizer, TEMPLATES, TokenizeConfig(verify=True))


@settings(max_examples=25)
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=20), st.sampled_from(["<u2", "<u4"]))
def test_ids_are_plain_numpy_files(values: list[int], dtype: str) -> None:
    data = npy_header(dtype, len(values)) + np.array(values, dtype).tobytes()
    assert read_ids(data, dtype).tolist() == values
    assert decode("npy", data, "").tolist() == values
    for damaged in (data[:-1], data[:100], b"x" + data[1:], data + b"\0\0\0\0"):
        with pytest.raises(ValueError, match=r"ids\.npy is damaged"):
            read_ids(damaged, dtype)


def test_expanded_shards_include_only_tars(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    tokenize_shards(make.raw(2, 1), tmp_path / "out", tokenizer, TEMPLATES, progress=False)
    assert [path.name for path in expand(tmp_path / "out")] == ["raw-000.tar", "raw-001.tar"]
