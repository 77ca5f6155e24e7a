"""Causal sound codecs, whole or as exact streams: the caller owns the state.

Every layer of such a codec can go on from where it stopped, so chunks have the codes and samples of
the whole sound at the cost of the whole sound, and memory does not grow.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unimm_tokenizers.audio.config import SoundConfig
from unimm_tokenizers.audio.layers import Past, tail
from unimm_tokenizers.codec import Codec, CodecOutput


class StreamState(NamedTuple):
    """What a stream remembers.

    waiting: (B, C, n) samples that do not fill a frame yet.
    encoder, decoder: pasts of the layers; None before the first frame.
    """

    waiting: Tensor
    encoder: Past | None
    decoder: Any


def pad_frames(x: Tensor, hop: int) -> Tensor:
    """Pad (B, C, T) with silence to a whole number of frames."""
    return F.pad(x, (0, -x.shape[-1] % hop))


class StreamingCodec(Codec):
    """A codec of one causal time axis: sound (B, C, T) <-> codes (B, K, T / hop)."""

    config: SoundConfig
    modalities = ("audio",)

    @property
    def num_codebooks(self) -> int:
        """K, the number of code levels in use; fewer can be set, which lowers the bitrate.

        What is saved has as many levels as are set.
        """
        return self.quantizer.num_codebooks

    @num_codebooks.setter
    def num_codebooks(self, count: int) -> None:
        if not 1 <= count <= self.config.num_codebooks:
            raise ValueError(
                f"{self.name}: num_codebooks must lie in 1 to {self.config.num_codebooks}, "
                f"got {count}"
            )
        self.quantizer.num_codebooks = count

    @property
    def bitrate(self) -> float:
        """Bits per second of sound, by the number of levels in use."""
        assert self.frame_rate is not None
        return self.frame_rate * self.num_codebooks * math.log2(self.codebook_size)

    @property
    def decoder_delay(self) -> int:
        """Samples by which `decode_chunk` lags behind the codes that it is given."""
        return 0

    @property
    def latency(self) -> int:
        """Samples from a sample's arrival at the encoder to its leaving the decoder, at most."""
        return self.downsample[0] + self.decoder_delay

    @abstractmethod
    def latents(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """Whole frames of sound (B, C, n * hop) behind `past` -> (B, D, n), and the next past."""

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, K, n) -> quantized latents (B, D, n), as `signal` wants them."""
        return self.quantizer.lookup(codes)

    @abstractmethod
    def signal(self, latents: Tensor, past: Any, *, last: bool) -> tuple[Tensor, Any]:
        """Quantized (B, D, n) behind `past` -> samples that are final, and the next past."""

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, K, ceil(T / hop)); the tail is padded with silence."""
        x = pad_frames(self.check_signal(x, 1), self.downsample[0])
        return self._codes(x, None)[0]

    def decode(self, codes: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """(B, K, T) -> (B, C, T * hop) in [-1, 1]."""
        self.check_codes(codes, 1)
        if not codes.shape[-1]:
            return torch.zeros((codes.shape[0], self.num_channels, 0), device=codes.device)
        signal, _ = self.signal(self.lookup(codes), None, last=True)
        return signal if size is None else signal[..., : size[0]]

    def _codes(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past | None]:
        if not x.shape[-1]:
            shape = (x.shape[0], self.num_codebooks, 0)
            return torch.empty(shape, dtype=torch.int64, device=x.device), past
        latents, kept = self.latents(x, past)
        return self.quantizer.nearest(latents), kept

    def init_state(self, batch: int) -> StreamState:
        """A fresh state for `batch` parallel streams."""
        parameter = next(self.parameters())
        return StreamState(parameter.new_zeros(batch, self.num_channels, 0), None, None)

    @torch.no_grad()
    def encode_chunk(self, x: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """(B, C, T) of any length -> codes (B, K, frames completed by it), and the next state.

        The end of a sound that fills no frame stays in the state: add silence to get it coded.

        Raises:
            ValueError: x is no signal for this codec, or its batch is not the state's.
        """
        x = self.check_signal(x, 1)
        self._check_batch(x, state)
        samples = torch.cat([state.waiting, x], dim=-1)
        rest = samples.shape[-1] % self.downsample[0]
        whole = samples.shape[-1] - rest
        codes, past = self._codes(samples[..., :whole], state.encoder)
        return codes, state._replace(waiting=tail(samples, rest), encoder=past)

    @torch.no_grad()
    def decode_chunk(
        self, codes: Tensor, state: StreamState, *, last: bool = False
    ) -> tuple[Tensor, StreamState]:
        """Codes (B, K, n) -> the samples (B, C, m) that are final with them, and the next state.

        All chunks of a stream together are `decoder_delay` samples short of `decode` of the whole,
        until the `last` one, which may have no codes, gives out the rest and ends the stream.

        Raises:
            ValueError: not codes of this codec, or their batch is not the state's.
        """
        self.check_codes(codes, 1)
        self._check_batch(codes, state)
        if not codes.shape[-1] and (state.decoder is None or not last):
            empty = torch.zeros((codes.shape[0], self.num_channels, 0), device=codes.device)
            return empty, state
        signal, past = self.signal(self.lookup(codes), state.decoder, last=last)
        return signal, state._replace(decoder=past)

    def forward(self, x: Tensor) -> CodecOutput:
        """See `Codec.forward`; compares waveforms."""
        target = pad_frames(x, self.downsample[0])
        latents, _ = self.latents(target, None)
        quantized, codes, loss = self.quantizer(latents)
        signal, _ = self.signal(quantized, None, last=True)
        return CodecOutput(signal, target, codes, loss, latents)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """See `Codec.save_pretrained`; levels that are not in use stay behind."""
        if self.num_codebooks == self.config.num_codebooks:
            super().save_pretrained(folder, dtype)
            return
        config = dataclasses.replace(self.config, num_codebooks=self.num_codebooks)
        smaller = type(self)(config)
        kept = {k: v for k, v in self.state_dict().items() if not k.startswith("quantizer.")}
        own = self.quantizer.first_levels(self.num_codebooks)
        smaller.load_state_dict({**kept, **{f"quantizer.{k}": v for k, v in own.items()}})
        smaller.save_pretrained(folder, dtype)

    def _check_batch(self, x: Tensor, state: StreamState) -> None:
        if len(x) != len(state.waiting):
            raise ValueError(
                f"{self.name}: the state holds {len(state.waiting)} streams, the chunk {len(x)}"
            )
