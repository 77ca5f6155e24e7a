"""Training of a semantic codec: reconstruction, quantizer, and what pictures are called."""

from __future__ import annotations

import torch
from torch import Tensor

from unimm.training.codec import CodecTask
from unimm.training.optim import OptimizerConfig
from unimm_tokenizers.losses import Objective
from unimm_tokenizers.losses.objectives import total
from unimm_tokenizers.quantize import code_usage
from unimm_tokenizers.semantic import SemanticCodec, WordsContrast


class SemanticTask(CodecTask):
    """Trains a semantic codec on {"semantic": (B, C, H, W), "text": uint8 (B, L)}.

    Args:
        codec: the codec: untrained, or loaded to be trained further.
        objective: terms of the reconstruction loss.
        optimizer: how parameters move.
        contrast: weight of the image-text loss; 0 trains without words. Its text side stays with
            the task, and is not exported.
        average: decay of a moving average of the weights, which is what is validated and exported.

    Raises:
        ValueError: `contrast` is negative.
    """

    codec: SemanticCodec

    def __init__(
        self,
        codec: SemanticCodec,
        objective: Objective,
        optimizer: OptimizerConfig | None = None,
        contrast: float = 0.1,
        average: float | None = None,
    ) -> None:
        super().__init__(codec, objective, optimizer, average=average)
        if contrast < 0:
            raise ValueError(f"contrast must be 0 or more, got {contrast}")
        self.contrast = contrast
        self.words = WordsContrast(codec.config.codebook_dim)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The codec's optimizers, which move the text side too."""
        optimizers = super().configure_optimizers()
        first = optimizers[-1].param_groups[0]
        optimizers[-1].add_param_group(
            {**{k: v for k, v in first.items() if k != "params"}, "params": self.words.parameters()}
        )
        return optimizers

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One step on pictures and their words."""
        described = self.codec.describe(batch["semantic"])
        output = described.output
        terms = {**self.objective(output), "quantizer": output.loss}
        if self.contrast:
            terms["contrast"] = self.contrast * self.words(described.embedding, batch["text"])
        parameters = [*self.codec.parameters(), *self.words.parameters()]
        loss = total(terms)
        norm = self.descend(loss, parameters, 0, self._codec_optimizers)
        usage = code_usage(output.codes, self.codec.codebook_size)
        tokens = (output.codes >= 0).sum((1, 2)).float().mean()
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        self.log_dict({"train/perplexity": usage.perplexity.mean(), "train/tokens": tokens})
        self.log_dict({"train/loss": loss.detach(), "train/gradient_norm": norm}, prog_bar=True)
