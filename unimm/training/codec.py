"""Training of a codec: reconstruction, quantizer, and an adversary of a fixed small weight."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from unimm.training.adversary import Adversary
from unimm.training.optim import OptimizerConfig, build_optimizers
from unimm.training.task import Task
from unimm_tokenizers import Codec
from unimm_tokenizers.losses import Objective, SemanticDistillation
from unimm_tokenizers.losses.objectives import total
from unimm_tokenizers.quantize import UsageCounter, code_usage

_log = logging.getLogger("unimm")


class CodecTask(Task):
    """Trains any codec on batches {modality: signals (B, C, *signal)}.

    Args:
        codec: the codec: untrained, or loaded to be trained further.
        objective: terms of the reconstruction loss.
        optimizer: how parameters move; the discriminators' too.
        adversary: discriminators and their weights; None trains without.
        quantizer_start: first step that quantizes; before it the codec is a plain auto-encoder.
        average: decay of a moving average of the weights, which is what is validated and exported.
        distillation: what the first code level of sound learns from a teacher; None: nothing.
    """

    def __init__(
        self,
        codec: Codec,
        objective: Objective,
        optimizer: OptimizerConfig | None = None,
        adversary: Adversary | None = None,
        quantizer_start: int = 0,
        average: float | None = None,
        distillation: SemanticDistillation | None = None,
    ) -> None:
        super().__init__(optimizer or OptimizerConfig(), average)
        self.codec = codec.train()
        for parameter in codec.parameters():
            if parameter.ndim == 4:
                # Two-dimensional convolutions are fastest with channels innermost, on CPUs as well.
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.objective = objective
        self.adversary = adversary
        self.distillation = distillation
        self.quantizer_start = quantizer_start
        self.counters = nn.ModuleDict(
            {m: UsageCounter(codec.num_codebooks, codec.codebook_size) for m in codec.modalities}
        )

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

    def beside(self) -> list[nn.Module]:
        """What trains with the codec, by the same loss, and is not exported."""
        return [] if self.distillation is None else [self.distillation.projection]

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The codec's optimizers first, then the discriminators'."""
        optimizers = build_optimizers(self.codec, self.optimizer_config)
        # Rules name the codec's parameters.
        plain = dataclasses.replace(self.optimizer_config, matrices="adamw", rules=())
        for module in self.beside():
            optimizers += build_optimizers(module, plain)
        self._codec_optimizers = len(optimizers)
        if self.adversary is not None:
            optimizers += build_optimizers(self.adversary, plain)
        return optimizers

    def on_fit_start(self) -> None:
        """Say what stands in for what."""
        super().on_fit_start()
        if self.trainer.is_global_zero and self.objective.note:
            _log.info("%s", self.objective.note)

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
            if self.distillation is not None:
                terms[f"{modality}/distillation"] = self.distillation(self.codec, signals, output)
            usage = code_usage(output.codes, self.codec.codebook_size)
            self.log(f"train/{modality}/perplexity", usage.perplexity.mean())
        self.learn(terms, made)

    def learn(self, terms: dict[str, Tensor], made: list[tuple[Tensor, Tensor]]) -> None:
        """Move the discriminators, then the codec and what is beside it.

        Args:
            terms: weighted scalar terms of the codec's loss, by name; the adversary's comes on top.
            made: what was made and what it should be, each (B, C, *signal).
        """
        step = self.global_step
        if self.adversary is not None:
            # Before the codec's own step, which is the one that is counted.
            self._train_adversary(self.adversary, made, step)
            if self.adversary.felt(step):
                terms = {**terms, "adversarial": self.adversary.fooled(made)}
        loss = total(terms)
        modules = (self.codec, *self.beside())
        moved = itertools.chain.from_iterable(module.parameters() for module in modules)
        norm = self.descend(loss, moved, 0, self._codec_optimizers)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        self.log_dict({"train/loss": loss.detach(), "train/gradient_norm": norm}, prog_bar=True)

    def _train_adversary(
        self, adversary: Adversary, made: list[tuple[Tensor, Tensor]], step: int
    ) -> None:
        terms = adversary.loss(made, step)
        if terms:
            self.descend(total(terms), adversary.parameters(), self._codec_optimizers, 1)
            self.log_dict({f"train/discriminator/{k}": v.detach() for k, v in terms.items()})

    def on_validation_epoch_start(self) -> None:
        """Validate the averaged weights where there are some."""
        self._exchange_weights()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Reconstruction terms and peak signal-to-noise ratio on unseen signals."""
        for modality, signals in batch.items():
            output = self.codec(signals)
            size = len(signals)
            for name, value in self.objective(output).items():
                self.log(f"val/{modality}/{name}", value, batch_size=size, sync_dist=True)
            error = (output.reconstruction.float().clamp(-1, 1) - output.target.float()).square()
            psnr = 10 * (4 / error.flatten(1).mean(1).clamp(min=1e-10)).log10()
            name = f"val/{modality}/psnr"
            self.log(name, psnr.mean(), batch_size=size, prog_bar=True, sync_dist=True)
            cast(UsageCounter, self.counters[modality]).update(output.codes)

    def on_validation_epoch_end(self) -> None:
        """How the codes were used, over all of it; then train on with the weights themselves."""
        super().on_validation_epoch_end()
        for modality, counter in self.counters.items():
            usage = cast(UsageCounter, counter).finish()
            if float(usage.usage.max()) > 0:
                figures = {k: v.mean() for k, v in usage._asdict().items()}
                self.log_dict({f"val/{modality}/{name}": v for name, v in figures.items()})
        self._exchange_weights()

    @torch.no_grad()
    def _exchange_weights(self) -> None:
        """Put the averages into the codec, and its weights in their place; a second time, back."""
        if self.average is None:
            return
        for name, parameter in self.codec.named_parameters():
            kept = self.average.weights[name]
            own = parameter.detach().clone()
            parameter.copy_(kept)
            kept.copy_(own)
