"""What a document holds refuses what it cannot stand for, in one line."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from unimm import Audio, Semantic, Turn, Video

CLIP = torch.zeros(2, 4, 6, 3, dtype=torch.uint8)


def test_audio() -> None:
    sound = Audio(torch.zeros(2, 4000), 8000)
    assert sound.seconds == 0.5
    assert repr(sound) == "Audio(2 x 4000 samples, 8000 Hz, 0.500 s)"
    assert Audio(torch.zeros(1, 10, dtype=torch.float16), 10).seconds == 1
    assert Audio(torch.zeros(1, 0), 8000).seconds == 0


def test_video_and_semantic() -> None:
    assert repr(Video(CLIP, 12.5)) == "Video(2 frames of 4 x 6, 12.5 fps)"
    assert repr(Semantic(Image.new("RGB", (6, 4)))) == "Semantic(4 x 6 picture)"
    assert Turn("user") == Turn("user") != Turn("assistant")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Audio(torch.zeros(8), 8000), r"got a torch array of torch.float32, shape \(8,\)"),
        (lambda: Audio(torch.zeros(3, 8), 8000), r"channels 1 or 2, time\), got .* shape \(3, 8\)"),
        (lambda: Audio(torch.zeros(0, 8), 8000), r"Audio.samples: .* shape \(0, 8\)"),
        (lambda: Audio(torch.zeros(1, 8, dtype=torch.int16), 8000), "torch.int16"),
        (lambda: Audio(np.zeros((1, 8)), 8000), "a numpy array of float64"),  # type: ignore
        (lambda: Audio([0.0, 0.1], 8000), "got a list"),  # type: ignore
        (lambda: Audio(torch.zeros(1, 8), 0), "Audio.sample_rate: expected a positive rate, got 0"),
        (lambda: Audio(torch.tensor([[0.0, float("nan")]]), 8000), "NaN or infinite"),
        (lambda: Audio(torch.tensor([[float("inf")]]), 8000), "NaN or infinite"),
        (lambda: Video(CLIP[:0], 10), r"shape \(0, 4, 6, 3\)"),
        (lambda: Video(CLIP[:, :0], 10), r"shape \(2, 0, 6, 3\)"),
        (lambda: Video(CLIP[..., :1], 10), r"frames, height, width, 3\), got .*\(2, 4, 6, 1\)"),
        (lambda: Video(CLIP[0], 10), r"shape \(4, 6, 3\)"),
        (lambda: Video(CLIP.float(), 10), "torch.float32"),
        (lambda: Video(CLIP.numpy(), 10), "a numpy array of uint8"),  # type: ignore
        (lambda: Video(CLIP, 0), "Video.fps: expected a positive frame rate, got 0"),
        (lambda: Video(CLIP, float("nan")), "Video.fps"),
        (lambda: Video(CLIP, float("inf")), "Video.fps"),
        (lambda: Turn("system"), "expected 'user' or 'assistant', got 'system'"),  # type: ignore
    ],
)
def test_bad_signals_are_refused_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
