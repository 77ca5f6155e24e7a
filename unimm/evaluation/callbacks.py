"""What a language model's training shows while it runs.

Stands here and not in the training room: samples need generation, which training never imports.
Recipes name it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning

from unimm.evaluation.writing import write_document
from unimm.generation import generate_batch
from unimm.training import LanguageTask


class WriteSamples(lightning.Callback):
    """Answers fixed prompts at each validation, into `<run>/samples/step=N/<modality>`.

    Args:
        prompts: words to start from.
        modalities: what to answer with, each in turn.
        max_new_tokens: most ids of an answer.
        guidance: scale of classifier-free guidance for answers that are no text.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        modalities: Sequence[str] = ("image", "audio"),
        max_new_tokens: int = 256,
        guidance: float = 3.0,
    ) -> None:
        self.prompts = list(prompts)
        self.modalities = list(modalities)
        self.max_new_tokens = max_new_tokens
        self.guidance = guidance

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Write one answer to every prompt in every modality."""
        if not trainer.is_global_zero or not isinstance(pl_module, LanguageTask):
            return
        folder = Path(trainer.default_root_dir, "samples", f"step={trainer.global_step}")
        for modality in self.modalities:
            answers = generate_batch(
                pl_module.lm,
                pl_module.tokenizer,
                [[prompt] for prompt in self.prompts],
                modality,
                max_new_tokens=self.max_new_tokens,
                guidance=None if modality == "text" else self.guidance,
            )
            for number, answer in enumerate(answers, start=1):
                write_document(answer, folder / modality, number)
