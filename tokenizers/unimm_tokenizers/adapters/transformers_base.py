"""Tokenizers of Hugging Face `transformers` (extra `hf`): what their adapters share.

    codec = EncodecAdapter.wrap(transformers.EncodecModel.from_pretrained(folder), bandwidth=6.0)

The model's own config travels inside the adapter's as plain data, its weights as safetensors; no
code is ever loaded with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from unimm_tokenizers.adapters.base import AdaptedCodec


@dataclass(frozen=True, kw_only=True)
class TransformersConfig:
    """`settings`: the model's own config, as JSON data; the rest is what an adapter adds to it.

    `num_codebooks` (Mimi, DAC) keeps the first levels, `bandwidth` (EnCodec, kbit/s) likewise;
    None keeps the model's own choice. `fps` names the rate of films that are decoded (Emu3).
    """

    settings: Mapping[str, Any]
    num_channels: int = 3
    sample_rate: int | None = None
    num_codebooks: int | None = None
    bandwidth: float | None = None
    fps: float = 10.0


class TransformersCodec(AdaptedCodec):
    """A codec around a model class of `transformers`, named by `model_class`."""

    config_class = TransformersConfig
    config: TransformersConfig
    model_class: ClassVar[str]

    def __init__(self, config: TransformersConfig, model: nn.Module | None = None) -> None:
        super().__init__(config)
        self.model: Any = self._build(config.settings) if model is None else model

    @classmethod
    def _build(cls, settings: Mapping[str, Any]) -> nn.Module:
        try:
            import transformers  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"codec {cls.name!r} needs transformers: pip install 'unimm[hf]'"
            ) from None
        found = getattr(transformers, cls.model_class)
        return found(found.config_class.from_dict(dict(settings))).eval()

    @classmethod
    def wrap(cls, model: nn.Module, **choices: Any) -> Self:
        """Adapt a model that is at hand; `choices` are fields of `TransformersConfig`.

        Raises:
            ValueError: the model is of another class.
        """
        if type(model).__name__ != cls.model_class:
            raise ValueError(
                f"{cls.name}: expected a {cls.model_class}, got a {type(model).__name__}"
            )
        settings = json.loads(model.config.to_json_string(use_diff=False))  # pyright: ignore
        return cls(TransformersConfig(settings=settings, **cls._facts(settings), **choices), model)

    @classmethod
    def _facts(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that the model's own config decides."""
        return {}
