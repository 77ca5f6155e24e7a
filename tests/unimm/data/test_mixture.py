"""Sources by turns: shares, sizes, resumption, symmetries."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unimm.data.loader import Slice
from unimm.data.mixture import Mixture, MixtureDataModule, SignalSource, symmetry
from unimm.data.signals_data import SignalConfig, SignalDataset

SMALL = SignalConfig(modality="image", size=8)
LARGE = SignalConfig(modality="image", size=16, crop="random")


def mixture(sources: list[SignalSource], part: Slice) -> Mixture:
    datasets = [SignalDataset(s.shards, s.config, "image", training=True) for s in sources]
    return Mixture(sources, datasets, part, seed=0)


@pytest.fixture
def sources(make: Any) -> list[SignalSource]:
    large = make.shard([{"png": make.png(n, 20, 18)} for n in range(5)], "large.tar")
    small = make.shard([{"png": make.png(n, 8, 8)} for n in range(7)], "small.tar")
    return [
        SignalSource(shards=str(large), config=LARGE, batch_size=2, turns=3, symmetric=True),
        SignalSource(shards=str(small), config=SMALL, batch_size=6, turns=1),
    ]


def test_each_has_its_turns_and_its_size(sources: list[SignalSource]) -> None:
    shapes = [tuple(b["image"].shape) for b in islice(mixture(sources, Slice(1)), 8)]
    assert shapes == [*[(2, 3, 16, 16)] * 3, (6, 3, 8, 8)] * 2


def test_a_resumed_run_sees_what_is_left(sources: list[SignalSource]) -> None:
    whole = list(islice(mixture(sources, Slice(1)), 12))
    for start in (0, 1, 3, 4, 7):
        rest = islice(mixture(sources, Slice(1, start=start)), 12 - start)
        for batch, expected in zip(rest, whole[start:], strict=True):
            assert torch.equal(batch["image"], expected["image"])


def test_ranks_share_each_batch_out(sources: list[SignalSource]) -> None:
    """Every picture of a source comes once in an epoch, over all ranks."""
    keys: Counter[bytes] = Counter()
    for rank in range(2):
        for batch in islice(mixture([sources[1]], Slice(1, rank, 2)), 7):
            keys.update(x.numpy().tobytes() for x in batch["image"])
    assert len(keys) == 7
    assert set(keys.values()) == {2 * 6 * 7 // 7}


def test_symmetries_of_the_square() -> None:
    x = torch.arange(9.0).view(1, 3, 3)
    seen = {tuple(symmetry(x, np.random.default_rng(n)).flatten().tolist()) for n in range(100)}
    assert len(seen) == 8
    wide = {tuple(symmetry(x[:, :2], np.random.default_rng(n)).shape) for n in range(30)}
    assert wide == {(1, 2, 3)}


def test_bad_sources_are_refused(make: Any) -> None:
    path = str(make.shard([{"png": make.png(0)}]))
    with pytest.raises(ValueError, match="turns and batch_size must be at least 1"):
        SignalSource(shards=path, config=SMALL, batch_size=0)
    both = SignalConfig(modality="image+video", size=8)
    with pytest.raises(ValueError, match="name one modality for each source"):
        SignalSource(shards=path, config=both, batch_size=1)
    with pytest.raises(ValueError, match="a mixture needs at least one source"):
        MixtureDataModule([])


def test_the_module_trains_on_turns_and_validates_plainly(
    sources: list[SignalSource], make: Any, tmp_path: Path
) -> None:
    val = make.shard([{"png": make.png(n, 16, 16)} for n in range(3)], "val.tar")
    module = MixtureDataModule(sources, str(val), SignalConfig(modality="image"), 2)
    module.setup("fit")
    shapes = [len(batch["image"]) for batch in islice(module.train_dataloader(), 5)]
    assert shapes == [2, 2, 2, 6, 2]
    seen = [tuple(batch["image"].shape) for batch in module.val_dataloader()]
    assert seen == [(2, 3, 16, 16), (1, 3, 16, 16)]
