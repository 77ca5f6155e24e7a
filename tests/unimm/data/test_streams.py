import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from torch import Tensor

from unimm.data.media import MediaError, OpenMedia, decode, open_media
from unimm.data.streams import Streaming, chosen_frames, encode_long, resampled
from unimm.data.templates import Template
from unimm.data.tokenize import tokenize_shard
from unimm.signals import Video
from unimm.tokenizer import UnifiedTokenizer, audio_signal, video_signal
from unimm_tokenizers.audio import SoundStreamCodec, SoundStreamConfig
from unimm_tokenizers.codec import Codec


def wav(seconds: float, rate: int = 8000, channels: int = 1) -> bytes:
    random = np.random.default_rng(0)
    stream = io.BytesIO()
    noise = random.normal(0, 0.1, (int(seconds * rate), channels))
    soundfile.write(stream, noise.astype(np.float32), rate, format="WAV", subtype="PCM_16")
    return stream.getvalue()


@pytest.fixture(scope="module")
def codec() -> SoundStreamCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = SoundStreamConfig(
            sample_rate=8000,
            channels=4,
            strides=(2, 4, 5),
            dilations=(1, 3),
            latent_channels=8,
            num_codebooks=2,
            codebook_size=32,
        )
        return SoundStreamCodec(config).eval()


def blocks_of(signal: Tensor, size: int, axis: int) -> list[Tensor]:
    return list(signal.split(size, axis))


@pytest.mark.parametrize("size", [100, 777, 5000])
@pytest.mark.parametrize(("rate", "target"), [(44100, 16000), (8000, 24000), (16000, 8000)])
def test_blocks_are_resampled_as_the_whole(rate: int, target: int, size: int) -> None:
    sound = torch.randn(2, 6001, generator=torch.Generator().manual_seed(0))
    whole = torchaudio.functional.resample(sound, rate, target)
    made = torch.cat(list(resampled(blocks_of(sound, size, 1), rate, target)), dim=1)
    assert made.shape == whole.shape
    assert (made - whole).abs().max() < 1e-5


@pytest.mark.parametrize("frames", [1, 2, 7, 30, 31])
@pytest.mark.parametrize(("fps", "rate"), [(20.0, 10.0), (10.0, 24.0), (29.97, 10.0), (10.0, 10.0)])
def test_the_same_frames_are_chosen_in_blocks(
    frames: int, fps: float, rate: float, tokenizer: Any
) -> None:
    film = torch.arange(frames, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 2, 3)
    codec = tokenizer.codecs["video"]
    scale = rate / codec.config.fps  # the codec's own rate is fixed: bring both to it
    whole = video_signal(Video(film.contiguous(), fps / scale), codec)
    for size in (1, 3, 100):
        parts = chosen_frames(blocks_of(film, size, 0), fps / scale, codec.config.fps)
        made = torch.cat([video_signal(Video(p, codec.config.fps), codec) for p in parts], 1)
        assert torch.equal(made, whole)


