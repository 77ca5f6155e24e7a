"""Training of a semantic codec: reconstruction, quantizer, and what pictures are called."""

from __future__ import annotations

from torch import Tensor, nn

from unimm.training.adversary import Adversary
from unimm.training.codec import CodecTask
from unimm.training.optim import OptimizerConfig
from unimm_tokenizers.losses import Objective
from unimm_tokenizers.quantize import code_usage
from unimm_tokenizers.semantic import SemanticCodec, WordsContrast


class SemanticTask(CodecTask):
    """Trains a semantic codec on {"semantic": (B, C, H, W), "text": uint8 (B, L)}.

    Args:
        codec: the codec: untrained, or loaded to be trained further.
        objective: terms of the reconstruction loss.
        optimizer: how parameters move; the discriminators' too.
        adversary: discriminators and their weights; None trains without.
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
        adversary: Adversary | None = None,
        contrast: float = 0.1,
        average: float | None = None,
    ) -> None:
        super().__init__(codec, objective, optimizer, adversary, average=average)
        if contrast < 0:
            raise ValueError(f"contrast must be 0 or more, got {contrast}")
        self.contrast = contrast
        self.words = WordsContrast(codec.config.codebook_dim) if contrast else None

    def beside(self) -> list[nn.Module]:
        """See `CodecTask.beside`."""
        return [] if self.words is None else [self.words]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One step on pictures and their words."""
        described = self.codec.describe(batch["semantic"])
        output = described.output
        terms = {**self.objective(output), "quantizer": output.loss}
        if self.words is not None:
            terms["contrast"] = self.contrast * self.words(described.embedding, batch["text"])
        usage = code_usage(output.codes, self.codec.codebook_size)
        tokens = (output.codes >= 0).sum((1, 2)).float().mean()
        self.log_dict({"train/perplexity": usage.perplexity.mean(), "train/tokens": tokens})
        self.learn(terms, [(output.reconstruction, output.target)])
