"""Teaching a language model new modalities: its new rows first, then low-rank updates or all of it.

A converted text model reads its new ids by rows that are all alike. Trained at once with the rest,
their large early gradients would spoil what it knows; so they are trained alone first, the rest as
it was (Chameleon's cousins do likewise: Anole, arXiv 2407.06135, trains the image rows alone). What
follows is LoRA (Hu et al., arXiv 2106.09685; `peft`), with the new rows, or everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from unimm.checkpoint import lm_folder, load_weights, read_config
from unimm.model import ModelConfig, UnifiedLM
from unimm.training.language import LanguageTask
from unimm.training.optim import OptimizerConfig
from unimm.training.scale import ScaleConfig
from unimm.vocabulary import Vocabulary

OLD_MARKERS = ("<pad>", "<bos>", "<eos>")  # a text model has them, under whatever name
_TARGETS = ("qkv", "out", "gate_up", "down")
_BASE = ".base_layer."


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank updates of every matrix inside the blocks.

    rank: of the updates. alpha: their factor times the rank. dropout: of what goes into them.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0


class AdaptTask(LanguageTask):
    """Goes on training a bundle's language model.

    Args:
        bundle: a whole bundle, as `unimm convert` makes it; token shards are made with it too.
        rows_steps: steps in which only the rows of new ids move, in embedding and head.
        lora: how the rest moves afterwards; None: freely.
        optimizer, z_loss, compile_blocks, scale, code_noise: see `LanguageTask`.

    Raises:
        ValueError: the bundle holds no language model, or one of another vocabulary.
        ModuleNotFoundError: `peft` is needed for LoRA and not installed.
    """

    def __init__(
        self,
        bundle: str,
        rows_steps: int = 0,
        lora: LoRAConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        z_loss: float = 0.0,
        compile_blocks: bool = False,
        scale: ScaleConfig | None = None,
        code_noise: float = 0.0,
    ) -> None:
        config = read_config(ModelConfig, lm_folder(bundle))
        super().__init__(bundle, config, optimizer, z_loss, compile_blocks, scale, code_noise)
        self.rows_steps = rows_steps
        self.register_buffer("_new", new_rows(self.tokenizer.vocabulary), persistent=False)
        if lora is not None:
            add_lora(self.lm, lora)

    def made(self, config: ModelConfig, bundle: str) -> UnifiedLM:
        """See `LanguageTask.made`: with the bundle's weights, for training in float32."""
        stored = read_config(ModelConfig, lm_folder(bundle)).vocab_size
        if stored != config.vocab_size:
            raise ValueError(
                f"{bundle}: the model has rows for {stored} ids, the tokenizer for "
                f"{config.vocab_size}: they do not belong together"
            )
        with torch.device("meta"):
            lm = UnifiedLM(config)
        load_weights(lm, lm_folder(bundle))
        return lm

    def check_strategy(self, trainer: lightning.Trainer) -> None:
        """See `Task.check_strategy`."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError("adapting keeps the whole model on every process: use ddp")

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """See `LanguageTask`; each group remembers its decay, which rows alone do without."""
        optimizers = super().configure_optimizers()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["decay"] = group["weight_decay"]
        return optimizers

    def finish_step(
        self, parameters: Iterable[nn.Parameter], first: int = 0, count: int = 1
    ) -> Tensor:
        """See `Task.finish_step`; what does not move yet has no gradient."""
        parameters = list(parameters)
        alone = self.global_step < self.rows_steps
        for wrapped in self._wrapped():  # decay would shrink old rows, which have no gradient
            for group in wrapped.optimizer.param_groups:
                group["weight_decay"] = 0.0 if alone else group["decay"]
        if alone:
            rows = {id(self.lm.embedding.weight), id(self.lm.head_weight)}
            for parameter in parameters:
                if id(parameter) not in rows:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad[~self._new] = 0  # pyright: ignore
        return super().finish_step(parameters, first, count)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `Task.on_save_checkpoint`; what is exported has its low-rank updates added in."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["unimm"]["weights"] = merged(self.lm)


def new_rows(vocabulary: Vocabulary) -> Tensor:
    """bool (padded_size,): ids that a text model did not have."""
    new = torch.ones(vocabulary.padded_size, dtype=torch.bool)
    text = vocabulary["text"]
    new[text.start : text.end] = False
    new[[vocabulary.marker(name) for name in OLD_MARKERS]] = False
    return new


def add_lora(lm: UnifiedLM, config: LoRAConfig) -> None:
    """Put low-rank updates beside every matrix of the blocks; those, embedding and head train.

    Raises:
        ModuleNotFoundError: `peft` is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError:
        raise ModuleNotFoundError("LoRA needs peft: pip install 'unimm[hf]'") from None
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        target_modules=list(_TARGETS),
    )
    peft.inject_adapter_in_model(settings, lm)
    lm.embedding.weight.requires_grad_(True)
    lm.head_weight.requires_grad_(True)


def merged(lm: UnifiedLM) -> dict[str, Tensor]:
    """A model's weights under their own names, low-rank updates added to their matrices."""
    state = {}
    for name, tensor in lm.state_dict().items():
        if ".lora_" not in name:
            state[name.replace(_BASE, ".")] = tensor
    for name, module in lm.named_modules():
        update = getattr(module, "get_delta_weight", None)
        if update is not None:
            state[f"{name}.weight"] = state[f"{name}.weight"] + update("default").detach()
    return state
