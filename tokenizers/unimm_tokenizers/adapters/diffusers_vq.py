"""`VQModel` of Hugging Face `diffusers`, behind the codec interface (arXiv 2112.10752, VQ-f)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from unimm_tokenizers.adapters.base import AdaptedCodec, ForeignQuantizer
from unimm_tokenizers.codec import register_codec


@dataclass(frozen=True, kw_only=True)
class DiffusersConfig:
    """`settings`: the model's own config as JSON data."""

    settings: Mapping[str, Any]
    num_channels: int = 3


@register_codec("diffusers-vq")
class DiffusersAdapter(AdaptedCodec):
    """Pictures (B, C, H, W) <-> codes (B, 1, h, w)."""

    config_class = DiffusersConfig
    modalities = ("image",)

    def __init__(self, config: DiffusersConfig, model: nn.Module | None = None) -> None:
        super().__init__(config)
        if model is None:
            try:
                from diffusers.models.autoencoders.vq_model import VQModel  # pyright: ignore
            except ModuleNotFoundError:
                raise ModuleNotFoundError(
                    f"codec {self.name!r} needs diffusers: pip install diffusers"
                ) from None
            own = {k: v for k, v in config.settings.items() if not k.startswith("_")}
            model = VQModel(**own).eval()  # pyright: ignore[reportArgumentType]
        self.model: Any = model
        self.quantizer = ForeignQuantizer(1, self.model.config.num_vq_embeddings)

    @classmethod
    def wrap(cls, model: nn.Module) -> Self:
        """Adapt a `VQModel` that is at hand."""
        settings = json.loads(model.to_json_string())  # pyright: ignore[reportCallIssue]
        return cls(DiffusersConfig(settings=settings, num_channels=settings["in_channels"]), model)

    @property
    def downsample(self) -> tuple[int, ...]:
        """(h, w) pixels per code."""
        space = 2 ** (len(self.model.config.block_out_channels) - 1)
        return (space, space)

    def to_codes(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, h, w)."""
        latents = self.model.encode(x).latents
        _, _, (_, _, codes) = self.model.quantize(latents)
        return codes.view(len(x), 1, *latents.shape[-2:])

    def to_signal(self, codes: Tensor) -> Tensor:
        """(B, 1, h, w) -> (B, C, H, W)."""
        batch, _, height, width = codes.shape
        shape = (batch, height, width, self.model.quantize.vq_embed_dim)
        latents = self.model.quantize.get_codebook_entry(codes.flatten(), shape)
        return self.model.decode(latents, force_not_quantize=True).sample
