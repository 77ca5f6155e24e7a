"""The sound codec that comes with the library: what its card says of it holds."""

import logging
from pathlib import Path

import pytest
import soundfile
import torch

from unimm import Audio, load_codec
from unimm.checkpoint import SHIPPED
from unimm.evaluation.metrics.sound import mel_distance
from unimm.tokenizer import audio_signal
from unimm_tokenizers.audio import StreamingCodec

BUNDLE = SHIPPED / "sound-16khz"


@pytest.fixture(scope="module")
def codec() -> StreamingCodec:
    found = load_codec("sound-16khz")
    assert isinstance(found, StreamingCodec)
    return found


def test_it_is_small_and_has_its_rates(codec: StreamingCodec) -> None:
    assert sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file()) < 8e6
    assert (codec.sample_rate, codec.frame_rate, codec.bitrate) == (16000, 50, 6000)
    assert codec.latency == 320 + 480 + 480  # a frame, the window's overlap, the look-ahead


@torch.no_grad()
def test_more_levels_are_nearer_on_a_speaker_it_has_not_heard(
    codec: StreamingCodec, shared_data: Path
) -> None:
    samples, rate = soundfile.read(shared_data / "audio/speech-3436.ogg", 48000, dtype="float32")
    assert rate == 16000
    x = torch.from_numpy(samples)[None, None]
    distances = []
    for levels in (1, 4, 12):
        codec.num_codebooks = levels
        made = codec.decode(codec.encode(x))
        distances.append(float(mel_distance(made, x, sample_rate=rate)))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1.8


def test_another_rate_is_resampled_and_said(
    codec: StreamingCodec, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "unimm")
    sound = Audio(torch.zeros(2, 800), 8000)
    assert audio_signal(sound, codec).shape == (1, 1600)
    assert "sound at 8000 Hz is resampled to the codec's 16000 Hz" in caplog.text
