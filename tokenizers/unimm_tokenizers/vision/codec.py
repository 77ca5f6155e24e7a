"""One VQ-GAN family for pictures and film (Esser et al., arXiv 2012.09841).

Convolutional encoder and decoder, normalised per position, no attention: the receptive field is
bounded and known, so tiles equal the whole. Film is causal in time, 1 + T/4 code frames for 1 + T
frames; the first frame alone is a picture and has the picture's codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor, nn

from unimm_tokenizers.codec import Codec, CodecOutput, register_codec
from unimm_tokenizers.quantize import (
    FiniteScalarQuantizer,
    Quantizer,
    ResidualVectorQuantizer,
)
from unimm_tokenizers.vision.layers import (
    ChannelNorm,
    ResidualBlock,
    TimeDown,
    TimeUp,
    pad_to_multiple,
    per_frame,
    space_down,
    space_up,
)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Shape of a vision codec.

    Space shrinks by `patch` times 2 for every multiplier after the first; time by
    `time_downsample` (1: pictures only). `fsq_levels` chooses finite scalar quantization;
    otherwise there are `codebook_size` codes: of unit length in `codebook_dim` channels (LlamaGen's
    setting), or, with None, anywhere in the latents themselves.
    """

    num_channels: int = 3
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2, 4)
    num_blocks: int = 1
    patch: int = 2
    time_downsample: int = 1
    latent_channels: int = 32
    codebook_size: int = 1024
    codebook_dim: int | None = 8
    fsq_levels: tuple[int, ...] = ()
    fps: float = 10.0  # frames per second of the films that it decodes

    def __post_init__(self) -> None:
        if self.time_downsample not in (1, 2, 4, 8):
            raise ValueError(f"time_downsample must be 1, 2, 4 or 8, got {self.time_downsample}")


