"""What a sound codec does with silence, nonsense, too little, too much, and the wrong codes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from unimm_tokenizers.audio import (
    SoundStreamCodec,
    SoundStreamConfig,
    SpectralCodec,
    SpectralConfig,
    StreamingCodec,
)

LEVELS: dict[str, Any] = {"latent_channels": 8, "num_codebooks": 2, "codebook_size": 16}


def waves(channels: int = 1) -> StreamingCodec:
    return SoundStreamCodec(
        SoundStreamConfig(
            sample_rate=1000, num_channels=channels, channels=4, strides=(2, 4), **LEVELS
        )
    )


def spectra(channels: int = 1) -> StreamingCodec:
    return SpectralCodec(
        SpectralConfig(
            sample_rate=1000,
            num_channels=channels,
            window=32,
            hop=8,
            downsample=2,
            channels=8,
            num_blocks=1,
            **LEVELS,
        )
    )


@pytest.fixture(params=[waves, spectra])
def codec(request: pytest.FixtureRequest) -> StreamingCodec:
    return request.param().eval()


def tone(samples: int, channels: int = 1) -> Tensor:
    return 0.4 * torch.sin(torch.arange(samples) / 3).expand(1, channels, -1)


@torch.no_grad()
def test_silence_is_coded_and_has_one_code_after_its_beginning(codec: StreamingCodec) -> None:
    codes = codec.encode(torch.zeros(1, 1, 400))
    settled = codes[..., 20:]
    assert bool((settled == settled[..., :1]).all())
    assert torch.isfinite(codec.decode(codes)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_before_a_stream_takes_it(
    codec: StreamingCodec, bad: float
) -> None:
    x = tone(100)
    x = torch.where(torch.arange(100) == 50, bad, x)
    state = codec.init_state(1)
    for call in (codec.encode, lambda x: codec.encode_chunk(x, state)):
        with pytest.raises(ValueError, match="the signal holds NaN or infinite values"):
            call(x)
    codes, _ = codec.encode_chunk(tone(100), state)  # the state was not touched
    hop = codec.downsample[0]
    assert torch.equal(codes, codec.encode(tone(100 // hop * hop)))


def test_clipping_is_refused_and_full_scale_is_not(codec: StreamingCodec) -> None:
    with pytest.raises(ValueError, match=r"expected values in \[-1, 1\], found up to 1.2"):
        codec.encode(3 * tone(100))
    square = tone(100).sign()
    assert codec.encode(square).shape[-1] == -(-100 // codec.downsample[0])


@torch.no_grad()
def test_nothing_and_one_sample(codec: StreamingCodec) -> None:
    none = codec.encode(torch.zeros(2, 1, 0))
    assert none.shape == (2, 2, 0)
    assert codec.decode(none).shape == (2, 1, 0)
    one = codec.encode(torch.full((1, 1, 1), 0.5))
    assert one.shape == (1, 2, 1)
    assert codec.decode(one, (1,)).shape == (1, 1, 1)
    # In a stream a sample waits for its frame.
    codes, state = codec.encode_chunk(torch.full((1, 1, 1), 0.5), codec.init_state(1))
    assert codes.shape == (1, 2, 0)
    assert state.waiting.shape == (1, 1, 1)


@pytest.mark.parametrize("shape", [(1, 3, 100), (1, 2, 100), (100,), (1, 100), (1, 1, 1, 100)])
def test_other_channels_and_axes_are_refused(codec: StreamingCodec, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a signal \(batch, 1 channels, 1 signal axes\)"):
        codec.encode(torch.zeros(shape))


def test_whole_numbers_are_no_sound(codec: StreamingCodec) -> None:
    with pytest.raises(ValueError, match=r"expected a float signal in \[-1, 1\], got torch.int16"):
        codec.encode(torch.zeros(1, 1, 100, dtype=torch.int16))


@torch.no_grad()
@pytest.mark.parametrize("make", [waves, spectra])
def test_stereo_is_coded_as_one_and_keeps_its_sides(make: Any) -> None:
    codec = make(2).train()
    codec(torch.cat([tone(800), 0.1 * torch.randn(1, 1, 800)], dim=1))
    codec.eval()
    x = torch.cat([tone(160), 0.2 * torch.randn(1, 1, 160)], dim=1)
    codes = codec.encode(x)
    assert codes.shape == (1, 2, 160 // codec.downsample[0])
    assert codec.decode(codes).shape == x.shape
    assert not torch.equal(codec.encode(x.flip(1)), codes)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 3, 5, dtype=torch.int64), r"expected codes \(batch, 2 levels"),
        (torch.zeros(1, 1, 5, dtype=torch.int64), r"expected codes \(batch, 2 levels"),
        (torch.zeros(2, 5, dtype=torch.int64), r"expected codes \(batch, 2 levels"),
        (torch.full((1, 2, 5), 16), "codes must lie in 0 to 15, found 16 to 16"),
        (torch.full((1, 2, 5), -1), "codes must lie in 0 to 15, found -1 to -1"),
        (torch.zeros(1, 2, 5), "expected codes of int64, got torch.float32"),
    ],
    ids=["too many levels", "too few", "no levels", "too high", "padding", "float"],
)
def test_codes_of_another_codec_are_refused(
    codec: StreamingCodec, codes: Tensor, message: str
) -> None:
    for call in (codec.decode, lambda c: codec.decode_chunk(c, codec.init_state(len(c)))):
        with pytest.raises(ValueError, match=message):
            call(codes)


@torch.no_grad()
def test_a_state_does_not_grow(codec: StreamingCodec) -> None:
    """What is kept is as large after two chunks as after many, and after small ones as after large.

    A stream of hours needs no more memory than one of seconds.
    """

    def size(held: Any) -> int:
        if isinstance(held, Tensor):
            return held.untyped_storage().nbytes()
        return sum(map(size, held)) if isinstance(held, tuple) else 0

    hop = codec.downsample[0]
    state, sizes = codec.init_state(1), []
    for frames in [8] * 12 + [1, 100, 8]:
        codes, state = codec.encode_chunk(tone(frames * hop), state)
        _, state = codec.decode_chunk(codes, state)
        sizes.append(size(state))
    assert max(sizes[6:]) <= max(sizes[2:6])
