"""A SeTok that paints the latents of a vision codec, whose decoder makes pixels of them.

The vision codec is frozen and stays outside the weights: its name and the sha256 of its weights
stand in the config, and a codec is refused when the one that goes by that name has other weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.codec import Codec, register_codec
from unimm_tokenizers.semantic.codec import SemanticCodec
from unimm_tokenizers.semantic.config import SeTokConfig
from unimm_tokenizers.semantic.detokenizer import CELL_CHANNELS, Painted
from unimm_tokenizers.semantic.encoder import RegionEncoder, Tokens
from unimm_tokenizers.semantic.frozen import pinned_sha256
from unimm_tokenizers.semantic.layers import ToChannels
from unimm_tokenizers.vision import VisionCodec, VQGANCodec

_BUILDERS: dict[str, Callable[[], Codec]] = {}


def register_vision_codec(name: str, build: Callable[[], Codec]) -> None:
    """Make a vision codec known by a name; codec folders need no registration."""
    _BUILDERS[name] = build


@dataclass(frozen=True, kw_only=True)
class LatentSeTokConfig(SeTokConfig):
    """`SeTokConfig` with a vision codec.

    vision_codec: a registered name, or a codec folder.
    vision_sha256: of its weights; empty: whatever they are when the codec is made, and from then on
        those.
    latent_weight: of the latents' mean squared error, beside the losses of the picture.
    """

    vision_codec: str
    vision_sha256: str = ""
    latent_weight: float = 1.0


def open_vision_codec(name: str) -> Codec:
    """The vision codec of that name.

    Raises:
        ValueError: nothing goes by it, or a file is missing or damaged.
    """
    if name in _BUILDERS:
        return _BUILDERS[name]()
    if not Path(name).is_dir():
        known = ", ".join([*sorted(_BUILDERS), "codec folders"])
        raise ValueError(f"vision codec {name!r} is unknown; known are {known}")
    return Codec.from_pretrained(name)


@register_codec("setok-latent")
class LatentSeTokCodec(SemanticCodec):
    """One code for each region; pictures are painted in a vision codec's latents.

    Args:
        config: names the vision codec.
        vision: the vision codec itself, which is copied; None opens the one that
            `config.vision_codec` names.

    Raises:
        ValueError: the vision codec is unknown, does not fit, or has other weights than those that
            the config names.
    """

    config_class = LatentSeTokConfig
    config: LatentSeTokConfig

    def __init__(self, config: LatentSeTokConfig, vision: Codec | None = None) -> None:
        name = config.vision_codec
        own = copy.deepcopy(vision) if vision else open_vision_codec(name)
        own = _fitting(own.eval().requires_grad_(False), config)
        digest = pinned_sha256(own, config.vision_sha256, name, "vision codec")
        # Latents are told apart as the vision codec tells them: one scale for all channels.
        every = torch.arange(own.codebook_size).expand(1, own.num_codebooks, -1)
        table = own.quantizer.lookup(every)[0].float()  # (D, codebook_size)
        ratio = own.downsample[-1] // config.cell
        head = nn.Sequential(ToChannels(ratio), nn.Conv2d(CELL_CHANNELS * ratio**2, len(table), 1))
        config = dataclasses.replace(config, vision_sha256=digest)
        super().__init__(config, RegionEncoder(config), head)
        self._vision = (own,)  # in a tuple: no part of the codec's weights
        self.middle: Tensor
        self.register_buffer("middle", table.mean(1)[:, None, None], persistent=False)
        self.scale: Tensor
        spread = table.var(1, correction=0).mean().sqrt().clamp(min=1e-6)
        self.register_buffer("scale", spread, persistent=False)

    @property
    def vision(self) -> VisionCodec | VQGANCodec:
        """The frozen vision codec, on this codec's device."""
        return self._vision[0].to(self.steps.device)

    def signal(self, made: Tensor) -> Tensor:
        """Standardized latents (B, D, h, w) -> (B, C, H, W), in about [-1, 1]."""
        vision = self.vision
        latents = made * self.scale + self.middle
        return vision.decode_latents(latents.to(next(vision.parameters()).dtype))

    def painting_loss(self, painted: Painted, tokens: Tokens, x: Tensor) -> Tensor:
        """The layout's loss, and the latents'."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            vision = self.vision
            wanted = (vision.quantizer.lookup(vision.encode(x)) - self.middle) / self.scale
        distance = F.mse_loss(painted.made.float(), wanted.float())
        return super().painting_loss(painted, tokens, x) + self.config.latent_weight * distance


def _fitting(vision: Codec, config: LatentSeTokConfig) -> VisionCodec | VQGANCodec:
    """The vision codec.

    Raises:
        ValueError: it is none, or its latents do not lie over this codec's pictures and cells.
    """
    name = f"vision codec {config.vision_codec!r}"
    if not isinstance(vision, VisionCodec | VQGANCodec):
        raise ValueError(f"{name} is of class {vision.name!r}; name one of 'vision' or 'vqgan'")
    if vision.num_channels != config.num_channels:
        raise ValueError(
            f"{name} has {vision.num_channels} channels, num_channels is {config.num_channels}; "
            "they must agree"
        )
    pixels = vision.downsample[-1]
    if config.image_size % pixels or pixels % config.cell:
        raise ValueError(
            f"{name} has a latent every {pixels} pixels, which must divide image_size "
            f"{config.image_size} and be a multiple of cell {config.cell}"
        )
    return vision