@register_codec("vision")
class VisionCodec(Codec):
    """Pictures (B, C, H, W) and, with `time_downsample` above 1, films (B, C, T, H, W)."""

    config_class = VisionConfig
    config: VisionConfig

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.modalities = ("image",) if config.time_downsample == 1 else ("image", "video")
        widths = [config.channels * m for m in config.multipliers]
        pixels = config.num_channels * config.patch**2

        encoder: list[nn.Module] = [
            nn.PixelUnshuffle(config.patch),
            nn.Conv2d(pixels, widths[0], 3, padding=1),
        ]
        for width, wider in [*pairwise(widths), (widths[-1], 0)]:
            encoder += [ResidualBlock(width) for _ in range(config.num_blocks)]
            encoder += [space_down(width, wider)] if wider else []
        self.encoder = nn.Sequential(*encoder)
        halvings = config.time_downsample.bit_length() - 1
        self.time_encoder = nn.Sequential(*(TimeDown(widths[-1]) for _ in range(halvings)))
        self.to_latents = nn.Sequential(
            ChannelNorm(widths[-1]), nn.Conv2d(widths[-1], config.latent_channels, 1)
        )
        self.quantizer = _quantizer(config)
        self.from_latents = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.time_decoder = nn.Sequential(*(TimeUp(widths[-1]) for _ in range(halvings)))
        decoder: list[nn.Module] = []
        for width, narrower in [*pairwise(reversed(widths)), (widths[0], 0)]:
            # The decoder invents what the codes leave out: one block more than the encoder.
            decoder += [ResidualBlock(width) for _ in range(config.num_blocks + 1)]
            decoder += [space_up(width, narrower)] if narrower else []
        decoder += [
            ChannelNorm(widths[0]),
            nn.SiLU(),
            nn.Conv2d(widths[0], pixels, 3, padding=1),
            nn.PixelShuffle(config.patch),
        ]
        self.decoder = nn.Sequential(*decoder)

    @property
    def downsample(self) -> tuple[int, ...]:
        """(t, h, w) signal units per code; (h, w) for a codec of pictures."""
        space = self._space
        return (
            (space, space)
            if len(self.modalities) == 1
            else (self.config.time_downsample, space, space)
        )

    @property
    def _space(self) -> int:
        return self.config.patch * 2 ** (len(self.config.multipliers) - 1)

    @property
    def receptive_field(self) -> tuple[int, ...]:
        """(h, w) pixels that one code can depend on; (t, h, w) for films, earlier frames alone."""
        side = self._space + 2 * self._encoder_reach
        if len(self.modalities) == 1:
            return side, side
        frames = 1
        for _ in self.time_encoder:  # each: two causal convolutions of 3, the first with stride 2
            frames = 2 * frames + 5
        return frames, side, side

    @property
    def _encoder_reach(self) -> int:
        """Pixels beyond its own cell, on each side, that a code sees."""
        config, cell = self.config, self.config.patch
        reach = cell  # the first 3x3 convolution
        for _ in config.multipliers:
            reach += 2 * config.num_blocks * cell
            cell *= 2
        return reach

    @property
    def _decoder_reach(self) -> int:
        """Codes beyond its own cell, on each side, that a pixel sees."""
        config = self.config
        reach, cell = 1.0, 1.0  # in codes; the first 3x3 convolution
        for _ in config.multipliers:
            reach += 2 * (config.num_blocks + 1) * cell
            cell /= 2
        return int(reach + 2 * cell) + 1

    def _latents(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, t, h, w)."""
        return per_frame(self.to_latents, self.time_encoder(per_frame(self.encoder, x)))

    def _signal(self, latents: Tensor) -> Tensor:
        """(B, D, t, h, w) -> (B, C, T, H, W)."""
        hidden = self.time_decoder(per_frame(self.from_latents, latents))
        return per_frame(self.decoder, hidden)

    def _padded(self, x: Tensor) -> Tensor:
        """(B, C, [T,] H, W) -> (B, C, 1 + k * time_downsample, H', W')."""
        if x.ndim == 4:
            x = x[:, :, None]
        first, rest = x[:, :, :1], x[:, :, 1:]
        if rest.shape[2]:
            rest = pad_to_multiple(rest, self.config.time_downsample, (2,))
        return pad_to_multiple(torch.cat([first, rest], 2), self._space, (3, 4))

    def _checked(self, x: Tensor, *, film: bool = False) -> Tensor:
        x = self.check_signal(x, 3 if film else 2)
        if 0 in x.shape:
            raise ValueError(f"{self.name}: the picture or film is empty: {tuple(x.shape)}")
        return x

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, h, w), or (B, C, T, H, W) -> (B, K, t, h, w); any size."""
        x = self._checked(x, film=x.ndim == 5 and "video" in self.modalities)
        codes = self.quantizer(self._latents(self._padded(x))).codes
        return codes[:, :, 0] if x.ndim == 4 else codes

    def decode(self, codes: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """(B, K, h, w) -> (B, C, H, W), or (B, K, t, h, w) -> (B, C, T, H, W), in [-1, 1]."""
        film = codes.ndim == 5 and "video" in self.modalities
        self.check_codes(codes, 3 if film else 2)
        signal = self._signal(self.quantizer.lookup(codes if film else codes[:, :, None]))
        signal = (signal if film else signal[:, :, 0]).clamp(-1, 1)
        if size is not None:
            signal = signal[(..., *(slice(0, n) for n in size))]
        return signal

    def forward(self, x: Tensor) -> CodecOutput:
        """See `Codec.forward`; x needs sizes that the codec divides."""
        target = self._padded(x)
        quantized, codes, loss = self.quantizer(self._latents(target))
        signal = self._signal(quantized)
        if x.ndim == 4:
            return CodecOutput(signal[:, :, 0], target[:, :, 0], codes[:, :, 0], loss)
        return CodecOutput(signal, target, codes, loss)

    @torch.no_grad()
    def encode_tiled(self, x: Tensor, tile: int) -> Tensor:
        """`encode` of pictures in tiles of tile x tile pixels plus margin: the same codes.

        Args:
            x: (B, C, H, W) in [-1, 1].
            tile: side in pixels, a multiple of the spatial downsampling.

        Raises:
            ValueError: x is no picture, or tile is not a positive multiple of the downsampling.
        """
        x = self._checked(x)
        cell = self._space
        if tile < cell or tile % cell:
            raise ValueError(f"{self.name}: tile must be a multiple of {cell}, got {tile}")
        margin = -(-self._encoder_reach // cell) * cell
        x = pad_to_multiple(x, cell, (2, 3))
        height, width = x.shape[2:]
        codes = torch.empty(
            (x.shape[0], self.num_codebooks, height // cell, width // cell),
            dtype=torch.int64,
            device=x.device,
        )
        for top, left in product(range(0, height, tile), range(0, width, tile)):
            y0, x0 = max(0, top - margin), max(0, left - margin)
            part = self.encode(x[:, :, y0 : top + tile + margin, x0 : left + tile + margin])
            rows = slice(top // cell, min(top + tile, height) // cell)
            columns = slice(left // cell, min(left + tile, width) // cell)
            dy, dx = (top - y0) // cell, (left - x0) // cell
            codes[:, :, rows, columns] = part[
                :, :, dy : dy + rows.stop - rows.start, dx : dx + columns.stop - columns.start
            ]
        return codes

    @torch.no_grad()
    def decode_tiled(self, codes: Tensor, tile: int, size: tuple[int, ...] | None = None) -> Tensor:
        """`decode` of pictures in tiles of tile x tile codes plus margin: the same picture.

        Raises:
            ValueError: codes of a film, out of range, or a tile below 1.
        """
        self.check_codes(codes, 2)
        if tile < 1:
            raise ValueError(f"{self.name}: tile must be at least 1 code, got {tile}")
        cell, margin = self._space, self._decoder_reach
        rows, columns = codes.shape[2:]
        tiles: list[Tensor] = []
        for top in range(0, rows, tile):
            strip = []
            for left in range(0, columns, tile):
                y0, x0 = max(0, top - margin), max(0, left - margin)
                part = self.decode(codes[:, :, y0 : top + tile + margin, x0 : left + tile + margin])
                dy, dx = (top - y0) * cell, (left - x0) * cell
                strip.append(part[:, :, dy : dy + tile * cell, dx : dx + tile * cell])
            tiles.append(torch.cat(_cropped(strip, 3, columns * cell, tile * cell), 3))
        signal = torch.cat(_cropped(tiles, 2, rows * cell, tile * cell), 2)
        return signal if size is None else signal[:, :, : size[0], : size[1]]


def _cropped(parts: list[Tensor], axis: int, total: int, step: int) -> list[Tensor]:
    """Cut each part to its share of `total`: margins may have come along at the far edge."""
    return [
        part.narrow(axis, 0, min(step, total - number * step)) for number, part in enumerate(parts)
    ]


def _quantizer(config: VisionConfig) -> Quantizer:
    if config.fsq_levels:
        return FiniteScalarQuantizer(config.latent_channels, config.fsq_levels)
    return ResidualVectorQuantizer(
        config.latent_channels,
        config.codebook_size,
        codebook_dim=config.codebook_dim,
        cosine=config.codebook_dim is not None,
    )
