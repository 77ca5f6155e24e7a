"""One VQ-GAN family for pictures and film (Esser et al., arXiv 2012.09841).

Convolutional encoder and decoder, normalised per position, no attention: the receptive field is
bounded and known, so tiles equal the whole. Film is causal in time, 1 + T/4 code frames for 1 + T
frames; the first frame alone is a picture and has the picture's codes, and costs what one costs.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from unimm_tokenizers.codec import CodecOutput, register_codec
from unimm_tokenizers.vision.config import VisionConfig, build_quantizer
from unimm_tokenizers.vision.layers import (
    ChannelNorm,
    LeanBlock,
    ResidualBlock,
    pad_to_multiple,
    per_frame,
    space_down,
    space_up,
)
from unimm_tokenizers.vision.tiles import TiledCodec
from unimm_tokenizers.vision.time import Past, TimeDown, TimeStack, TimeUp

_BLOCKS: dict[str, type[ResidualBlock] | type[LeanBlock]] = {
    "residual": ResidualBlock,
    "lean": LeanBlock,
}


class FilmState(NamedTuple):
    """What a stream of film remembers; it belongs to the caller.

    batch: number of films. waiting: (B, C, n, H, W), frames that fill no code frame yet.
    encoder, decoder: the past of each time layer; None at the start.
    """

    batch: int
    waiting: Tensor | None
    encoder: Past | None
    decoder: Past | None


@register_codec("vision")
class VisionCodec(TiledCodec):
    """Pictures (B, C, H, W) and, with `time_downsample` above 1, films (B, C, T, H, W)."""

    config_class = VisionConfig
    config: VisionConfig

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.modalities = ("image",) if config.time_downsample == 1 else ("image", "video")
        widths = [config.channels * m for m in config.multipliers]
        pixels = config.num_channels * config.patch**2
        block = _BLOCKS[config.block]

        encoder: list[nn.Module] = [
            nn.PixelUnshuffle(config.patch),
            nn.Conv2d(pixels, widths[0], 3, padding=1),
        ]
        for width, wider in [*pairwise(widths), (widths[-1], 0)]:
            encoder += [block(width) for _ in range(config.num_blocks)]
            encoder += [space_down(width, wider)] if wider else []
        self.encoder = nn.Sequential(*encoder)
        halvings = config.time_downsample.bit_length() - 1
        self.time_encoder = TimeStack(TimeDown(widths[-1]) for _ in range(halvings))
        self.to_latents = nn.Sequential(
            ChannelNorm(widths[-1]), nn.Conv2d(widths[-1], config.latent_channels, 1)
        )
        self.quantizer = build_quantizer(config)
        self.from_latents = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.time_decoder = TimeStack(TimeUp(widths[-1]) for _ in range(halvings))
        decoder: list[nn.Module] = []
        for width, narrower in [*pairwise(reversed(widths)), (widths[0], 0)]:
            # The decoder invents what the codes leave out: one block more than the encoder.
            decoder += [block(width) for _ in range(config.num_blocks + 1)]
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
        space = self.config.space_downsample
        time = () if len(self.modalities) == 1 else (self.config.time_downsample,)
        return (*time, space, space)

    @property
    def receptive_field(self) -> tuple[int, ...]:
        """(h, w) pixels that one code can depend on; (t, h, w) for films, earlier frames alone."""
        side = self.config.space_downsample + 2 * self.encoder_reach
        if len(self.modalities) == 1:
            return side, side
        frames = 1
        for _ in self.time_encoder:  # each: two causal convolutions of 3, the first with stride 2
            frames = 2 * frames + 5
        return frames, side, side

    @property
    def encoder_reach(self) -> int:
        """See `TiledCodec.encoder_reach`."""
        config, cell = self.config, self.config.patch
        reach = cell  # the first 3x3 convolution
        for _ in config.multipliers:
            reach += 2 * config.num_blocks * cell
            cell *= 2
        return reach

    @property
    def decoder_reach(self) -> int:
        """See `TiledCodec.decoder_reach`."""
        config = self.config
        reach, cell = 1.0, 1.0  # in codes; the first 3x3 convolution
        for _ in config.multipliers:
            reach += 2 * (config.num_blocks + 1) * cell
            cell /= 2
        return int(reach + 2 * cell) + 1

    def _latents(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """(B, C, T, H, W) -> (B, D, t, h, w), and the past of what comes next."""
        hidden, kept = self.time_encoder(per_frame(self.encoder, x), past)
        return per_frame(self.to_latents, hidden), kept

    def _signal(self, latents: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """(B, D, t, h, w) -> (B, C, T, H, W), and the past of what comes next."""
        hidden, kept = self.time_decoder(per_frame(self.from_latents, latents), past)
        return per_frame(self.decoder, hidden), kept

    def _padded(self, x: Tensor) -> Tensor:
        """(B, C, [T,] H, W) -> (B, C, 1 + k * time_downsample, H', W')."""
        if x.ndim == 4:
            x = x[:, :, None]
        first, rest = x[:, :, :1], x[:, :, 1:]
        if rest.shape[2]:
            rest = pad_to_multiple(rest, self.config.time_downsample, (2,))
        return pad_to_multiple(torch.cat([first, rest], 2), self.config.space_downsample, (3, 4))

    def check_signal(self, x: Tensor, axes: int) -> Tensor:
        """See `Codec.check_signal`; also refuses what is empty."""
        x = super().check_signal(x, axes)
        if 0 in x.shape:
            raise ValueError(f"{self.name}: the picture or film is empty: {tuple(x.shape)}")
        return x

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, h, w), or (B, C, T, H, W) -> (B, K, t, h, w); any size."""
        x = self.check_signal(x, 3 if x.ndim == 5 and "video" in self.modalities else 2)
        codes = self.quantizer(self._latents(self._padded(x))[0]).codes
        return codes[:, :, 0] if x.ndim == 4 else codes

    @torch.no_grad()
    def encode_each(self, signals: Sequence[Tensor]) -> list[Tensor]:
        """`encode` of pictures (C, H, W) or films (C, T, H, W) of any sizes, those of one together.

        Returns:
            Codes (K, *grid) of each, the same as one by one.
        """
        groups: defaultdict[torch.Size, list[int]] = defaultdict(list)
        for number, signal in enumerate(signals):
            groups[signal.shape].append(number)
        codes: dict[int, Tensor] = {}
        for numbers in groups.values():
            together = self.encode(torch.stack([signals[number] for number in numbers]))
            codes.update(zip(numbers, together, strict=True))
        return [codes[number] for number in range(len(signals))]

    def decode(self, codes: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """(B, K, h, w) -> (B, C, H, W), or (B, K, t, h, w) -> (B, C, T, H, W), in [-1, 1]."""
        film = codes.ndim == 5 and "video" in self.modalities
        self.check_codes(codes, 3 if film else 2)
        signal = self.decode_latents(self.quantizer.lookup(codes)).clamp(-1, 1)
        if size is not None:
            signal = signal[(..., *(slice(0, n) for n in size))]
        return signal

    def decode_latents(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, C, H, W), or (B, D, t, h, w) -> (B, C, T, H, W), not clipped.

        Those of codes are `quantizer.lookup(codes)`; any near them will do.
        """
        film = latents.ndim == 5
        signal, _ = self._signal(latents if film else latents[:, :, None])
        return signal if film else signal[:, :, 0]

    def forward(self, x: Tensor) -> CodecOutput:
        """See `Codec.forward`; pictures and films of any size, padded as `encode` pads them."""
        target = self._padded(x)
        quantized, codes, loss = self.quantizer(self._latents(target)[0])
        signal, _ = self._signal(quantized)
        if x.ndim == 4:
            return CodecOutput(signal[:, :, 0], target[:, :, 0], codes[:, :, 0], loss)
        return CodecOutput(signal, target, codes, loss)

    def init_state(self, batch: int) -> FilmState:
        """A fresh state for `batch` parallel films.

        Raises:
            ValueError: this is a codec of pictures.
        """
        if "video" not in self.modalities:
            raise ValueError(f"{self.name}: a codec of pictures has nothing to stream")
        return FilmState(batch, None, None, None)

    @torch.no_grad()
    def encode_chunk(
        self, x: Tensor, state: FilmState, *, last: bool = False
    ) -> tuple[Tensor, FilmState]:
        """Frames (B, C, T, H, W) -> codes (B, K, code frames completed by them, h, w), next state.

        The first frame of a film is one code frame, every `time_downsample` after it are one more;
        what fills none waits in the state. `last` codes that too, the last frame repeated, as
        `encode` does: chunks then have the codes of the whole film.

        Raises:
            ValueError: x is no film for this codec, or its batch or size is not the state's.
        """
        x = self.check_signal(x, 3)
        self._check_batch(x, state)
        if state.waiting is not None:
            if state.waiting.shape[3:] != x.shape[3:]:
                raise ValueError(
                    f"{self.name}: the film is {tuple(state.waiting.shape[3:])}, the chunk "
                    f"{tuple(x.shape[3:])}"
                )
            x = torch.cat([state.waiting, x], dim=2)
        step = self.config.time_downsample
        start = state.encoder is None
        if last and start:
            x = self._padded(x)
        elif last:
            x = pad_to_multiple(x, step, (2,))
        whole = x.shape[2] - (x.shape[2] - start) % step
        ready, waiting = x[:, :, :whole], x[:, :, whole:]
        if whole == 0:
            cell = self.config.space_downsample
            grid = (0, -(-x.shape[3] // cell), -(-x.shape[4] // cell))
            codes = torch.empty((len(x), self.num_codebooks, *grid), dtype=torch.int64)
            return codes.to(x.device), state._replace(waiting=waiting)
        ready = pad_to_multiple(ready, self.config.space_downsample, (3, 4))
        latents, past = self._latents(ready, state.encoder)
        return self.quantizer(latents).codes, state._replace(waiting=waiting, encoder=past)

    @torch.no_grad()
    def decode_chunk(self, codes: Tensor, state: FilmState) -> tuple[Tensor, FilmState]:
        """Codes (B, K, t, h, w) -> their frames (B, C, T, H, W) in [-1, 1], and the next state.

        Raises:
            ValueError: not codes of this codec, or their batch is not the state's.
        """
        self.check_codes(codes, 3)
        self._check_batch(codes, state)
        signal, past = self._signal(self.quantizer.lookup(codes), state.decoder)
        return signal.clamp(-1, 1), state._replace(decoder=past)

    def _check_batch(self, x: Tensor, state: FilmState) -> None:
        if len(x) != state.batch:
            raise ValueError(
                f"{self.name}: the state holds {state.batch} films, the chunk {len(x)}"
            )

    def inflate(self, time_downsample: int, fps: float = 10.0) -> Self:
        """A codec of films with this picture codec's weights: pictures keep their codes.

        Its time layers start at zero: each code frame is that of its last frame, and decodes to a
        still; training goes on from there.

        Raises:
            ValueError: this is a codec of films already, or time_downsample is not 2, 4 or 8.
        """
        if "video" in self.modalities or time_downsample == 1:
            raise ValueError(f"{self.name}: only a codec of pictures becomes one of films")
        config = dataclasses.replace(self.config, time_downsample=time_downsample, fps=fps)
        codec = type(self)(config)
        missing, unknown = codec.load_state_dict(self.state_dict(), strict=False)
        assert not unknown
        assert all(name.startswith("time_") for name in missing)
        codec.time_encoder.clear()
        codec.time_decoder.clear()
        return codec.train(self.training)
