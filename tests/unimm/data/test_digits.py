import collections
import gzip
import io
import itertools
import json
import struct
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unimm.data.dialpad import scene_files
from unimm.data.digits import (
    DigitsData,
    DigitsWorld,
    Recording,
    load_digits,
    moving_picture,
    read_fsdd,
    read_idx,
    vary_picture,
    vary_sound,
    write_raw_shards,
)
from unimm.signals import Audio


def _wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(samples * 32767).astype("<i2").tobytes())
    return stream.getvalue()


def _write_fsdd(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def _write_idx(path: Path, values: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes(), mtime=0))


def _sound(seconds: float = 0.3, hz: float = 440.0, level: float = 0.5) -> np.ndarray:
    return level * np.sin(2 * np.pi * hz * np.arange(round(seconds * 8000)) / 8000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three files in full number, with simple contents."""
    root = tmp_path_factory.mktemp("digits")
    labels = (np.arange(9000) % 10).astype(np.uint8)
    pictures = np.zeros((9000, 28, 28), np.uint8)
    pictures[:, 5:23, 10:18] = (labels * 20 + 50)[:, None, None]
    _write_idx(root / "mnist-images-idx3-ubyte.gz", pictures)
    _write_idx(root / "mnist-labels-idx1-ubyte.gz", labels)
    content = _wav(_sound(0.05))
    names = [
        f"{d}_{who}_{take}.wav" for d in range(10) for who in ("ann", "bob") for take in (5, 10, 49)
    ]
    _write_fsdd(root / "fsdd.tar", dict.fromkeys(names, content))
    return root


def _data(recordings_per_digit: int = 3, pictures_per_digit: int = 4) -> DigitsData:
    labels = np.tile(np.arange(10), pictures_per_digit)
    pictures = np.zeros((len(labels), 28, 28), np.uint8)
    for row, picture in enumerate(pictures):
        picture[6:22, 8:20] = 100 + row  # every picture is told apart by its grey
    recordings = [
        Recording(
            f"{d}_ann_{take}", d, "ann", take, Audio(torch.from_numpy(_sound()[None]).float(), 8000)
        )
        for d in range(10)
        for take in range(recordings_per_digit)
    ]
    return DigitsData(pictures, labels, recordings)


def test_read_idx(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    _write_idx(tmp_path / "x.gz", values)
    assert np.array_equal(read_idx(tmp_path / "x.gz"), values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "damaged gzip"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x05abcde", mtime=0)[:-9], "damaged gzip"),
        (gzip.compress(b"\0\0\x0d\x01\0\0\0\x00", mtime=0), "not an IDX file"),
        (gzip.compress(b"", mtime=0), "not an IDX file"),
        (gzip.compress(b"\0\0\x08\x03\0\0", mtime=0), "inside its header"),
        (
            gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc", mtime=0),
            "3 bytes of data, but its header says 5",
        ),
    ],
)
def test_read_idx_refuses_damage(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.gz.*{message}"):
        read_idx(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mnist-images-idx3-ubyte\.gz: no such file"):
        load_digits(tmp_path, "train")
    with pytest.raises(ValueError, match=r"fsdd\.tar: no such file"):
        read_fsdd(tmp_path / "fsdd.tar")


def test_read_fsdd_sorts_cuts_and_keeps_samples(tmp_path: Path) -> None:
    short, long = _sound(0.2), _sound(1.7)
    path = _write_fsdd(tmp_path / "f.tar", {"7_bob_12.wav": _wav(long), "3_ann_5.wav": _wav(short)})
    first, second = read_fsdd(path)
    assert (first.digit, first.speaker, first.take, first.name) == (3, "ann", 5, "3_ann_5")
    assert (second.digit, second.speaker, second.take) == (7, "bob", 12)
    assert first.audio.samples.shape == (1, 1600)
    assert second.audio.samples.shape == (1, 8000)
    assert np.allclose(first.audio.samples[0].numpy(), short, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("seven.wav", _wav(_sound()), "not named"),
        ("12_ann_5.wav", _wav(_sound()), "not named"),
        ("7_ann_5.wav", b"RIFF nonsense", "is no WAV file"),
        ("7_ann_5.wav", _wav(_sound(), rate=16000), "at 16000 Hz"),
        ("7_ann_5.wav", _wav(_sound())[:1000], "its header says 2400"),
        ("7_ann_5.wav", _wav(np.zeros(0)), "has 0 samples"),
    ],
)
def test_read_fsdd_refuses_bad_members(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = _write_fsdd(tmp_path / "f.tar", {name: content})
    with pytest.raises(ValueError, match=message):
        read_fsdd(path)


def test_read_fsdd_refuses_a_cut_tar(tmp_path: Path) -> None:
    path = _write_fsdd(tmp_path / "f.tar", {"7_ann_5.wav": _wav(_sound(1.0))})
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(ValueError, match="damaged tar"):
        read_fsdd(path)


def test_splits_do_not_overlap(folder: Path) -> None:
    train, val = load_digits(folder, "train"), load_digits(folder, "val")
    assert (len(train.pictures), len(val.pictures)) == (8000, 1000)
    assert {r.take for r in train.recordings} == {10, 49}
    assert {r.take for r in val.recordings} == {5}
    everything = read_idx(folder / "mnist-labels-idx1-ubyte.gz")
    assert np.array_equal(np.concatenate([train.labels, val.labels]), everything)


def test_load_refuses_unknown_split_and_unfit_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='"train" or "val"'):
        load_digits(folder, "test")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    _write_idx(tmp_path / "mnist-images-idx3-ubyte.gz", np.zeros((20, 28, 28), np.uint8))
    _write_idx(tmp_path / "mnist-labels-idx1-ubyte.gz", np.zeros(19, np.uint8))
    with pytest.raises(ValueError, match="do not belong together"):
        load_digits(tmp_path, "train")
    _write_idx(tmp_path / "mnist-labels-idx1-ubyte.gz", np.zeros(20, np.uint8))
    with pytest.raises(ValueError, match="20 pictures, but the splits need 9000"):
        load_digits(tmp_path, "train")


def test_pictures_and_recordings_are_used_evenly() -> None:
    world = DigitsWorld(_data(recordings_per_digit=3, pictures_per_digit=4), augment=False, seed=0)
    origins = [origin for _, origin in world.scenes(80)]
    pictures = collections.Counter(origin.picture for origin in origins)
    recordings = collections.Counter(origin.recording for origin in origins)
    assert set(pictures.values()) == {2}
    assert set(recordings.values()) == {2, 3}  # 8 uses of 3 recordings a digit
    assert len(recordings) == 30


def test_scenes_show_and_say_the_same_digit() -> None:
    data = _data()
    for scene, origin in DigitsWorld(data, augment=True, seed=0).scenes(60):
        assert scene.digit == data.labels[origin.picture]
        assert origin.recording.startswith(f"{scene.digit}_")
        assert scene.image.mode == "L"
        assert scene.image.size == (32, 32)


def test_only_later_uses_in_training_are_augmented() -> None:
    data = _data(recordings_per_digit=3, pictures_per_digit=4)
    sound = data.recordings[0].audio.samples

    def plain(augment: bool) -> tuple[list[bool], list[bool]]:
        scenes = list(DigitsWorld(data, augment=augment, seed=1).scenes(80))
        same_picture = [
            np.array_equal(np.asarray(s.image)[2:-2, 2:-2], data.pictures[o.picture])
            for s, o in scenes
        ]
        return same_picture, [torch.equal(s.audio.samples, sound) for s, _ in scenes]

    pictures, sounds = plain(augment=True)
    assert all(pictures[:40])
    assert not any(pictures[40:])
    assert sum(sounds) == 30  # each of 30 recordings once
    pictures, sounds = plain(augment=False)
    assert all(pictures)
    assert all(sounds)


def test_scenes_are_fixed_by_the_seed_and_extend() -> None:
    def files(seed: int, count: int) -> list[dict[str, bytes]]:
        world = DigitsWorld(_data(), augment=True, seed=seed)
        return [scene_files(scene, origin._asdict()) for scene, origin in world.scenes(count)]

    assert files(0, 50) == files(0, 70)[:50]
    assert files(0, 50) != files(1, 50)


@pytest.mark.parametrize(
    ("direction", "x", "y"), [("left", -2, 0), ("right", 2, 0), ("up", 0, -2), ("down", 0, 2)]
)
def test_film_moves_two_pixels_a_frame(direction: str, x: int, y: int) -> None:
    picture = np.zeros((32, 32), np.uint8)
    picture[8:24, 10:22] = 255
    for seed in range(5):
        video = moving_picture(picture, direction, np.random.default_rng(seed))
        frames = video.frames.numpy()
        assert frames.shape == (9, 32, 32, 3)
        assert frames.max() > 200
        for before, after in itertools.pairwise(frames):
            assert np.array_equal(after, np.roll(before, (y, x), axis=(0, 1)))


def test_augmentation_stays_within_its_ranges() -> None:
    picture = np.zeros((32, 32), np.uint8)
    picture[10:22, 12:20] = 200
    audio = Audio(torch.from_numpy(_sound(0.4, 440, 0.9)[None]).float(), 8000)
    hz = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        moved = vary_picture(picture, rng)
        y, x = np.nonzero(moved > 100)
        assert np.hypot(x.mean() - 15.5, y.mean() - 15.5) < 3.2
        assert 0.75 < moved.sum() / picture.sum() < 1.3
        varied = vary_sound(audio, rng)
        assert float(varied.samples.abs().max()) <= 1.0
        assert 3200 / 1.09 < varied.samples.shape[1] < 3200 / 0.91
        spectrum = torch.fft.rfft(varied.samples[0]).abs()
        hz.append(float(spectrum.argmax()) * 8000 / varied.samples.shape[1])
    assert 400 < min(hz) < 430 < 450 < max(hz) < 480


def test_varied_sound_is_not_longer_than_a_second() -> None:
    audio = Audio(torch.from_numpy(_sound(1.0)[None]).float(), 8000)
    for seed in range(10):
        assert vary_sound(audio, np.random.default_rng(seed)).samples.shape[1] <= 8000


def test_raw_shards(folder: Path, tmp_path: Path) -> None:
    shards = write_raw_shards(folder, tmp_path / "a", "val", count=6, seed=0, samples_per_shard=4)
    assert [shard.name for shard in shards] == ["digits-val-000000.tar", "digits-val-000001.tar"]
    again = write_raw_shards(folder, tmp_path / "b", "val", count=6, seed=0, samples_per_shard=4)
    assert [p.read_bytes() for p in shards] == [p.read_bytes() for p in again]
    with tarfile.open(shards[0]) as tar:
        content = {m.name: f.read() for m in tar if (f := tar.extractfile(m)) is not None}
    facts = json.loads(content["00000000.json"])
    assert set(facts) == {"digit", "direction", "film", "picture", "recording"}
    assert facts["film"] == f"{content['00000000.txt'].decode()} {facts['direction']}"
    picture = np.asarray(Image.open(io.BytesIO(content["00000000.png"])))
    val = load_digits(folder, "val")
    assert np.array_equal(picture[2:-2, 2:-2], val.pictures[facts["picture"]])
    assert facts["digit"] == val.labels[facts["picture"]]
    assert getattr(Image.open(io.BytesIO(content["00000000.gif"])), "n_frames", 1) == 9


def test_real_digits(shared_data: Path) -> None:
    val = load_digits(shared_data / "digits", "val")
    assert len(val.pictures) == 1000
    assert len(val.recordings) == 300
    assert {r.speaker for r in val.recordings} == {
        "george", "jackson", "lucas", "nicolas", "theo", "yweweler"
    }  # fmt: skip
    scenes = list(DigitsWorld(val, augment=False, seed=0).scenes(20))
    assert len({origin.recording for _, origin in scenes}) == 20
    assert all(scene_files(scene)["gif"] for scene, _ in scenes)
