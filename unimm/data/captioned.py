"""Pictures with their words, several sets of shards in every batch, for semantic codecs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from unimm.data.loader import EpochOrder, Slice, worker_turns
from unimm.data.module import SignalDataModule
from unimm.data.signals_data import SignalConfig, SignalDataset, SignalPass

MAX_BYTES = 64  # of a text that is compared with pictures; the rest is cut off


@dataclass(frozen=True, kw_only=True)
class CaptionedSource:
    """One set of shards.

    Args:
        shards: raw shards, as `unimm.data.shards.expand` understands them.
        config: sizes; the modality is "image", and all sources have one size.
        share: pictures of every batch that come from here.
        mirrored: show pictures left to right or right to left.
        words: compare the pictures with their `.txt`; without one, or with False, they have none.

    Raises:
        ValueError: no pictures of a batch, or no picture at all.
    """

    shards: str
    config: SignalConfig
    share: int
    mirrored: bool = False
    words: bool = True

    def __post_init__(self) -> None:
        if self.share < 1:
            raise ValueError(f"{self.shards}: share must be at least 1, got {self.share}")
        if self.config.modality != "image" or self.config.size is None:
            raise ValueError(f"{self.shards}: semantic codecs take images, of a size to be named")


class CaptionedStream(IterableDataset[dict[str, Tensor]]):
    """Batches without end: {"semantic": (B, C, H, W), "text": uint8 (B, 64), UTF-8 padded with 0}.

    Args:
        sources: what every batch is put together from.
        datasets: the pictures of each.
        part: what this rank makes; its `start` counts global batches.
        seed: decides orders and mirroring.
    """

    def __init__(
        self,
        sources: Sequence[CaptionedSource],
        datasets: Sequence[SignalDataset],
        part: Slice,
        seed: int,
    ) -> None:
        self.sources, self.datasets = list(sources), list(datasets)
        self.part, self.seed = part, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        orders = [EpochOrder(len(dataset), self.seed) for dataset in self.datasets]
        for turn in worker_turns():
            batch = (self.part.start + turn) * self.part.world + self.part.rank
            pictures: list[Tensor] = []
            texts: list[Tensor] = []
            for source, dataset, order in zip(self.sources, self.datasets, orders, strict=True):
                for place in range(batch * source.share, (batch + 1) * source.share):
                    epoch, index = order(place)
                    index, picture = dataset.intact(index, epoch)
                    random = np.random.default_rng([self.seed, epoch, index])
                    if source.mirrored and random.random() < 0.5:
                        picture = picture.flip(-1)
                    pictures.append(picture)
                    texts.append(text_bytes(dataset.text(index) if source.words else ""))
            yield {"semantic": torch.stack(pictures), "text": torch.stack(texts)}


def text_bytes(text: str) -> Tensor:
    """uint8 (64,): the text's UTF-8, stripped and lower-case, padded with 0."""
    data = text.strip().lower().encode()[:MAX_BYTES]
    return torch.tensor([*data, *(0,) * (MAX_BYTES - len(data))], dtype=torch.uint8)


class _SemanticPass(IterableDataset[dict[str, Tensor]]):
    """A `SignalPass` of pictures, for a semantic codec."""

    def __init__(self, passed: SignalPass) -> None:
        self.passed = passed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.passed:
            yield {"semantic": batch["image"]}


class CaptionedDataModule(SignalDataModule):
    """Pictures of several sets of shards, each with a share of every batch.

    Args:
        sources: what every batch is put together from.
        val_shards: raw shards to validate on, each picture once.
        val_config: how those are shown; as the first source's when None.
        batch_size: pictures in a validation batch.
        seed: decides order and variation.
        num_workers: loader processes; 0 loads in the training process.

    Raises:
        ValueError: no source, sources of several sizes, or shards that are missing or hold none.
    """

    def __init__(
        self,
        sources: list[CaptionedSource],
        val_shards: str | None = None,
        val_config: SignalConfig | None = None,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        forms = {(source.config.size, source.config.num_channels) for source in sources}
        if len(forms) != 1:
            raise ValueError(
                f"semantic sources must exist and be of one size and colours, got {sorted(forms)}"
            )
        shown = val_config or sources[0].config
        super().__init__(sources[0].shards, shown, val_shards, batch_size, seed, num_workers)
        self.sources = sources

    def setup(self, stage: str) -> None:
        """Open all shards."""
        if stage == "fit" and not self.datasets:
            self.datasets = [
                SignalDataset(source.shards, source.config, "image", training=True, seed=self.seed)
                for source in self.sources
            ]
        super().setup(stage)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches without end, from where training stands."""
        part = self._slice(self._begin())
        return self._loader(CaptionedStream(self.sources, self.datasets, part, self.seed))

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Every validation picture once."""
        passed = SignalPass(self.val_datasets, self._slice(), self.config)
        return self._loader(_SemanticPass(passed))
