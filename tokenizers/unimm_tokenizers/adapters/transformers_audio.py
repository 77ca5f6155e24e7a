"""EnCodec, DAC and Mimi as `transformers` has them, behind the codec interface.

EnCodec: Défossez et al., arXiv 2210.13438; DAC: Kumar et al., arXiv 2306.06546; Mimi: Défossez et
al., arXiv 2410.00037. Codes are (B, K, T), the first level the coarsest.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, nn

from unimm_tokenizers.adapters.base import ForeignQuantizer
from unimm_tokenizers.adapters.transformers_base import TransformersCodec, TransformersConfig
from unimm_tokenizers.codec import register_codec


class _AudioAdapter(TransformersCodec):
    """Sound at the model's own rate."""

    modalities = ("audio",)

    @classmethod
    def _facts(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        channels = int(settings.get("audio_channels", 1))
        return {"sample_rate": int(settings["sampling_rate"]), "num_channels": channels}


@register_codec("transformers-encodec")
class EncodecAdapter(_AudioAdapter):
    """EnCodec without chunks or volume scales (24 kHz, MusicGen's 32 kHz)."""

    model_class = "EncodecModel"

    def __init__(self, config: TransformersConfig, model: nn.Module | None = None) -> None:
        super().__init__(config, model)
        own = self.model.config
        if own.normalize or own.chunk_length_s is not None:
            raise ValueError(
                f"{self.name}: a model with volume scales per chunk (48 kHz) cannot be told by its "
                f"codes alone; take the 24 kHz or 32 kHz model"
            )
        self.bandwidth = (
            max(own.target_bandwidths) if config.bandwidth is None else config.bandwidth
        )
        if self.bandwidth not in own.target_bandwidths:
            raise ValueError(
                f"{self.name}: bandwidth {self.bandwidth:g} is none of {own.target_bandwidths}"
            )
        levels = self.model.quantizer.get_num_quantizers_for_bandwidth(self.bandwidth)
        self.quantizer = ForeignQuantizer(levels, own.codebook_size)

    @property
    def downsample(self) -> tuple[int, ...]:
        """Samples per code frame."""
        return (prod(self.model.config.upsampling_ratios),)

    def to_codes(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, K, T / hop)."""
        return self.model.encode(x, bandwidth=self.bandwidth).audio_codes[0]

    def to_signal(self, codes: Tensor) -> Tensor:
        """(B, K, T) -> (B, C, T * hop)."""
        return self.model.decode(codes[None], [None]).audio_values


@register_codec("transformers-dac")
class DacAdapter(_AudioAdapter):
    """Descript audio codec."""

    model_class = "DacModel"

    def __init__(self, config: TransformersConfig, model: nn.Module | None = None) -> None:
        super().__init__(config, model)
        own = self.model.config
        levels = config.num_codebooks or own.n_codebooks
        self.quantizer = ForeignQuantizer(levels, own.codebook_size)

    @property
    def downsample(self) -> tuple[int, ...]:
        """Samples per code frame."""
        return (prod(self.model.config.downsampling_ratios),)

    def to_codes(self, x: Tensor) -> Tensor:
        """(B, 1, T) -> (B, K, T / hop)."""
        return self.model.encode(x, n_quantizers=self.num_codebooks).audio_codes

    def to_signal(self, codes: Tensor) -> Tensor:
        """(B, K, T) -> (B, 1, about T * hop)."""
        samples = self.model.decode(audio_codes=codes).audio_values
        return samples.reshape(codes.shape[0], 1, -1)


@register_codec("transformers-mimi")
class MimiAdapter(_AudioAdapter):
    """Mimi: one semantic level, then acoustic ones, 12.5 frames per second."""

    model_class = "MimiModel"

    def __init__(self, config: TransformersConfig, model: nn.Module | None = None) -> None:
        super().__init__(config, model)
        own = self.model.config
        levels = config.num_codebooks or own.num_quantizers
        self.quantizer = ForeignQuantizer(levels, own.codebook_size)

    @property
    def downsample(self) -> tuple[int, ...]:
        """Samples per code frame."""
        return (round(self.model.config.sampling_rate / self.model.config.frame_rate),)

    def to_codes(self, x: Tensor) -> Tensor:
        """(B, 1, T) -> (B, K, T / hop)."""
        return self.model.encode(x, num_quantizers=self.num_codebooks).audio_codes

    def to_signal(self, codes: Tensor) -> Tensor:
        """(B, K, T) -> (B, 1, T * hop)."""
        return self.model.decode(codes).audio_values
