from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from unimm.data.batch import Batch, LossWeights
from unimm.data.loader import EpochOrder, Slice, TokenPass, TokenRows, TokenStream
from unimm.data.manifest import Manifest
from unimm.data.shards import ShardReader, ShardWriter
from unimm.data.templates import Template
from unimm.data.tokenize import TokenizeConfig, ids_dtype
from unimm.data.tokenize_many import tokenize_shards
from unimm.tokenizer import UnifiedTokenizer
from unimm.vocabulary import MODALITIES, Vocabulary

TEMPLATES = [
    Template(["{txt}", "{png}"], drop_condition=0.3),
    Template(["{wav}", "{txt}"]),
    Template(["<user>", "{png}", "<assistant>", "{txt}"]),
]


@pytest.fixture
def tokens(make: Any, tokenizer: UnifiedTokenizer, tmp_path: Path) -> Path:
    """Two token shards, 60 documents."""
    config = TokenizeConfig(documents_per_sample=3)
    tokenize_shards(make.raw(2, 10), tmp_path / "out", tokenizer, TEMPLATES, config, progress=False)
    return tmp_path / "out"


@pytest.fixture
def rows(tokens: Path, tokenizer: UnifiedTokenizer) -> TokenRows:
    return TokenRows(tokens, tokenizer.vocabulary, 96)


def documents_of(batch: Batch) -> list[torch.Tensor]:
    """The documents of a batch, row by row."""
    found = []
    for ids, segments in zip(batch.ids, batch.segment_ids, strict=True):
        found += [ids[segments == number] for number in range(1, int(segments.max()) + 1)]
    return found


# Batches


def test_batches_hold_what_the_grammar_says(rows: TokenRows, tokenizer: UnifiedTokenizer) -> None:
    batch = rows.batch(range(len(rows)))
    count = len(rows)
    assert [(tuple(x.shape), x.dtype) for x in batch] == [
        ((count, 96), torch.int64),
        ((3, count, 96), torch.int64),
        ((count, 96), torch.int64),
        ((count, 96), torch.float32),
        ((count, 96), torch.int64),
    ]
    for row in range(count):
        segments = batch.segment_ids[row]
        for number in range(1, int(segments.max()) + 1):
            here = segments == number
            ids = batch.ids[row, here]
            layout = tokenizer.grammar.layout(ids)
            assert torch.equal(batch.positions[:, row, here], layout.positions)
            assert torch.equal(batch.modality[row, here], layout.modality)
            weight = torch.ones(len(ids))
            weight[0] = 0  # <bos>
            assert torch.equal(batch.loss_weight[row, here], weight)
        empty = segments == 0
        assert (batch.ids[row, empty] == tokenizer.vocabulary.marker("<pad>")).all()
        assert not batch.loss_weight[row, empty].any()
        assert not batch.modality[row, empty].any()


def test_documents_of_a_row_follow_each_other(rows: TokenRows) -> None:
    batch = rows.batch(range(len(rows)))
    steps = batch.segment_ids.diff(dim=1)
    ends = batch.segment_ids[:, 1:] == 0
    assert ((steps == 0) | (steps == 1) | ends).all()
    assert (batch.segment_ids[:, 0] == 1).all()


def test_every_document_comes_once(rows: TokenRows, tokens: Path) -> None:
    found = documents_of(rows.batch(range(len(rows))))
    stored = [rows.document(number).ids for number in range(60)]
    assert sorted(d.tolist() for d in found) == sorted(d.tolist() for d in stored)
    statistics = rows.statistics
    assert (statistics.documents, statistics.rejected) == (60, 0)
    assert statistics.tokens == sum(len(d) for d in stored)
    total = sum(sum(Manifest.read(path).tokens.values()) for path in tokens.glob("*.tar"))
    assert statistics.tokens == total


def test_loss_weights_are_by_modality(tokens: Path, tokenizer: UnifiedTokenizer) -> None:
    weights = {"text": 6.0, "audio": 0.0}
    rows = TokenRows(tokens, tokenizer.vocabulary, 96, loss_weight=weights)
    batch = rows.batch(range(len(rows)))
    first = batch.ids == tokenizer.vocabulary.marker("<bos>")
    for name, weight in {"text": 6.0, "image": 1.0, "audio": 0.0}.items():
        here = (batch.modality == MODALITIES.index(name)) & (batch.segment_ids > 0) & ~first
        assert here.any()
        assert (batch.loss_weight[here] == weight).all()


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"txet": 1.0}, "unknown modality 'txet' .did you mean 'text'"),
        ({"image": 1.0}, "unknown modality 'image'"),
        ({"text": -1.0}, "must be 0 or more"),
        ({"text": 0.0}, "all weights are 0"),
    ],
)
def test_weights_that_make_no_sense(weights: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LossWeights(Vocabulary(300), weights)


def test_long_documents_are_rejected_and_counted(tokens: Path, tokenizer: Any) -> None:
    rows = TokenRows(tokens, tokenizer.vocabulary, 30)
    statistics = rows.statistics
    assert statistics.rejected > 0
    assert statistics.documents + statistics.rejected == 60
    assert "documents too long" in str(statistics)
    with pytest.raises(ValueError, match="none of 60 documents fits into a row of 4 ids"):
        TokenRows(tokens, tokenizer.vocabulary, 4)


# Order


def global_rows(rows: TokenRows, world: int, workers: int, batches: int, start: int = 0) -> list:
    """The ids of global batches of 4 rows, as all ranks and workers together make them."""
    size = 4 // world
    made = []
    for rank in range(world):
        stream = TokenStream(rows, Slice(size, rank, world, start), seed=3)
        made.append(list(islice(DataLoader(stream, None, num_workers=workers), batches)))
    return [torch.cat([made[r][b].ids for r in range(world)]).tolist() for b in range(batches)]


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 2), (2, 2)])
def test_order_depends_on_neither_ranks_nor_workers(
    rows: TokenRows, world: int, workers: int
) -> None:
    assert global_rows(rows, world, workers, 6) == global_rows(rows, 1, 0, 6)


