"""Pretraining of the decoder: next-token prediction over everything."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from unimm.data.batch import Batch
from unimm.model import ModelConfig, UnifiedLM
from unimm.tokenizer import UnifiedTokenizer
from unimm.training.optim import OptimizerConfig, build_optimizers
from unimm.training.task import Task
from unimm.vocabulary import MODALITIES
from unimm_kernels import LinearCrossEntropy, linear_cross_entropy


class LanguageTask(Task):
    """Trains a decoder on packed batches.

    Args:
        tokenizer: bundle that the token shards were made with.
        model: shape of the decoder; its vocabulary size comes from the tokenizer.
        optimizer: how parameters move.
        z_loss: factor of the squared log-normaliser (Chameleon: 1e-5).
        compile_blocks: compile each block; the first step then takes about a minute on a CPU.
    """

    def __init__(
        self,
        tokenizer: str,
        model: ModelConfig,
        optimizer: OptimizerConfig | None = None,
        z_loss: float = 1e-5,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__(optimizer or OptimizerConfig())
        self.tokenizer = UnifiedTokenizer.from_pretrained(tokenizer)
        config = dataclasses.replace(model, vocab_size=self.tokenizer.vocabulary.padded_size)
        self.lm = UnifiedLM(config)
        self.z_loss = z_loss
        if compile_blocks:
            for block in self.lm.blocks:
                block.compile()  # in place: checkpoint keys stay as they are

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
        hidden = self.lm.hidden(
            batch.ids[:, :-1], batch.positions[:, :, :-1], batch.segment_ids[:, :-1]
        )
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.lm.head_weight,
            batch.ids[:, 1:].flatten(),
            loss_weight=batch.loss_weight[:, 1:].flatten(),
            z_loss=self.z_loss,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step."""
        result = self.forward(batch)
        norm = self.descend(result.loss, self.lm.parameters(), 0, self._optimizers_count)
        self.log_dict(
            {"train/loss": result.loss.detach(), "train/gradient_norm": norm}, prog_bar=True
        )
        self._log_modalities("train", batch, result.nll.detach())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss on unseen documents, whole and per modality."""
        result = self.forward(batch)
        self.log("val/loss", result.loss, batch_size=len(batch.ids), prog_bar=True)
        self._log_modalities("val", batch, result.nll)

    def _log_modalities(self, stage: str, batch: Batch, nll: Tensor) -> None:
        """Mean negative log-likelihood (nats per id) of each modality in the batch."""
        counted = batch.loss_weight[:, 1:].flatten() > 0
        modality = batch.modality[:, 1:].flatten()
        for index, name in enumerate(MODALITIES):
            chosen = counted & (modality == index)
            if bool(chosen.any()):
                mean = nll[chosen].mean()
                self.log(f"{stage}/{name}", mean, batch_size=int(chosen.sum()))
