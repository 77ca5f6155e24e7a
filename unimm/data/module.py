"""Lightning data modules over token shards and over raw shards.

Training loaders are endless: `max_steps` ends a run. What training has used is one integer, kept in
the checkpoint, so that a resumed run sees exactly the batches that are left. It is taken from the
trainer's count of processed batches, not from the loader, which Lightning lets run one batch ahead
(measured on 2.6.6: a state kept in a loader without a length skips a batch on resume).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from unimm.checkpoint import VOCABULARY_FILE, find_bundle
from unimm.data.batch import Batch
from unimm.data.copies import local_shards
from unimm.data.loader import DocumentConfig, Slice, TokenPass, TokenRows, TokenStream
from unimm.data.signals_data import SignalConfig, SignalDataset, SignalPass, SignalStream
from unimm.vocabulary import Vocabulary


class _Resumable(LightningDataModule):
    """A data module that counts what training has used.

    Args:
        batch_size: of each process.
        num_workers: loader processes; 0 loads in the training process.
        validates: whether there is anything to validate on.
    """

    def __init__(self, batch_size: int, num_workers: int, *, validates: bool) -> None:
        super().__init__()
        if not validates:
            # Lightning validates unless it finds the base class's own method here.
            self.val_dataloader = super().val_dataloader
        if batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"batch_size must be at least 1 and num_workers 0 or more, got {batch_size} and "
                f"{num_workers}"
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._start = 0  # used before the training loader was made
        self._processed: int | None = None  # batches that the trainer had counted then

    @property
    def unit(self) -> int:
        """What one batch of all processes adds to the count."""
        return 1

    @property
    def consumed(self) -> int:
        """What training has used, over all resumed runs."""
        if self._processed is None:
            return self._start
        return self._start + (self._count() - self._processed) * self.unit

    def setup(self, stage: str) -> None:
        """Begin at the beginning; a checkpoint is loaded after this."""
        if stage == "fit":
            self._start, self._processed = 0, None

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"consumed": self.consumed}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """From the checkpoint; the trainer restores its own count after this."""
        self._start, self._processed = int(state_dict["consumed"]), None

    def _begin(self) -> int:
        """What was used when a training loader is made."""
        self._start, self._processed = self.consumed, self._count()
        return self._start

    def _count(self) -> int:
        if self.trainer is None:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.state_dict()["processed"]

    @property
    def _replica(self) -> dict[str, int]:
        """Processes that compute a row together (tensor parallelism) share its data."""
        given = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return given or {"num_replicas": 1, "rank": 0}

    @property
    def _rank(self) -> int:
        return self._replica["rank"]

    @property
    def _world(self) -> int:
        return self._replica["num_replicas"]

    def _slice(self, start: int = 0) -> Slice:
        return Slice(self.batch_size, self._rank, self._world, start)

    def _loader(self, dataset: IterableDataset[Any]) -> DataLoader[Any]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        # batch_size=None: the datasets make whole batches.
        return DataLoader(dataset, batch_size=None, num_workers=self.num_workers, pin_memory=on_gpu)


class TokenDataModule(_Resumable):
    """Packed rows of token shards, as `unimm.data.batch.Batch`.

    Args:
        tokenizer: name or path of the tokenizer's bundle; only its vocabulary is read.
        shards: token shards to train on, as `unimm.data.copies.local_shards` understands them:
            files, or addresses that are copied once per machine; or several such sources, each with
            its share of the rows: `{web: 3.0, speech: 1.0}`.
        val_shards: token shards to validate on, each row once.
        row_length: T, ids of a row.
        batch_size: rows per process.
        seed: decides which documents share a row, and the order of each epoch.
        loss_weight: modality -> weight of predicting it; 1 for those that are not named.
        num_workers: loader processes; 0 loads in the training process.
        documents: weights by template, and what becomes of documents longer than a row.

    Raises:
        ValueError: shards are missing, uncommitted, or made with another vocabulary.
    """

    def __init__(
        self,
        tokenizer: str,
        shards: str | dict[str, float],
        val_shards: str | None = None,
        row_length: int = 1024,
        batch_size: int = 8,
        seed: int = 0,
        loss_weight: dict[str, float] | None = None,
        num_workers: int = 0,
        documents: DocumentConfig | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, validates=val_shards is not None)
        self.tokenizer = tokenizer
        self.shards = {shards: 1.0} if isinstance(shards, str) else dict(shards)
        if not self.shards or not all(weight > 0 for weight in self.shards.values()):
            raise ValueError(f"shards: every source needs a weight above 0, got {shards}")
        self.val_shards = val_shards
        self.row_length = row_length
        self.seed = seed
        self.loss_weight = loss_weight
        self.documents = documents
        self.sources: list[TokenRows] = []
        self.val_rows: TokenRows | None = None

    @property
    def unit(self) -> int:
        """Rows in one batch of all processes."""
        return self.batch_size * self._world

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's vocabulary."""
        return Vocabulary.load(find_bundle(self.tokenizer) / VOCABULARY_FILE)

    def prepare_data(self) -> None:
        """Find and pack all documents once per machine: the other processes read what was found."""
        if self.trainer is not None and self.trainer.world_size > 1:
            self._open_all(training=self.trainer.state.fn == "fit")

    def setup(self, stage: str) -> None:
        """Open and check all shards."""
        super().setup(stage)
        self._open_all(training=stage == "fit")

    def _open_all(self, *, training: bool) -> None:
        if training and not self.sources:
            _require(list(self.shards))
            self.sources = [self._open(source) for source in self.shards]
            for source, rows in zip(self.shards, self.sources, strict=True):
                rank_zero_info(f"{source}: {rows.statistics}")
        if self.val_shards is not None and self.val_rows is None:
            self.val_rows = self._open(self.val_shards)

    def _open(self, shards: str) -> TokenRows:
        run = None if self.trainer is None else self.trainer.default_root_dir
        return TokenRows(
            shards,
            self.vocabulary,
            self.row_length,
            seed=self.seed,
            loss_weight=self.loss_weight,
            documents=self.documents,
            folder=None if run is None else Path(run, "index"),
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches without end, from where training stands."""
        assert self.sources
        part = self._slice(self._begin())
        weights = list(self.shards.values())
        return self._loader(TokenStream(self.sources, part, self.seed, weights))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every validation row once."""
        assert self.val_rows is not None
        return self._loader(TokenPass(self.val_rows, self._slice()))


def _require(sources: list[str]) -> None:
    """Refuse missing shards, those of all sources in one message."""
    if len(sources) > 1:
        local_shards(sources)


class SignalDataModule(_Resumable):
    """Signals of raw shards, as `{"image": (B, C, H, W)}`, `{"video": (B, C, T, H, W)}` or
    `{"audio": (B, C, T)}`, float32 in [-1, 1]; a batch holds one kind.

    Args:
        shards: raw shards to train on, as `unimm.data.shards.expand` understands them.
        config: sizes, rates, and what is varied in training.
        val_shards: raw shards to validate on, each signal once and unvaried.
        batch_size: signals per process.
        seed: decides order and variation.
        num_workers: loader processes; 0 loads in the training process.

    Raises:
        ValueError: shards are missing, or hold no file of the modality.
    """

    def __init__(
        self,
        shards: str,
        config: SignalConfig,
        val_shards: str | None = None,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, validates=val_shards is not None)
        self.shards = shards
        self.config = config
        self.val_shards = val_shards
        self.seed = seed
        self.datasets: list[SignalDataset] = []
        self.val_datasets: list[SignalDataset] = []

    def setup(self, stage: str) -> None:
        """Open all shards."""
        super().setup(stage)
        if stage == "fit" and not self.datasets:
            self.datasets = self._open(self.shards, training=True)
        if self.val_shards is not None and not self.val_datasets:
            self.val_datasets = self._open(self.val_shards, training=False)

    def _open(self, shards: str, *, training: bool) -> list[SignalDataset]:
        return [
            SignalDataset(shards, self.config, kind, training=training, seed=self.seed)
            for kind in self.config.kinds
        ]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches without end, from where training stands."""
        part = self._slice(self._begin())
        return self._loader(SignalStream(self.datasets, part, self.config, self.seed))

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Every validation signal once."""
        return self._loader(SignalPass(self.val_datasets, self._slice(), self.config))
