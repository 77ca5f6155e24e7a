"""Training of a codec: reconstruction, quantizer, and an adversary on a fixed small weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from unimm.training.optim import OptimizerConfig, build_optimizers
from unimm.training.task import Task
from unimm_tokenizers import Codec
from unimm_tokenizers.losses import Objective, discriminator_hinge, generator_hinge
from unimm_tokenizers.losses.objectives import total
from unimm_tokenizers.quantize.base import code_usage


class CodecTask(Task):
    """Trains any codec on batches {modality: signals (B, C, *signal)}.

    Args:
        codec: the codec, untrained.
        objective: terms of the reconstruction loss.
        optimizer: how parameters move; the discriminator's too.
        discriminator: adversary; None trains without one.
        adversarial_weight: weight of its hinge loss in the codec's loss; small and fixed, as in
            Open-MAGVIT2 and IBQ (0.1).
        adversarial_start: first step at which the codec feels the adversary.
        quantizer_start: first step that quantizes; before it the codec is a plain auto-encoder.
    """

    def __init__(
        self,
        codec: Codec,
        objective: Objective,
        optimizer: OptimizerConfig | None = None,
        discriminator: nn.Module | None = None,
        adversarial_weight: float = 0.1,
        adversarial_start: int = 0,
        quantizer_start: int = 0,
    ) -> None:
        super().__init__(optimizer or OptimizerConfig())
        self.codec = codec.train()
        self.objective = objective
        self.discriminator = discriminator
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.quantizer_start = quantizer_start

    def bundle_entry(self) -> dict[str, Any]:
        """See `Task.bundle_entry`."""
        return {
            "kind": "codec",
            "codec": self.codec.name,
            "config": dataclasses.asdict(self.codec.config),
        }

    def exported(self) -> nn.Module:
        """See `Task.exported`."""
        return self.codec

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The codec's optimizers first, then the discriminator's."""
        optimizers = build_optimizers(self.codec, self.optimizer_config)
        self._codec_optimizers = len(optimizers)
        if self.discriminator is not None:
            plain = dataclasses.replace(self.optimizer_config, matrices="adamw")
            optimizers += build_optimizers(self.discriminator, plain)
        return optimizers

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One step on every modality of the batch together."""
        self.codec.quantizer.warming_up = self.global_step < self.quantizer_start
        terms: dict[str, Tensor] = {}
        made: list[tuple[Tensor, Tensor]] = []
        for modality, signals in batch.items():
            output = self.codec(signals)
            made.append((output.reconstruction, output.target))
            for name, value in {**self.objective(output), "quantizer": output.loss}.items():
                terms[f"{modality}/{name}"] = value / len(batch)
            usage = code_usage(output.codes, self.codec.codebook_size)
            self.log(f"train/{modality}/perplexity", usage.perplexity.mean())
        felt = self.discriminator is not None and self.global_step >= self.adversarial_start
        if felt:
            terms["adversarial"] = self.adversarial_weight * self._fooled(made)
        if self.discriminator is not None:
            self._train_discriminator(self.discriminator, made)
        loss = total(terms)
        norm = self.descend(loss, self.codec.parameters(), 0, self._codec_optimizers)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        self.log_dict({"train/loss": loss.detach(), "train/gradient_norm": norm}, prog_bar=True)

    def _fooled(self, made: list[tuple[Tensor, Tensor]]) -> Tensor:
        assert self.discriminator is not None
        self.discriminator.requires_grad_(False)
        losses = [generator_hinge(self.discriminator(fake)) for fake, _ in made]
        self.discriminator.requires_grad_(True)
        return torch.stack(losses).mean()

    def _train_discriminator(
        self, discriminator: nn.Module, made: list[tuple[Tensor, Tensor]]
    ) -> None:
        losses = [
            discriminator_hinge(discriminator(real), discriminator(fake.detach()))
            for fake, real in made
        ]
        loss = torch.stack(losses).mean()
        self.descend(loss, discriminator.parameters(), self._codec_optimizers, 1)
        self.log("train/discriminator", loss.detach())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Reconstruction terms and peak signal-to-noise ratio on unseen signals."""
        for modality, signals in batch.items():
            output = self.codec(signals)
            size = len(signals)
            for name, value in self.objective(output).items():
                self.log(f"val/{modality}/{name}", value, batch_size=size)
            error = (output.reconstruction.float() - output.target.float()).square()
            psnr = 10 * (4 / error.flatten(1).mean(1).clamp(min=1e-10)).log10()
            self.log(f"val/{modality}/psnr", psnr.mean(), batch_size=size, prog_bar=True)
            usage = code_usage(output.codes, self.codec.codebook_size)
            self.log(f"val/{modality}/usage", usage.usage.mean(), batch_size=size)
