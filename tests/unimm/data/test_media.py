import io
import json
import math
import pickle
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from unimm.data.media import EXTENSIONS, MediaError, decode, open_media

WHERE = "shard.tar: sample 0007"


def refused(extension: str, data: bytes, reason: str) -> None:
    """The file is refused in one line that says where, what and why."""
    with pytest.raises(MediaError, match=reason) as caught:
        decode(extension, data, WHERE)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ")
    assert "\n" not in message


def sound(samples: np.ndarray, form: str, rate: int = 8000, subtype: str | None = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=form, subtype=subtype)
    return stream.getvalue()


def tones(length: int = 16000, channels: int = 1) -> np.ndarray:
    wave = 0.3 * np.sin(np.arange(length) / 7)
    return np.stack([wave] * channels, axis=1).astype(np.float32)


def film(extension: str, frames: int = 12, size: int = 64) -> bytes:
    av = pytest.importorskip("av", reason="films need PyAV (the video extra)")
    codec = {"mp4": "mpeg4", "webm": "libvpx"}[extension]
    stream = io.BytesIO()
    with av.open(stream, "w", format=extension) as container:
        track = container.add_stream(codec, rate=20)
        track.width = track.height = size
        track.pix_fmt = "yuv420p"
        for number in range(frames):
            pixels = np.full((size, size, 3), 10 * number, dtype=np.uint8)
            container.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(track.encode())
    return stream.getvalue()


# What is read


def test_texts_and_json() -> None:
    assert decode("txt", "sieben ü".encode(), WHERE) == "sieben ü"
    assert decode("txt", b"", WHERE) == ""
    assert decode("document.json", b'["a", 1]', WHERE) == ["a", 1]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 4)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays(shape: tuple[int, ...], order: Any) -> None:
    array = np.arange(math.prod(shape), dtype=np.uint16).reshape(shape, order=order)
    stream = io.BytesIO()
    np.save(stream, array)
    found = decode("npy", stream.getvalue(), WHERE)
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype


@pytest.mark.parametrize(("extension", "form"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_pictures(make: Any, extension: str, form: str) -> None:
    picture = decode(extension, make.png(0, 20, 10, form), WHERE)
    assert picture.size == (20, 10)
    assert decode("left.JPEG", make.png(0, 1, 1, form), WHERE).size == (1, 1)


def test_sixteen_bit_greys_keep_their_range() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16)).save(stream, "PNG")
    assert np.asarray(decode("png", stream.getvalue(), WHERE)).tolist() == [[0, 1, 255]]


def test_pictures_stand_upright() -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    Image.new("RGB", (20, 10)).save(stream, "JPEG", exif=exif)
    assert decode("jpg", stream.getvalue(), WHERE).size == (10, 20)


@pytest.mark.parametrize(
    ("extension", "form"), [("wav", "WAV"), ("flac", "FLAC"), ("ogg", "OGG"), ("mp3", "MP3")]
)
@pytest.mark.parametrize("channels", [1, 2])
def test_sounds(extension: str, form: str, channels: int) -> None:
    audio = decode(extension, sound(tones(channels=channels), form), WHERE)
    assert audio.sample_rate == 8000
    assert audio.samples.shape == (channels, 16000)
    assert audio.samples.dtype == torch.float32
    assert 0.2 < audio.samples.abs().max() < 0.4


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_U8", "PCM_24", "FLOAT", "ULAW"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_has_the_samples_that_libsndfile_reads(subtype: str, channels: int) -> None:
    noise = np.random.default_rng(0).normal(0, 0.3, (1001, channels)).clip(-1, 1)
    data = sound(noise, "WAV", subtype=subtype)
    listed = data[:12] + b"LIST" + struct.pack("<I", 3) + b"abc\0" + data[12:]
    theirs, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    for file in (data, listed):
        audio = decode("wav", file, WHERE)
        assert audio.sample_rate == rate
        assert np.array_equal(audio.samples.numpy(), theirs.T)
        opened = open_media("wav", file, WHERE)
        assert torch.equal(torch.cat(list(opened.blocks(100)), dim=1), audio.samples)


def test_silence_and_a_single_sample_are_sounds() -> None:
    assert decode("wav", sound(np.zeros((800, 1)), "WAV"), WHERE).samples.abs().max() == 0
    assert decode("wav", sound(np.zeros((1, 1)), "WAV"), WHERE).samples.shape == (1, 1)


def test_a_gif_has_the_rate_of_its_durations(make: Any) -> None:
    video = decode("gif", make.gif(0, frames=5, milliseconds=40), WHERE)
    assert video.frames.shape == (5, 16, 16, 3)
    assert video.fps == pytest.approx(25)
    assert decode("gif", make.gif(0, frames=1), WHERE).frames.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("extension", ["mp4", "webm"])
def test_films(extension: str) -> None:
    video = decode(extension, film(extension), WHERE)
    assert video.frames.shape == (12, 64, 64, 3)
    assert video.fps == pytest.approx(20)
    means = video.frames.float().mean(dim=(1, 2, 3))
    assert (means - 10 * torch.arange(12)).abs().max() < 6


