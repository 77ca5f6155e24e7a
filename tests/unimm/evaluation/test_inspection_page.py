"""The page of a shard's decoded samples."""

import base64
import re
from pathlib import Path

import pytest

from unimm.cli import main
from unimm.data.shards import ShardReader, ShardWriter
from unimm.evaluation.inspection_page import write_shard_page
from unimm.tokenizer import UnifiedTokenizer


def parts(html: str) -> list[str]:
    return re.findall(r'<span class="label">(.*?)</span>', html)


@pytest.fixture(scope="module")
def tok(tokenizer_bundle: Path) -> UnifiedTokenizer:
    return UnifiedTokenizer.from_pretrained(tokenizer_bundle)


def test_raw_files_stand_next_to_what_their_codes_give(
    raw_shards: Path, tok: UnifiedTokenizer, tmp_path: Path
) -> None:
    shard = raw_shards / "dialpad-000000.tar"
    page = write_shard_page(shard, tmp_path / "page.html", tok, samples=3)
    html = page.read_text()
    shown = parts(html)
    assert shown.count(".png") == shown.count(".wav") == shown.count(".gif") == 3
    assert sum(label.endswith(" codes") for label in shown) == 9
    keys = [sample.key for sample in ShardReader(shard).samples]
    assert re.findall(r"<figcaption>(\d+)", html) == [keys[0], keys[4], keys[8]]
    plain = write_shard_page(shard, tmp_path / "plain.html").read_text()
    assert not any(label.endswith(" codes") for label in parts(plain))
    assert plain.count("<figcaption>") == 12


def test_documents_stand_next_to_their_raw_samples(
    raw_shards: Path, token_shards: Path, tok: UnifiedTokenizer, tmp_path: Path
) -> None:
    shard, raw = token_shards / "dialpad-000000.tar", raw_shards / "dialpad-000000.tar"
    html = write_shard_page(shard, tmp_path / "p.html", tok, raw=raw, samples=4).read_text()
    shown = parts(html)
    assert shown.count("from ids") == 8  # two items a document
    assert shown.count("raw .png") == 4
    assert "{txt} {png}" in html
    alone = write_shard_page(shard, tmp_path / "q.html", tok, samples=4).read_text()
    assert set(parts(alone)) == {"from ids"}


def test_the_page_loads_and_runs_nothing(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=https://x.y/z>"
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("0", {"txt": evil.encode(), "png": b"not a picture"})
    html = write_shard_page(tmp_path / "a.tar", tmp_path / "p.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "not a picture (PNG, JPEG, WEBP)" in html
    assert not re.search(r'src="(?!data:)', html)
    for data in re.findall(r'src="data:[^,]*;base64,([^"]*)"', html):
        base64.b64decode(data, validate=True)


def test_what_can_not_be_shown_is_said(
    token_shards: Path, other_tokenizer_bundle: Path, tmp_path: Path
) -> None:
    shard = token_shards / "dialpad-000000.tar"
    with pytest.raises(ValueError, match="needs the tokenizer that it was made with"):
        write_shard_page(shard, tmp_path / "p.html")
    other = UnifiedTokenizer.from_pretrained(other_tokenizer_bundle)
    with pytest.raises(ValueError, match=r"dialpad-000000\.tar"):
        write_shard_page(shard, tmp_path / "p.html", other)
    assert not (tmp_path / "p.html").exists()


def test_the_command_writes_the_page(
    raw_shards: Path, tokenizer_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard, page = raw_shards / "dialpad-000000.tar", tmp_path / "page.html"
    given = ["inspect", str(shard), "--html", str(page), "--tokenizer", str(tokenizer_bundle)]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("raw shard ")
    assert printed.splitlines()[-1] == str(page)
    assert ".png" in parts(page.read_text())
