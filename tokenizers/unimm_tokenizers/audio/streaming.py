"""Exact streaming for causal codecs: the caller owns the state.

A codec whose receptive field is bounded gives the same codes for a chunk as for the whole sound
if the chunk comes with enough of its past. The state keeps just that past.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unimm_tokenizers.codec import Codec


class StreamState(NamedTuple):
    """What a stream remembers.

    samples: (B, C, n) the encoder's past and what does not fill a frame yet.
    ready: code frames at the head of `samples` that have been given out.
    codes: (B, K, m) the decoder's past.
    """

    samples: Tensor
    ready: int
    codes: Tensor


def pad_frames(x: Tensor, hop: int) -> Tensor:
    """Pad (B, C, T) with silence to a whole number of frames."""
    return F.pad(x, (0, -x.shape[-1] % hop))


class StreamingCodec(Codec):
    """A codec of one causal time axis."""

    @property
    @abstractmethod
    def encoder_context(self) -> int:
        """Code frames of past samples that the encoder needs."""

    @property
    @abstractmethod
    def decoder_context(self) -> int:
        """Past code frames that the decoder needs."""

    def init_state(self, batch: int) -> StreamState:
        """A fresh state for `batch` parallel streams."""
        device = next(self.parameters()).device
        samples = torch.zeros(batch, self.num_channels, 0, device=device)
        codes = torch.zeros(batch, self.num_codebooks, 0, dtype=torch.int64, device=device)
        return StreamState(samples, 0, codes)

    @torch.no_grad()
    def encode_chunk(self, x: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """(B, C, T) of any length -> codes (B, K, frames completed by it), and the next state.

        The end of a sound that fills no frame stays in the state: add silence to get it coded.

        Raises:
            ValueError: x is no signal for this codec, or its batch is not the state's.
        """
        hop = self.downsample[0]
        x = self.check_signal(x, 1)
        self._check_batch(x, state)
        samples = torch.cat([state.samples, x], dim=-1)
        frames = samples.shape[-1] // hop
        codes = self.encode(samples[..., : frames * hop])[..., state.ready :]
        keep = min(frames, self.encoder_context)
        return codes, state._replace(samples=samples[..., (frames - keep) * hop :], ready=keep)

    @torch.no_grad()
    def decode_chunk(self, codes: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """Codes (B, K, T) -> samples (B, C, T * hop), and the next state.

        Raises:
            ValueError: not codes of this codec, or their batch is not the state's.
        """
        hop = self.downsample[0]
        self.check_codes(codes, 1)
        self._check_batch(codes, state)
        past = state.codes.shape[-1]
        known = torch.cat([state.codes, codes], dim=-1)
        signal = self.decode(known)[..., past * hop :]
        keep = min(known.shape[-1], self.decoder_context)
        return signal, state._replace(codes=known[..., known.shape[-1] - keep :])

    def _check_batch(self, x: Tensor, state: StreamState) -> None:
        if len(x) != len(state.samples):
            raise ValueError(
                f"{self.name}: the state holds {len(state.samples)} streams, the chunk {len(x)}"
            )
