"""Pretraining of the decoder: next-token prediction over everything."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from unimm.data.batch import Batch
from unimm.model import ModelConfig, UnifiedLM, preset, size_of
from unimm.model.experts import SparseFeedForward
from unimm.tokenizer import UnifiedTokenizer
from unimm.training.losses import head_loss, hits
from unimm.training.noise import CodeNoise
from unimm.training.optim import OptimizerConfig, build_optimizers
from unimm.training.scale import ScaleConfig, prepare, shard
from unimm.training.tally import Tally, units_of_ids
from unimm.training.task import Task
from unimm.vocabulary import MODALITIES
from unimm_kernels import LinearCrossEntropy


class LanguageTask(Task):
    """Trains a decoder on packed batches.

    Args:
        tokenizer: bundle that the token shards were made with.
        model: shape of the decoder, or a preset's name ("1M" to "8B"); its vocabulary size comes
            from the tokenizer.
        optimizer: how parameters move.
        z_loss: factor of the squared log-normaliser (Chameleon: 1e-5).
        compile_blocks: compile each block; the first step then takes about a minute on a CPU.
        scale: recomputation, micro-batches, and how the model is cut for many devices.
        code_noise: mean share of the codes read that are replaced, see `CodeNoise`.
        average: decay of a moving average of the weights, which is then exported; None: none.
    """

    def __init__(
        self,
        tokenizer: str,
        model: ModelConfig | str,
        optimizer: OptimizerConfig | None = None,
        z_loss: float = 1e-5,
        compile_blocks: bool = False,
        scale: ScaleConfig | None = None,
        code_noise: float = 0.0,
        average: float | None = None,
    ) -> None:
        super().__init__(optimizer or OptimizerConfig(), average)
        self.tokenizer = UnifiedTokenizer.from_pretrained(tokenizer)
        shape = preset(model) if isinstance(model, str) else model
        config = dataclasses.replace(shape, vocab_size=self.tokenizer.vocabulary.padded_size)
        self.scale = scale or ScaleConfig()
        self.lm = self.made(config, tokenizer)
        self.z_loss = z_loss
        self.noise = CodeNoise(self.tokenizer.vocabulary, code_noise)
        self.compile_blocks = compile_blocks
        self._laid_out = False
        self._units = units_of_ids(self.tokenizer)
        self._validated: Tally | None = None

    def made(self, config: ModelConfig, bundle: str) -> UnifiedLM:
        """The model of a config, untrained; tasks that go on from `bundle` read its weights."""
        with torch.device("meta" if self.scale.deferred else "cpu"):
            return UnifiedLM(config)

    def bundle_entry(self) -> dict[str, Any]:
        """See `Task.bundle_entry`."""
        return {
            "kind": "lm",
            "config": dataclasses.asdict(self.lm.config),
            "vocabulary": self.tokenizer.vocabulary.fingerprint,
        }

    def exported(self) -> nn.Module:
        """See `Task.exported`."""
        return self.lm

    def check_strategy(self, trainer: lightning.Trainer) -> None:
        """See `Task.check_strategy`."""
        if self.scale.deferred and not isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "model.scale.deferred: this strategy keeps the whole model on every process: name "
                "unimm.training.ShardedStrategy as trainer.strategy, or set it to false"
            )

    def configure_model(self) -> None:
        """Cut, recompute and compile; done once, however often Lightning asks."""
        if not self._laid_out:
            self._laid_out = True
            if self.device_mesh is not None:
                half = str(self.trainer.precision).startswith("bf16")
                shard(
                    self.lm, self.device_mesh, self.scale, half=half, compiled=self.compile_blocks
                )
            else:
                self.check_strategy(self.trainer)
                prepare(self.lm, self.scale, compiled=self.compile_blocks)
        super().configure_model()

    def on_fit_start(self) -> None:
        """Print the model's size, and what moves how."""
        rank_zero_info(f"decoder: {size_of(self.lm.config)}")
        super().on_fit_start()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another vocabulary or another model."""
        vocabulary = checkpoint["unimm"]["entry"]["vocabulary"]
        self.tokenizer.vocabulary.require(vocabulary, str(self.trainer.ckpt_path))
        super().on_load_checkpoint(checkpoint)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW, and Muon where the config says so."""
        optimizers = build_optimizers(self.lm, self.optimizer_config)
        self._optimizers_count = len(optimizers)
        return optimizers

    def forward(self, batch: Batch) -> LinearCrossEntropy:
        """Loss of predicting each id of (B, T) from those before it; padding weighs nothing."""
        return self._loss(batch, self._hidden(batch))

    def _hidden(self, batch: Batch) -> Tensor:
        """Hidden states (B * (T - 1), d_model) of all ids but the last."""
        read = self.noise(batch.ids[:, :-1])
        hidden = self.lm.hidden(read, batch.positions[:, :, :-1], batch.segment_ids[:, :-1])
        return hidden.flatten(0, 1)

    def _loss(self, batch: Batch, hidden: Tensor) -> LinearCrossEntropy:
        weight = batch.loss_weight[:, 1:].flatten()
        return head_loss(self.lm, hidden, batch.ids[:, 1:].flatten(), weight, self.z_loss)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step; its loss is the weighted mean over the batches of all processes."""
        parts = _split(batch, self.scale.micro_batches)
        shares = self._shares(parts)
        self.begin_step(0, self._optimizers_count)
        losses, nlls = [], []
        for part, share in zip(parts, shares, strict=True):
            last = part is parts[-1]
            if last:
                losses.append(self._backward(part, share, nlls))
            else:
                with self.gradients_kept():
                    losses.append(self._backward(part, share, nlls))
        loss = torch.stack(losses).sum()
        if self._world > 1:
            dist.all_reduce(loss)
            loss = loss / self._world
        norm = self.finish_step(self.lm.parameters(), 0, self._optimizers_count)
        self.log_dict({"train/loss": loss, "train/gradient_norm": norm}, prog_bar=True)
        # Asked of Lightning: reading figures makes the device wait, so only where they are kept.
        if self.trainer._logger_connector.should_update_logs:
            tally = Tally.of(batch, torch.cat(nlls), self._units)
            self._log_figures("train", self._summed(tally), judged=False)
            self._log_routing(batch)

    def _backward(self, part: Batch, share: Tensor, nlls: list[Tensor]) -> Tensor:
        result = self.forward(part)
        loss = result.loss * share
        self.manual_backward(loss)
        nlls.append(result.nll.detach())
        return loss.detach()

    def _shares(self, parts: list[Batch]) -> list[Tensor]:
        """Factors that make the mean over processes the mean over all ids, whoever has them."""
        weights = torch.stack([part.loss_weight[:, 1:].sum() for part in parts])
        total = weights.sum()
        if self._world > 1:
            dist.all_reduce(total)
        return list(weights * self._world / total.clamp(min=torch.finfo(total.dtype).tiny))

    @property
    def _world(self) -> int:
        return self.trainer.world_size if dist.is_initialized() else 1

    def on_validation_epoch_start(self) -> None:
        """Begin new sums."""
        self._validated = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss on unseen documents, whole and per modality."""
        hidden = self._hidden(batch)
        result = self._loss(batch, hidden)
        self.log("val/loss", result.loss, batch_size=len(batch.ids), prog_bar=True, sync_dist=True)
        right = hits(self.lm, hidden, batch.ids[:, 1:].flatten())
        tally = Tally.of(batch, result.nll, self._units, right)
        self._validated = tally if self._validated is None else self._validated + tally

    def on_validation_epoch_end(self) -> None:
        """Log the figures of all validation documents."""
        if self._validated is not None:
            self._log_figures("val", self._summed(self._validated), judged=True)
        super().on_validation_epoch_end()

    def _summed(self, tally: Tally) -> Tally:
        """Over all processes that have data of their own; a group that shares rows counts alike."""
        stacked = tally.stacked()
        if self._world > 1:
            dist.all_reduce(stacked)
        return Tally(*stacked)

    def _log_figures(self, stage: str, tally: Tally, *, judged: bool) -> None:
        for name, value in tally.figures(judged=judged).items():
            self.log(f"{stage}/{name}", value, batch_size=1)

    def _log_routing(self, batch: Batch) -> None:
        """How evenly sparse layers use their experts, in all and by modality.

        `routing/balance`: 1 when all are used alike, the number of experts when one is.
        `routing/image`: share of the ids of a modality that go through its busiest expert.
        """
        layers = [m for m in self.lm.modules() if isinstance(m, SparseFeedForward)]
        if not layers or self.scale.micro_batches > 1:
            return
        losses = [layer.balance_loss for layer in layers if layer.balance_loss is not None]
        self.log("routing/balance", torch.stack(losses).mean())
        modality = batch.modality[:, :-1].flatten()
        real = batch.segment_ids[:, :-1].flatten() > 0
        for index, name in enumerate(MODALITIES):
            chosen = real & (modality == index)
            if bool(chosen.any()):
                self.log(f"routing/{name}", _busiest(layers, chosen))


def _busiest(layers: list[SparseFeedForward], chosen: Tensor) -> Tensor:
    """Mean over layers of the share of the chosen tokens in their most used expert."""
    shares = []
    for layer in layers:
        assert layer.choices is not None
        used = torch.bincount(layer.choices[chosen].flatten(), minlength=layer.experts.count)
        shares.append(used.max() / chosen.sum())
    return torch.stack(shares).mean()


def _split(batch: Batch, parts: int) -> list[Batch]:
    """A batch as `parts` batches of whole rows.

    Raises:
        ValueError: it has fewer rows.
    """
    if parts == 1:
        return [batch]
    if len(batch.ids) < parts:
        raise ValueError(
            f"scale.micro_batches {parts}: the batch has only {len(batch.ids)} rows; raise "
            "data.batch_size"
        )
    columns = zip(
        *(field.tensor_split(parts, dim=1 if field.ndim == 3 else 0) for field in batch),
        strict=True,
    )
    return [Batch(*fields) for fields in columns]
