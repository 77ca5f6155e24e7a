"""Batches from several sets of raw shards by turns, for codecs of more than one kind of material.

Of every `sum of turns` batches each source makes as many as its turns say, all of its own size:
photographs as windows of 128 pixels, thumbnails whole. Order, windows and symmetries are decided by
(seed, epoch, number), so that a run that is resumed sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from unimm.data.loader import EpochOrder, Slice, worker_turns
from unimm.data.module import SignalDataModule
from unimm.data.signals_data import SignalConfig, SignalDataset


@dataclass(frozen=True, kw_only=True)
class SignalSource:
    """One set of shards.

    Args:
        shards: raw shards, as `unimm.data.shards.expand` understands them.
        config: sizes and rates; one modality, and sizes that make every signal one shape.
        batch_size: signals in a batch of each process.
        turns: how many batches of each round it makes.
        symmetric: show each picture or film in one of the eight symmetries of the square.

    Raises:
        ValueError: no turns, an empty batch, or two modalities.
    """

    shards: str
    config: SignalConfig
    batch_size: int
    turns: int = 1
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.turns < 1 or self.batch_size < 1:
            raise ValueError(f"{self.shards}: turns and batch_size must be at least 1")
        if len(self.config.kinds) > 1:
            raise ValueError(f"{self.shards}: name one modality for each source")


class Mixture(IterableDataset[dict[str, Tensor]]):
    """Batches without end: `{"image": (B, C, H, W)}` and so on, one source at a time.

    Args:
        sources: what takes turns.
        datasets: the signals of each source.
        part: what this rank makes of them; its `start` counts global batches.
        seed: decides the orders and symmetries.
    """

    def __init__(
        self,
        sources: Sequence[SignalSource],
        datasets: Sequence[SignalDataset],
        part: Slice,
        seed: int,
    ) -> None:
        self.sources = list(sources)
        self.datasets = list(datasets)
        self.part = part
        self.seed = seed
        self._orders = [EpochOrder(len(dataset), seed) for dataset in self.datasets]
        self._ends = list(accumulate(source.turns for source in self.sources))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for turn in worker_turns():
            which, before = self._turn(self.part.start + turn)
            size = self.sources[which].batch_size
            first = (before * self.part.world + self.part.rank) * size
            signals = [self._signal(which, first + place) for place in range(size)]
            yield {self.datasets[which].kind: torch.stack(signals)}

    def _turn(self, batch: int) -> tuple[int, int]:
        """Which source makes a global batch, and how many of its batches came before."""
        rounds, place = divmod(batch, self._ends[-1])
        which = next(i for i, end in enumerate(self._ends) if place < end)
        turns = self.sources[which].turns
        return which, rounds * turns + place - (self._ends[which] - turns)

    def _signal(self, which: int, position: int) -> Tensor:
        """The signal at a position of a source's order; the one after it where it is damaged."""
        dataset = self.datasets[which]
        epoch, index = self._orders[which](position)
        _, signal = dataset.intact(index, epoch)
        random = np.random.default_rng([self.seed, epoch, index, which])
        return symmetry(signal, random) if self.sources[which].symmetric else signal


def symmetry(signal: Tensor, random: np.random.Generator) -> Tensor:
    """One of the eight symmetries of a square picture or film, or of the four of another."""
    upright, across, turned = (bool(bit) for bit in random.integers(0, 2, 3))
    axes = [axis for axis, flip in ((-2, upright), (-1, across)) if flip]
    signal = signal.flip(axes) if axes else signal
    square = signal.shape[-2] == signal.shape[-1]
    return signal.transpose(-2, -1) if turned and square else signal


class MixtureDataModule(SignalDataModule):
    """Several sources by turns to train on; one set of shards to validate on.

    Args:
        sources: what takes turns.
        val_shards: raw shards to validate on, each signal once and unvaried.
        val_config: how those are shown; the first source's when None.
        val_batch_size: signals in a validation batch.
        seed: decides order and variation.
        num_workers: loader processes; 0 loads in the training process.

    Raises:
        ValueError: shards are missing, or hold no file of the modality; no source is given.
    """

    def __init__(
        self,
        sources: list[SignalSource],
        val_shards: str | None = None,
        val_config: SignalConfig | None = None,
        val_batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        if not sources:
            raise ValueError("a mixture needs at least one source")
        shown = val_config or sources[0].config
        super().__init__(
            sources[0].shards, shown, val_shards, val_batch_size, seed, num_workers=num_workers
        )
        self.sources = sources

    def setup(self, stage: str) -> None:
        """Open all shards."""
        if stage == "fit" and not self.datasets:
            self.datasets = [
                SignalDataset(
                    source.shards,
                    source.config,
                    source.config.kinds[0],
                    training=True,
                    seed=self.seed,
                )
                for source in self.sources
            ]
        super().setup(stage)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches without end, from where training stands."""
        part = self._slice(self._begin())
        return self._loader(Mixture(self.sources, self.datasets, part, self.seed))
