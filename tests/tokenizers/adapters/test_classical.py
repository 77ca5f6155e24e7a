"""Classical codecs as codecs of bytes: every byte counts, and rates are kept."""

import io
import os

import pytest
import torch
from PIL import Image
from torch import Tensor

from unimm_tokenizers.adapters import ByteCodec, classical, classical_formats
from unimm_tokenizers.codec import PADDING_CODE


def picture(height: int = 64, width: int = 96) -> Tensor:
    """Smooth, with some noise: (1, 3, H, W)."""
    coarse = torch.rand(1, 3, 6, 6)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (smooth.clamp(0, 1) * 1.9 - 0.95 + 0.05 * torch.rand(1, 3, height, width)).clamp(-1, 1)


def sound(count: int = 16001) -> Tensor:
    time = torch.arange(count) / 16000
    tone = 0.3 * torch.sin(2764 * time) + 0.1 * torch.sin(9000 * time * (1 + time))
    return (tone + 0.01 * torch.randn(count))[None, None]


def film(frames: int = 9, height: int = 63, width: int = 65) -> Tensor:
    still = picture(height, width)
    return torch.stack([still.roll(3 * i, -1) for i in range(frames)], dim=2)


SIGNALS = {"image": picture, "audio": sound, "video": film}
NAMES = ["jpeg:75", "webp:75", "avif:60", "png:64", "opus:24", "mp3:32", "flac"]
FILMS = ["h264:23", "vp9:32", "av1:35"]


@pytest.mark.parametrize("name", NAMES + FILMS)
def test_any_size_comes_back_close(name: str) -> None:
    codec = classical(name)
    x = SIGNALS[codec.modality]()
    codes = codec.encode(x)
    assert codes.shape[:2] == (1, 1)
    assert 0 <= int(codes.min()) <= int(codes.max()) <= 255
    made = codec.decode(codes, tuple(x.shape[2:]))
    assert made.shape == x.shape
    ratio = 10 * torch.log10(x.square().mean() / (made - x).square().mean())
    assert float(ratio) > 10
    assert torch.equal(codec.encode(x), codes)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="scheduling classes are Linux's")
@pytest.mark.parametrize("name", FILMS)
def test_an_encoder_leaves_the_process_as_it_was(name: str) -> None:
    before = os.sched_getscheduler(0)
    classical(name).encode(film())
    assert os.sched_getscheduler(0) == before


def test_codes_are_the_bytes_of_the_file() -> None:
    codec = classical("jpeg:80")
    x = picture()
    data = bytes(codec.encode(x)[0, 0].tolist())
    pixels = ((x[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=80, optimize=True)
    assert data == file.getvalue()
    assert codec.codebook_size == 256
    assert codec.num_codebooks == 1


def test_files_of_a_batch_are_padded_and_read_back_alike() -> None:
    codec = classical("webp:50")
    x = torch.cat([picture(), torch.zeros(1, 3, 64, 96)])
    codes = codec.encode(x)
    assert int(codes[0].min()) >= 0
    assert int(codes[1, 0, -1]) == PADDING_CODE
    made = codec.decode(codes)
    for row in range(2):
        assert torch.equal(codec.decode(codec.encode(x[row : row + 1])), made[row : row + 1])


@pytest.mark.parametrize(
    "name", ["jpeg@1", "webp@0.8", "avif@1", "png@3", "opus@20", "mp3@40", "h264@0.4", "vp9@0.3"]
)
def test_a_rate_is_used_up_and_never_passed(name: str) -> None:
    codec = classical(name)
    x = SIGNALS[codec.modality]()
    rate = float(name.partition("@")[2])
    bits = 8 * codec.encode(x).numel()
    unit = x.shape[-1] / 16 if codec.modality == "audio" else x[0, 0].numel()
    assert 0.3 * rate < bits / unit <= rate


def test_a_rate_that_cannot_be_kept_takes_the_smallest_file() -> None:
    x = picture()
    smallest = classical("jpeg:1").encode(x)
    assert torch.equal(classical("jpeg@0.001").encode(x), smallest)


def test_better_settings_lose_less_and_cost_more() -> None:
    x, errors, sizes = picture(), [], []
    for name in ("avif:20", "avif:60", "avif:90"):
        codec = classical(name)
        codes = codec.encode(x)
        errors.append(float((codec.decode(codes) - x).square().mean()))
        sizes.append(codes.numel())
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    film_ = film()
    costly, cheap = (classical(name).encode(film_).numel() for name in ("h264:20", "h264:40"))
    assert costly > 1.5 * cheap


def test_flac_loses_nothing_but_rounding() -> None:
    codec, x = classical("flac"), sound()
    assert float((codec.decode(codec.encode(x)) - x).abs().max()) < 1 / 32000


def test_sound_is_not_shifted() -> None:
    x = sound()
    for name in ("opus:32", "mp3:8", "mp3:64"):
        codec = classical(name)
        made = codec.decode(codec.encode(x), (x.shape[-1],))
        a, b = x[0, 0, 4000:12000], made[0, 0]
        scores = [float((a * b[4000 + lag : 12000 + lag]).sum()) for lag in range(-1200, 1201)]
        assert abs(scores.index(max(scores)) - 1200) <= 2, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jpeg2000:3", "no classical codec; write one of jpeg, webp, avif"),
        ("jpeg", "give a setting or a rate"),
        ("jpeg:96", "setting 96 is none of 1 to 95"),
        ("h264:60", "setting -60 is none of -51 to -1"),
        ("JPEG:75", "no classical codec"),
    ],
)
def test_unknown_names_and_settings_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classical(name)


def test_opus_takes_the_next_rate_that_it_knows() -> None:
    assert classical("opus:24", sample_rate=22050).sample_rate == 24000
    assert classical("opus:24", sample_rate=44100).sample_rate == 48000
    assert classical("mp3:24", sample_rate=44100).sample_rate == 44100


def test_damaged_files_are_refused_in_one_line() -> None:
    for name in ("jpeg:75", "opus:24", "h264:30"):
        codec = classical(name)
        x = SIGNALS[codec.modality]()
        noise = torch.randint(0, 256, (1, 1, 200))
        with pytest.raises(ValueError, match="not a file of it"):
            codec.decode(noise, tuple(x.shape[2:]))
    jpeg: ByteCodec = classical("jpeg:75")
    with pytest.raises(ValueError, match="bytes must lie in 0 to 255"):
        jpeg.decode(torch.full((1, 1, 9), 256))
    with pytest.raises(ValueError, match="expected bytes int64"):
        jpeg.decode(torch.zeros(1, 2, 9))
    with pytest.raises(ValueError, match="has no weights to save"):
        jpeg.save_pretrained("nowhere")


def test_every_modality_has_its_formats() -> None:
    assert classical_formats("image") == ("jpeg", "webp", "avif", "png")
    assert classical_formats("audio") == ("opus", "mp3", "flac")
    assert classical_formats("video") == ("h264", "vp9", "av1")