def test_real_files_are_read(shared_data: Path) -> None:
    gif = decode("gif", (shared_data / "video/newtonscradle.gif").read_bytes(), WHERE)
    assert gif.frames.shape == (36, 150, 200, 3)
    speech = decode("ogg", (shared_data / "audio/speech-198.ogg").read_bytes(), WHERE)
    assert speech.sample_rate == 16000
    assert 1 < speech.seconds < 30


@pytest.mark.slow
def test_a_real_film_is_read(shared_data: Path) -> None:
    pytest.importorskip("av", reason="films need PyAV (the video extra)")
    video = decode("mp4", (shared_data / "video/cockatoo.mp4").read_bytes(), WHERE)
    assert video.frames.shape == (280, 720, 1280, 3)
    assert video.fps == pytest.approx(20)


# What is refused


@pytest.mark.parametrize("extension", [e for e in EXTENSIONS if e != "txt"])
def test_empty_files(extension: str) -> None:
    refused(extension, b"", rf"\.{extension} is empty")


@pytest.mark.parametrize("extension", [e for e in EXTENSIONS if e != "txt"])
def test_garbage_and_wrong_extensions(extension: str) -> None:
    if extension in ("mp4", "webm"):
        pytest.importorskip("av", reason="films need PyAV (the video extra)")
    refused(extension, b"\xff\x00 this is none of them " * 40, rf"\.{extension}: ")


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pickle", "pth", "pt", "gz", "py", "yaml", ""])
def test_nothing_that_could_run_code_is_decoded(extension: str, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "owned",)

    refused(extension, pickle.dumps(Evil()), rf"no decoder for \.{extension}; known are txt")
    assert not (tmp_path / "owned").exists()


def test_texts_that_are_not_utf8() -> None:
    refused("txt", b"caf\xe9", "not UTF-8")
    refused("json", b'{"a": ', "not valid JSON")
    refused("json", b"[" * 100_000, "not valid JSON")


def test_arrays_of_objects_and_arrays_that_lie_about_their_size() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([{}, None], dtype=object), allow_pickle=True)
    refused("npy", stream.getvalue(), "Python objects")
    stream = io.BytesIO()
    header: Any = {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)}
    np.lib.format.write_array_header_1_0(stream, header)
    refused("npy", stream.getvalue() + bytes(64), "64 bytes of data, its header says 8796093022208")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_cut_pictures(make: Any, form: str, share: float) -> None:
    data = make.png(0, 64, 64, form)
    refused(form.lower(), data[: int(share * len(data))], "picture")


def test_a_huge_picture_is_refused_before_it_is_decoded() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    for width, height in ((20000, 20000), (12000, 12000), (8200, 8200)):
        rows = zlib.compress(bytes(width // 8 + 1) * 16)
        data = (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
            + chunk(b"IDAT", rows)
            + chunk(b"IEND", b"")
        )
        begun = time.perf_counter()
        refused("png", data, "67108864")
        assert time.perf_counter() - begun < 1


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_cut_sounds(extension: str, share: float) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, (40000, 1)).clip(-1, 1)
    data = sound(noise, extension.upper())
    refused(extension, data[: int(share * len(data))], rf"\.{extension}: ")


def test_sounds_of_nothing_or_nan() -> None:
    refused("wav", sound(np.zeros((0, 1)), "WAV"), "no samples")
    broken = tones(100)
    broken[50] = math.nan
    refused("wav", sound(broken, "WAV", subtype="FLOAT"), "NaN or infinite")
    refused("wav", sound(tones(100, channels=3), "WAV"), "3 channels")


def test_hours_of_silence_are_refused_before_they_are_decoded() -> None:
    size = 2**31
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", size + 36, b"WAVE", b"fmt ", 16, 1, 1, 8000, 8000, 1, 8, b"data", size),
    )
    refused("wav", header + bytes(1000), "cut: 1044 bytes of at least")
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", 8000, 2, format="FLAC") as file:
        for _ in range(40):
            file.write(np.zeros((2**21, 2), dtype=np.int16))
    refused("flac", stream.getvalue(), "values are read")


@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
@pytest.mark.parametrize("extension", ["gif", "mp4", "webm"])
def test_cut_films(make: Any, extension: str, share: float) -> None:
    data = make.gif(0, frames=8) if extension == "gif" else film(extension, 24)
    refused(extension, data[: int(share * len(data))], rf"\.{extension}: ")


def test_a_film_of_very_many_frames_is_refused() -> None:
    frame = b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0"
    data = b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff" + frame * 20000 + b";"
    begun = time.perf_counter()
    refused("gif", data, "a film of 16385 or more frames")
    assert time.perf_counter() - begun < 8


def test_the_error_survives_being_sent_to_another_process() -> None:
    error = MediaError("a.tar: sample 1", "cut")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.where, copy.reason) == (str(error), error.where, error.reason)
    assert json.dumps(str(copy))
