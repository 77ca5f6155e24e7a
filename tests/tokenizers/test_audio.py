"""Sound codecs: streams equal the whole, nothing sees the future, fields are what they say."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unimm_tokenizers.audio import (
    SoundStreamCodec,
    SoundStreamConfig,
    SpectralCodec,
    SpectralConfig,
)
from unimm_tokenizers.audio.phase import LOOKAHEAD
from unimm_tokenizers.audio.spectral import scaled, unscaled

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"strides": (2, 4), "dilations": (1, 3), "num_codebooks": 2},
    "odd": {"strides": (3, 5), "dilations": (1,), "num_codebooks": 3},
    "one stride": {"strides": (4,), "dilations": (1, 3, 9), "num_codebooks": 1},
    "stereo": {"strides": (2, 2, 2), "dilations": (1,), "num_channels": 2, "num_codebooks": 2},
}


def tone(channels: int, samples: int, batch: int = 1) -> Tensor:
    """Not noise alone: sines that come and go, as sound does."""
    time = torch.arange(samples) / 100
    pitch = torch.rand(batch, channels, 1) * 20 + 2
    sound = 0.5 * torch.sin(pitch * time) * torch.sin(0.3 * pitch * time)
    return (sound + 0.2 * torch.randn(batch, channels, samples)).clamp(-1, 1)


def soundstream(**options: Any) -> SoundStreamCodec:
    """After one training pass, which fits the codebooks to what the encoder gives out."""
    config = SoundStreamConfig(
        sample_rate=1000, channels=8, latent_channels=8, codebook_size=32, **options
    )
    codec = SoundStreamCodec(config).train()
    with torch.no_grad():
        codec(tone(config.num_channels, 600, batch=4))
    return codec.eval()


@pytest.fixture(params=SHAPES)
def codec(request: pytest.FixtureRequest) -> SoundStreamCodec:
    return soundstream(**SHAPES[request.param])


@pytest.fixture
def spectral() -> SpectralCodec:
    shape: dict[str, Any] = {"sample_rate": 1000, "window": 32, "hop": 8, "downsample": 2}
    levels: dict[str, Any] = {"latent_channels": 8, "num_codebooks": 2, "codebook_size": 32}
    config = SpectralConfig(channels=16, num_blocks=2, **shape, **levels)
    codec = SpectralCodec(config).train()
    with torch.no_grad():
        codec(tone(1, 1600, batch=4))
    return codec.eval()


# Streaming


def chunks_of(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 7, 40, 333, 10_000])
def test_streamed_codes_are_the_whole(codec: SoundStreamCodec, size: int) -> None:
    hop = codec.downsample[0]
    total = (codec.receptive_field[0] + 200) // hop * hop
    x = tone(codec.num_channels, total, batch=2)
    if size == 1:  # one sample at a time only where it matters: behind a beginning
        slices = [
            slice(0, total - 3 * hop),
            *(slice(i, i + 1) for i in range(total - 3 * hop, total)),
        ]
    else:
        slices = chunks_of(total, size)
    state, parts, seen = codec.init_state(2), [], 0
    for part in slices:
        codes, state = codec.encode_chunk(x[..., part], state)
        parts.append(codes)
        seen = part.stop
        assert sum(p.shape[-1] for p in parts) == seen // hop  # every whole frame, at once
        assert state.waiting.shape[-1] < hop  # bounded memory, with `test_a_state_does_not_grow`
    whole = codec.encode(x)
    assert len(whole.unique()) > 4
    assert int((torch.cat(parts, -1) != whole).sum()) == 0


@torch.no_grad()
@given(sizes=st.lists(st.integers(0, 60), max_size=30))
@settings(max_examples=30)
def test_any_chunks_make_the_whole(streamed: SoundStreamCodec, sizes: list[int]) -> None:
    hop = streamed.downsample[0]
    x = tone(1, sum(sizes))
    state, parts = streamed.init_state(1), [torch.zeros(1, 2, 0, dtype=torch.int64)]
    for part in x.split(sizes, -1):
        codes, state = streamed.encode_chunk(part, state)
        parts.append(codes)
    whole = streamed.encode(x[..., : sum(sizes) // hop * hop])
    assert torch.equal(torch.cat(parts, -1), whole)


@pytest.fixture(scope="module")
def streamed() -> SoundStreamCodec:
    return soundstream(**SHAPES["small"])


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, 17, 10_000])
def test_streamed_samples_are_the_whole(codec: SoundStreamCodec, size: int) -> None:
    total = 60
    codes = torch.randint(codec.codebook_size, (2, codec.num_codebooks, total))
    state, parts = codec.init_state(2), []
    for part in chunks_of(total, size):
        signal, state = codec.decode_chunk(codes[..., part], state)
        assert signal.shape[-1] == (part.stop - part.start) * codec.downsample[0]
        parts.append(signal)
    torch.testing.assert_close(torch.cat(parts, -1), codec.decode(codes), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_stream_takes_nothing_and_its_state_is_the_callers(codec: SoundStreamCodec) -> None:
    """An old state can be gone on from again: nothing hides in the codec."""
    hop, channels = codec.downsample[0], codec.num_channels
    x = tone(channels, 8 * hop)
    state = codec.init_state(1)
    codes, state = codec.encode_chunk(x[..., : 3 * hop + 1], state)
    assert codes.shape[-1] == 3
    none, same = codec.encode_chunk(x[..., :0], state)
    assert none.shape == (1, codec.num_codebooks, 0)
    once, _ = codec.encode_chunk(x[..., 3 * hop + 1 :], state)
    codec.encode_chunk(tone(channels, 50), codec.init_state(1))
    twice, _ = codec.encode_chunk(x[..., 3 * hop + 1 :], same)
    assert torch.equal(once, twice)
    assert torch.equal(torch.cat([codes, once], -1), codec.encode(x))
    signal, _ = codec.decode_chunk(codes[..., :0], codec.init_state(1))
    assert signal.shape == (1, channels, 0)


def test_bad_chunks_are_refused(codec: SoundStreamCodec) -> None:
    state = codec.init_state(2)
    x = tone(codec.num_channels, 20, batch=2)
    codes = torch.zeros(2, codec.num_codebooks, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected values in"):
        codec.encode_chunk(x + 9, state)
    with pytest.raises(ValueError, match="NaN or infinite"):
        codec.encode_chunk(x * torch.nan, state)
    with pytest.raises(ValueError, match="expected a signal"):
        codec.encode_chunk(x[:, :0], state)
    with pytest.raises(ValueError, match="the state holds 2 streams, the chunk 1"):
        codec.encode_chunk(x[:1], state)
    with pytest.raises(ValueError, match="codes must lie in"):
        codec.decode_chunk(codes - 1, state)
    with pytest.raises(ValueError, match="the state holds 2 streams, the chunk 1"):
        codec.decode_chunk(codes[:1], state)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 5, 120])
def test_streamed_spectra_are_the_whole_bit_for_bit(spectral: SpectralCodec, size: int) -> None:
    """The search for phases makes another sound of any rounding error, so there may be none."""
    x = tone(1, 120 * spectral.downsample[0], batch=2)
    whole = spectral.encode(x)
    state, codes, signals = spectral.init_state(2), [], []
    for chunk in x.split(size * spectral.downsample[0], dim=2):
        part, state = spectral.encode_chunk(chunk, state)
        signal, state = spectral.decode_chunk(part, state)
        codes.append(part)
        signals.append(signal)
        ready = sum(part.shape[-1] for part in codes) * spectral.downsample[0]
        assert sum(each.shape[-1] for each in signals) == max(0, ready - spectral.decoder_delay)
    rest, _ = spectral.decode_chunk(whole[..., :0], state, last=True)
    assert rest.shape[-1] == spectral.decoder_delay
    assert torch.equal(torch.cat(codes, -1), whole)
    assert torch.equal(torch.cat([*signals, rest], -1), spectral.decode(whole))


@torch.no_grad()
def test_streams_by_turns_are_those_alone(codec: SoundStreamCodec, spectral: SpectralCodec) -> None:
    for each in (codec, spectral):
        hop, channels = each.downsample[0], each.num_channels
        sounds = [tone(channels, 12 * hop) for _ in range(3)]
        states = [each.init_state(1) for _ in sounds]
        parts: list[list[Tensor]] = [[] for _ in sounds]
        for start in range(0, 12 * hop, 4 * hop):
            for number, x in enumerate(sounds):
                codes, states[number] = each.encode_chunk(
                    x[..., start : start + 4 * hop], states[number]
                )
                signal, states[number] = each.decode_chunk(codes, states[number])
                parts[number].append(signal)
        for x, made in zip(sounds, parts, strict=True):
            joined = torch.cat(made, dim=-1)
            alone = each.decode(each.encode(x))[..., : joined.shape[-1]]
            torch.testing.assert_close(joined, alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_batch_of_different_lengths_is_coded_as_one_by_one(
    codec: SoundStreamCodec, spectral: SpectralCodec
) -> None:
    for each in (codec, spectral):
        hop = each.downsample[0]
        sounds = [tone(each.num_channels, length) for length in (3 * hop, 20 * hop, 11 * hop)]
        padded = torch.cat(
            [torch.nn.functional.pad(x, (0, 20 * hop - x.shape[-1])) for x in sounds]
        )
        together = each.encode(padded)
        made = each.decode(together)
        for row, x in enumerate(sounds):
            alone = each.encode(x)
            frames = alone.shape[-1]
            assert torch.equal(together[row : row + 1, :, :frames], alone)
            sure = frames * hop - each.decoder_delay  # what follows can't be heard any earlier
            expected = each.decode(alone)[..., :sure]
            torch.testing.assert_close(made[row : row + 1, :, :sure], expected, rtol=0, atol=1e-5)


def test_latency_is_a_frame_and_the_decoders_delay(
    codec: SoundStreamCodec, spectral: SpectralCodec
) -> None:
    assert codec.latency == codec.downsample[0]
    # One frame; a window's overlap; three hops of look-ahead.
    assert spectral.latency == 16 + (32 - 8) + 3 * 8


# Causality and receptive fields


@torch.no_grad()
def test_later_samples_change_no_earlier_code(
    codec: SoundStreamCodec, spectral: SpectralCodec
) -> None:
    for each in (codec, spectral):
        hop = each.downsample[0]
        x = tone(each.num_channels, 20 * hop)
        codes = each.encode(x)
        for frames in (1, 7, 19):
            changed = x.clone()
            changed[..., frames * hop :] = tone(each.num_channels, (20 - frames) * hop)
            assert torch.equal(each.encode(changed)[..., :frames], codes[..., :frames])
            assert torch.equal(each.encode(x[..., : frames * hop]), codes[..., :frames])


@torch.no_grad()
def test_later_codes_change_no_earlier_sample(codec: SoundStreamCodec) -> None:
    hop = codec.downsample[0]
    codes = torch.randint(codec.codebook_size, (1, codec.num_codebooks, 20))
    whole = codec.decode(codes)
    for frames in (1, 7, 19):
        part = codec.decode(codes[..., :frames])
        torch.testing.assert_close(part, whole[..., : frames * hop], rtol=0, atol=1e-5)


@torch.no_grad()
def test_spectral_decoding_waits_for_its_window_and_look_ahead(spectral: SpectralCodec) -> None:
    config, hop = spectral.config, spectral.downsample[0]
    codes = spectral.encode(tone(1, 20 * hop))
    whole = spectral.decode(codes)
    late = config.window - config.hop + LOOKAHEAD * config.hop
    for frames in (5, 12):
        part = spectral.decode(codes[..., :frames])
        sure = frames * hop - late
        assert sure > 0
        torch.testing.assert_close(part[..., :sure], whole[..., :sure], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_code_sees_no_further_back_than_it_says(
    codec: SoundStreamCodec, spectral: SpectralCodec
) -> None:
    for each in (codec, spectral):
        hop, (field,) = each.downsample[0], each.receptive_field
        total = (field // hop + 4) * hop
        x = tone(each.num_channels, total)
        first = total - field
        changed = x.clone()
        changed[..., :first] = tone(each.num_channels, first)

        def latents(sound: Tensor, each: SoundStreamCodec | SpectralCodec = each) -> Tensor:
            if isinstance(each, SpectralCodec):
                sound = scaled(each.log_magnitudes(sound))
            return each.encoder(sound)[..., -1]

        assert torch.allclose(latents(changed), latents(x), atol=1e-5)
        assert torch.equal(each.encode(changed)[..., -1], each.encode(x)[..., -1])
        # Hann's window is zero at its first sample: of the spectral field the next one counts.
        touched = x.clone()
        touched[..., first : first + 2] = 1 - touched[..., first : first + 2].abs()
        assert not torch.equal(latents(touched), latents(x))


# The spectral codec


@torch.no_grad()
def test_log_magnitudes_are_those_of_the_frames(spectral: SpectralCodec) -> None:
    config = spectral.config
    x = tone(1, 160)
    log = spectral.log_magnitudes(x)
    assert log.shape == (1, 17, 20)
    frame = x[0, 0, 12 * config.hop - config.window : 12 * config.hop]
    expected = torch.fft.rfft(frame * torch.hann_window(config.window)).abs().clamp(min=1e-3).log()
    torch.testing.assert_close(log[0, :, 11], expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_silence_is_the_floor_and_back(spectral: SpectralCodec) -> None:
    log = spectral.log_magnitudes(torch.zeros(1, 1, 160))
    assert torch.allclose(log, torch.tensor(1e-3).log())
    torch.testing.assert_close(unscaled(scaled(log)), log)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 100])
def test_lengths(spectral: SpectralCodec, codec: SoundStreamCodec, size: int) -> None:
    for each in (spectral, codec):
        x = tone(each.num_channels, size)
        codes = each.encode(x)
        assert codes.shape[-1] == -(-size // each.downsample[0])
        assert each.decode(codes, (size,)).shape == x.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_channels": 3}, "num_channels must be 1 or 2, got 3"),
        ({"window": 100, "hop": 30}, r"window \(100\) must be a multiple of hop, at least twice"),
        ({"window": 80, "hop": 80}, "at least twice it"),
    ],
)
def test_impossible_spectra_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectralConfig(**options)
