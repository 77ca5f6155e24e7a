"""A pair of TorchScript files, encoder and decoder, behind the codec interface.

The form in which the Cosmos tokenizers come (NVIDIA, arXiv 2501.03575): `encoder(x)` gives the
indices first, (B, [t,] h, w), and `decoder(indices)` the signal. A TorchScript file holds code:
load only files whose sha256 you know, and name it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unimm_tokenizers.adapters.base import AdaptedCodec, ForeignQuantizer
from unimm_tokenizers.codec import register_codec
from unimm_tokenizers.storage import sha256


@dataclass(frozen=True, kw_only=True)
class TorchScriptConfig:
    """Two files, their sha256 as hex, and the shapes, which the files do not tell.

    `downsample` is (h, w), or (t, h, w) of films whose first frame stands alone: 1 + t * n frames.
    """

    encoder: str
    decoder: str
    encoder_sha256: str
    decoder_sha256: str
    codebook_size: int
    downsample: tuple[int, ...] = (16, 16)
    num_channels: int = 3
    fps: float = 10.0


@register_codec("torchscript")
class TorchScriptAdapter(AdaptedCodec):
    """Pictures, and with a `downsample` of three axes films."""

    config_class = TorchScriptConfig
    config: TorchScriptConfig

    def __init__(self, config: TorchScriptConfig) -> None:
        super().__init__(config)
        self.modalities = ("image",) if len(config.downsample) == 2 else ("video",)
        self.quantizer = ForeignQuantizer(1, config.codebook_size)
        self.encoder = _load(config.encoder, config.encoder_sha256)
        self.decoder = _load(config.decoder, config.decoder_sha256)
        self.register_parameter("anchor", torch.nn.Parameter(torch.zeros(0)))  # device and dtype

    @property
    def downsample(self) -> tuple[int, ...]:
        """Signal units per code on each grid axis."""
        return self.config.downsample

    def _whole_frames(self, frames: int) -> int:
        return (1 - frames) % self.downsample[0]

    def to_codes(self, x: Tensor) -> Tensor:
        """(B, C, *signal) -> (B, 1, *grid)."""
        found = self.encoder(x)
        return (found if isinstance(found, Tensor) else found[0])[:, None]

    def to_signal(self, codes: Tensor) -> Tensor:
        """(B, 1, *grid) -> (B, C, *signal)."""
        return self.decoder(codes[:, 0])

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Refused: a bundle holds no code, and these files are code."""
        raise ValueError(
            f"{self.name}: a bundle holds weights alone; keep {self.config.encoder} and "
            f"{self.config.decoder} beside it"
        )


def _load(path: str, expected: str) -> torch.jit.ScriptModule:
    if not Path(path).is_file():
        raise ValueError(f"{path}: the file is missing")
    found = sha256(path)
    if found != expected:
        raise ValueError(f"{path}: sha256 is {found}, not {expected}: this is another file")
    return torch.jit.load(path, map_location="cpu").eval()
