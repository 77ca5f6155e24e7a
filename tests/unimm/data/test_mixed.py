"""Several sources, weights by template, windows of long documents, and what is kept of an index."""

import itertools
import os
import shutil
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from unimm.data import index
from unimm.data.loader import DocumentConfig, MixedOrder, Slice, TokenRows, TokenStream
from unimm.data.module import TokenDataModule
from unimm.data.templates import Template
from unimm.data.tokenize import TokenizeConfig
from unimm.data.tokenize_many import tokenize_shards
from unimm.data.windows import windows
from unimm.tokenizer import UnifiedTokenizer


@pytest.fixture
def tokens(make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path) -> Path:
    """Two sources: words with pictures in `a`, sounds with words in `b`."""
    raw = make.raw(2, 10)
    for name, parts in {"a": ["{txt}", "{png}"], "b": ["{wav}", "{txt}"]}.items():
        tokenize_shards(
            raw, tmp_path / name, tokenizer, [Template(parts)], TokenizeConfig(), progress=False
        )
    return tmp_path


# Mixtures


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 10)), min_size=1, max_size=5))
def test_rows_of_each_source_come_once_per_epoch_and_by_weight(
    sources: list[tuple[int, float]],
) -> None:
    sizes, weights = [list(column) for column in zip(*sources, strict=True)]
    order = MixedOrder(sizes, weights, seed=1)  # type: ignore[arg-type]
    drawn = [order(position) for position in range(4 * MixedOrder.PERIOD)]
    for source, size in enumerate(sizes):
        rows = [row for number, row in drawn if number == source]
        for epoch in range(len(rows) // int(size)):
            part = rows[epoch * int(size) : (epoch + 1) * int(size)]
            assert sorted(part) == list(range(int(size)))
        share = weights[source] / sum(weights)
        assert len(rows) / len(drawn) == pytest.approx(share, abs=2 / MixedOrder.PERIOD)


def test_sources_are_spread_evenly() -> None:
    order = MixedOrder([100, 100], [3.0, 1.0], seed=0)
    drawn = [order(position)[0] for position in range(4000)]
    places = [place for place, source in enumerate(drawn) if source == 1]
    gaps = {two - one for one, two in itertools.pairwise(places)}
    assert gaps <= {3, 4, 5}


def test_a_single_source_keeps_its_order() -> None:
    one, alone = MixedOrder([37], [2.0], seed=5), MixedOrder([37], [1.0], seed=5)
    assert [one(p) for p in range(100)] == [alone(p) for p in range(100)]


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (1, 2), (4, 0)])
def test_a_mixture_depends_on_neither_ranks_nor_workers(
    tokens: Path, tokenizer: UnifiedTokenizer, world: int, workers: int
) -> None:
    sources = [TokenRows(tokens / name, tokenizer.vocabulary, 96) for name in "ab"]

    def rows(world: int, workers: int, start: int = 0) -> list[list[int]]:
        made = []
        for rank in range(world):
            part = Slice(4 // world, rank, world, start)
            stream = TokenStream(sources, part, seed=3, weights=[1.0, 2.0])
            made.append(list(islice(DataLoader(stream, None, num_workers=workers), 6)))
        return [row for b in range(6) for r in range(world) for row in made[r][b].ids.tolist()]

    whole = rows(1, 0)
    assert rows(world, workers) == whole
    assert rows(world, workers, start=8)[:16] == whole[8:]


def test_a_module_mixes_by_weight(tokens: Path, bundle: Path) -> None:
    shards = {str(tokens / "a"): 1.0, str(tokens / "b"): 3.0}
    data = TokenDataModule(str(bundle), shards, row_length=96, batch_size=8)
    data.setup("fit")
    kinds: Counter[int] = Counter()
    for batch in islice(data.train_dataloader(), 8):
        kinds.update(int(row.max()) for row in batch.modality)
    assert kinds == {1: 16, 3: 48}
    with pytest.raises(ValueError, match="every source needs a weight above 0"):
        TokenDataModule(str(bundle), {str(tokens / "a"): 0.0})


def test_missing_shards_of_all_sources_are_listed_at_once(tokens: Path, bundle: Path) -> None:
    shards = {f"{tokens}/no-{{0..1}}.tar": 1.0, str(tokens / "a"): 1.0, f"{tokens}/nor.tar": 1.0}
    data = TokenDataModule(str(bundle), shards)
    with pytest.raises(ValueError, match=r"3 missing shards: .*no-0\.tar, .*no-1\.tar, .*nor\.tar"):
        data.setup("fit")


# Weights by template


def test_weights_by_template_scale_whole_documents(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path
) -> None:
    templates = [Template(["{txt}", "{png}"]), Template(["{png}", "{txt}"])]
    every = TokenizeConfig(documents_per_sample=None)
    tokenize_shards(make.raw(1, 6), tmp_path / "c", tokenizer, templates, every, progress=False)
    config = DocumentConfig(template_weight={templates[0].label: 3.0})
    plain = TokenRows(tmp_path / "c", tokenizer.vocabulary, 96)
    weighted = TokenRows(tmp_path / "c", tokenizer.vocabulary, 96, documents=config)
    one, two = (rows.batch(range(len(rows))) for rows in (plain, weighted))
    assert torch.equal(one.ids, two.ids)
    ratio = (two.loss_weight / one.loss_weight)[one.loss_weight > 0]
    assert set(ratio.tolist()) == {1.0, 3.0}
    assert (two.loss_weight == 0).equal(one.loss_weight == 0)


def test_a_template_that_no_document_has_is_named(
    tokens: Path, tokenizer: UnifiedTokenizer
) -> None:
    config = DocumentConfig(template_weight={"{txt} {pn}": 3.0})
    with pytest.raises(ValueError, match=r"no document of template '\{txt\} \{pn\}' was found"):
        TokenRows(tokens / "a", tokenizer.vocabulary, 96, documents=config)
    with pytest.raises(ValueError, match=r"template_weight\.x: must be 0 or more"):
        DocumentConfig(template_weight={"x": -1.0})


# Windows


@settings(max_examples=50)
@given(st.integers(1, 300), st.integers(8, 60), st.integers(1, 4), st.integers(0, 30))
def test_windows_are_whole_frames_that_fit(
    frames: int, row_length: int, levels: int, text: int
) -> None:
    length = text + 4 + frames * levels
    structure = (("text", text), ("audio", frames))
    found = windows(structure, length, row_length, {"audio": levels})
    if row_length - text - 4 < levels:
        assert found == []
        return
    assert [window.item for window in found] == [1] * len(found)
    assert [w.start for w in found] == [0, *(w.stop for w in found[:-1])]
    assert found[-1].stop == frames
    sizes = [window.stop - window.start for window in found]
    assert max(sizes) - min(sizes) <= 1
    assert all(text + 4 + size * levels <= row_length for size in sizes)


def test_pictures_and_text_are_never_cut() -> None:
    assert windows((("text", 900), ("image", 40, 40)), 2600, 96, {"image": 1}) == []


@pytest.mark.parametrize("part", ["{wav}", "{gif}"])
def test_long_sounds_and_films_are_windowed(
    make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path, part: str
) -> None:
    files = {"txt": b"seven", "wav": make.wav(1, length=8000), "gif": make.gif(1, frames=33)}
    make.shard([files] * 3, "long/one.tar")
    tokenize_shards(
        tmp_path / "long",
        tmp_path / "out",
        tokenizer,
        [Template(["{txt}", part])],
        TokenizeConfig(),
        progress=False,
    )
    whole = TokenRows(tmp_path / "out", tokenizer.vocabulary, 400)
    with pytest.raises(ValueError, match="none of 3 documents fits into a row of 48 ids"):
        TokenRows(tmp_path / "out", tokenizer.vocabulary, 48)
    config = DocumentConfig(too_long="window")
    rows = TokenRows(tmp_path / "out", tokenizer.vocabulary, 48, documents=config)
    assert rows.statistics.rejected == 0
    assert len(rows.entries) > 3
    full = tokenizer.grammar.parse(torch.from_numpy(whole.document(0).ids.astype(np.int64)))
    parts = [rows.document(n) for n in range(len(rows.entries)) if rows.entries[n, 0] == 0]
    read = [tokenizer.grammar.parse(torch.from_numpy(p.ids.astype(np.int64))) for p in parts]
    for segments, number in zip(read, range(len(parts)), strict=True):
        assert torch.equal(segments[0].codes, full[0].codes)
        assert len(parts[number].ids) == rows.lengths[number] <= 48
    codes = torch.cat([segments[1].codes for segments in read], dim=1)
    assert torch.equal(codes, full[1].codes)


# What is kept of an index


def test_an_index_is_found_once_and_kept(
    tokens: Path, tokenizer: UnifiedTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "index"
    first = TokenRows(tokens / "a", tokenizer.vocabulary, 96, folder=folder)
    assert len(list(folder.iterdir())) == 3

    def never(*_: Any) -> Any:
        raise AssertionError("walked again")

    with monkeypatch.context() as patched:
        patched.setattr(index, "_walk", never)
        again = TokenRows(tokens / "a", tokenizer.vocabulary, 96, folder=folder)
        assert torch.equal(again.batch([0, 1]).ids, first.batch([0, 1]).ids)
        other = TokenRows(tokens / "a", tokenizer.vocabulary, 96, seed=1, folder=folder)
        assert other.packing.documents.tolist() != first.packing.documents.tolist()
        shard = next((tokens / "a").glob("*.tar"))
        shutil.copy(shard, shard.with_suffix(".copy"))
        os.replace(shard.with_suffix(".copy"), shard)  # the same bytes in another file
        with pytest.raises(AssertionError, match="walked again"):
            TokenRows(tokens / "a", tokenizer.vocabulary, 96, folder=folder)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut"])
def test_a_damaged_index_is_made_again(
    tokens: Path, tokenizer: UnifiedTokenizer, tmp_path: Path, damage: bytes
) -> None:
    folder = tmp_path / "index"
    first = TokenRows(tokens / "a", tokenizer.vocabulary, 96, folder=folder)
    for path in folder.iterdir():
        path.write_bytes(damage)
    again = TokenRows(tokens / "a", tokenizer.vocabulary, 96, folder=folder)
    assert torch.equal(again.batch([0]).ids, first.batch([0]).ids)


def test_seeking_among_a_million_rows_is_a_moment() -> None:
    """From any position of any epoch; measured 0.03 s."""
    order = MixedOrder([1_000_000, 300_000], [2.0, 1.0], seed=0)
    for position in (0, 999_999, 10**9 + 7):
        begun = time.perf_counter()
        order(position)
        assert time.perf_counter() - begun < 1