@pytest.mark.parametrize("samples", [1, 39, 40, 41, 8001])
def test_a_long_sound_has_the_codes_of_the_whole(
    codec: SoundStreamCodec, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimm.data.streams.BLOCK_VALUES", 333)
    data = wav(samples / 8000)
    whole = codec.encode(audio_signal(decode("wav", data, ""), codec)[None])[0]
    codes = encode_long(open_media("wav", data, ""), codec)
    assert codes.shape == whole.shape
    assert torch.equal(codes, whole)


def test_a_long_sound_of_another_rate_has_nearly_the_codes_of_the_whole(
    codec: SoundStreamCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimm.data.streams.BLOCK_VALUES", 5000)
    data = wav(2.0, 44100, 2)
    whole = codec.encode(audio_signal(decode("wav", data, ""), codec)[None])[0]
    codes = encode_long(open_media("wav", data, ""), codec)
    assert codes.shape == whole.shape
    assert (codes == whole).float().mean() > 0.999


def test_memory_is_bounded_by_the_block(codec: SoundStreamCodec) -> None:
    """No block of a sound of 40 million samples is longer than asked for."""
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", 8000, 1, format="FLAC") as file:
        for _ in range(20):
            file.write(np.zeros(2_000_000, dtype=np.int16))
    media = open_media("flac", stream.getvalue(), "")
    lengths = [block.shape[1] for block in media.blocks(1 << 20)]
    assert max(lengths) == 1 << 20
    assert sum(lengths) == media.reader.values == 40_000_000


def test_a_damaged_end_is_found_while_streaming(codec: SoundStreamCodec) -> None:
    stream = io.BytesIO()
    soundfile.write(stream, np.random.default_rng(0).normal(0, 0.1, 40000), 8000, format="MP3")
    data = stream.getvalue()
    media = open_media("mp3", data[: len(data) * 2 // 3], "a.tar: sample 7")
    with pytest.raises(MediaError, match=r"a\.tar: sample 7: \.mp3: cut: \d+ of \d+ samples"):
        encode_long(media, codec)


def test_what_is_no_sound_or_film_is_not_opened() -> None:
    with pytest.raises(MediaError, match=r"\.txt is no sound or film"):
        open_media("txt", b"seven", "")
    with pytest.raises(MediaError, match="a sound of 36000 s; at most 14400"):
        open_media("wav", silence(36000, 1000), "")


def silence(seconds: int, rate: int) -> bytes:
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", rate, 1, format="WAV", subtype="PCM_U8") as file:
        file.write(np.zeros(seconds * rate, dtype=np.int16))
    return stream.getvalue()


def test_films_are_opened_with_their_size(make: Any) -> None:
    media = open_media("gif", make.gif(0, frames=5, milliseconds=40), "")
    assert isinstance(media, OpenMedia)
    assert (media.modality, media.reader.values) == ("video", 3 * 5 * 16 * 16)
    assert [len(block) for block in media.blocks(2)] == [2, 2, 1]
    assert math.isclose(media.reader.fps, 25)  # type: ignore[union-attr]


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 11])
def test_a_long_film_has_the_codes_of_the_whole(
    make: Any, tokenizer: Any, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimm.data.streams.BLOCK_VALUES", 3 * 16 * 16 * 2)
    codec: Codec = tokenizer.codecs["video"]
    assert isinstance(tokenizer.codecs["video"], Streaming)
    for milliseconds in (100, 40):  # the codec's rate, and another
        data = make.gif(0, frames=frames, milliseconds=milliseconds)
        with torch.no_grad():
            whole = codec.encode(video_signal(decode("gif", data, ""), codec)[None])[0]
        codes = encode_long(open_media("gif", data, ""), codec)
        assert torch.equal(codes, whole)


def test_shards_of_long_media_have_the_bytes_of_short_ones(
    make: Any, tokenizer: Any, codec: SoundStreamCodec, tmp_path: Path, monkeypatch: Any
) -> None:
    vision = tokenizer.codecs["video"]
    streaming = UnifiedTokenizer(tokenizer.text, [vision, codec])
    files = [{"txt": b"seven", "gif": make.gif(n, 7), "wav": make.wav(n, 3000)} for n in range(3)]
    source = make.shard(files)
    templates = [Template(["{txt}", "{video}", "{audio}"])]
    made = [tokenize_shard(source, tmp_path / "whole", streaming, templates)]
    monkeypatch.setattr("unimm.data.preparing.LONG_VALUES", 2000)
    monkeypatch.setattr("unimm.data.streams.BLOCK_VALUES", 1024)
    streamed: list[str] = []
    monkeypatch.setattr(
        "unimm.data.coding.encode_long",
        lambda media, codec: streamed.append(media.modality) or encode_long(media, codec),
    )
    made.append(tokenize_shard(source, tmp_path / "blocks", streaming, templates))
    assert streamed == ["video", "audio"] * 3
    assert made[0] == made[1]