@pytest.mark.parametrize("start", [4, 12, 400])
def test_a_stream_goes_on_where_it_was(rows: TokenRows, start: int) -> None:
    whole = global_rows(rows, 1, 0, start // 4 + 3)
    assert global_rows(rows, 2, 0, 3, start) == whole[start // 4 :]


def test_every_row_comes_once_per_epoch_in_a_new_order(rows: TokenRows) -> None:
    order, size = EpochOrder(len(rows), seed=1), len(rows)
    epochs = [[order(e * size + place) for place in range(size)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert [e for e, _ in epoch] == [number] * size
        assert sorted(row for _, row in epoch) == list(range(size))
    assert epochs[0] != epochs[1]
    assert EpochOrder(size, seed=2)(0) != epochs[0][0] or EpochOrder(size, 2)(1) != epochs[0][1]
    assert order(10**12)[0] == 10**12 // size


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (3, 0)])
def test_validation_reads_every_row_once(rows: TokenRows, world: int, workers: int) -> None:
    found = []
    for rank in range(world):
        part = TokenPass(rows, Slice(4, rank, world))
        for batch in DataLoader(part, None, num_workers=workers):
            assert 1 <= len(batch.ids) <= 4
            found += batch.ids.tolist()
    assert sorted(found) == sorted(rows.batch(range(len(rows))).ids.tolist())


def test_the_seed_decides_which_documents_share_a_row(tokens: Path, tokenizer: Any) -> None:
    packings = [TokenRows(tokens, tokenizer.vocabulary, 96, seed=s).packing for s in (0, 0, 1)]
    assert packings[0].documents.tolist() == packings[1].documents.tolist()
    assert packings[0].documents.tolist() != packings[2].documents.tolist()


# Damage


def test_another_vocabulary_is_refused(tokens: Path) -> None:
    with pytest.raises(ValueError, match="was made with vocabulary"):
        TokenRows(tokens, Vocabulary(300), 96)


def rewritten(shard: Path, change: Any) -> None:
    """Change the files of document 3 and commit the shard again."""
    samples = [(s.key, {e: s[e] for e in s.members}) for s in ShardReader(shard)]
    change(samples[3][1])
    with ShardWriter(shard) as writer:
        for key, files in samples:
            writer.write(key, files)
    old = Manifest.read(shard)
    Manifest(
        shard=old.shard,
        samples=old.samples,
        bytes=writer.bytes,
        sha256=writer.sha256,
        kind="tokens",
        recipe=old.recipe,
    ).write(shard.parent)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda f: f.update(
                {"ids.npy": f["ids.npy"][:128] + b"\xff" * (len(f["ids.npy"]) - 128)}
            ),
            r"id 65535 lies outside the vocabulary",
        ),
        (lambda f: f.update({"ids.npy": f["ids.npy"][:-2]}), r"ids\.npy is damaged"),
        (lambda f: f.update({"meta.json": b"{}"}), r"meta\.json is damaged"),
        (
            lambda f: f.update({"meta.json": b'{"items": [["text", 1]]}'}),
            "items are not the stated ones",
        ),
    ],
)
def test_damaged_documents_are_named(
    tokens: Path, tokenizer: UnifiedTokenizer, change: Any, reason: str
) -> None:
    shard = tokens / "raw-001.tar"
    rewritten(shard, change)
    key = ShardReader(shard).samples[3].key
    rows = TokenRows(tokens, tokenizer.vocabulary, 96)
    with pytest.raises(ValueError, match=rf"raw-001\.tar: sample {key}: .*({reason}).*; make"):
        rows.batch(range(len(rows)))


def test_a_document_without_its_files_is_named(tokens: Path, tokenizer: Any) -> None:
    rewritten(tokens / "raw-001.tar", lambda files: files.pop("meta.json"))
    with pytest.raises(ValueError, match=r"raw-001\.tar: sample .*: has only \.ids\.npy"):
        TokenRows(tokens, tokenizer.vocabulary, 96)


def test_changed_bytes_are_found_when_asked_for(tokens: Path, tokenizer: Any) -> None:
    shard = tokens / "raw-000.tar"
    data = bytearray(shard.read_bytes())
    data[512 + 130] ^= 1
    shard.write_bytes(data)
    TokenRows(tokens, tokenizer.vocabulary, 96)
    with pytest.raises(ValueError, match="its bytes differ from its manifest"):
        TokenRows(tokens, tokenizer.vocabulary, 96, verify=True)


def test_vocabularies_of_more_ids_are_stored_wider() -> None:
    assert ids_dtype(Vocabulary(300)) == "<u2"
    assert ids_dtype(Vocabulary(2**16 - 32 - 256 - 1)) == "<u2"
    assert ids_dtype(Vocabulary(2**16)) == "<u4"
    assert np.dtype(ids_dtype(Vocabulary(2**16))).itemsize == 4
