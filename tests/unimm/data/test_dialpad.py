import io
import json
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unimm.data import dialpad_render as render
from unimm.data.dialpad import (
    DIRECTIONS,
    WORDS,
    encode_gif,
    make_scene,
    scene_files,
    write_raw_shards,
    write_shards,
)
from unimm.signals import Video


def _decode_gif(content: bytes) -> tuple[torch.Tensor, set[int]]:
    film = Image.open(io.BytesIO(content))
    frames, durations = [], set()
    for t in range(getattr(film, "n_frames", 1)):
        film.seek(t)
        durations.add(film.info["duration"])
        frames.append(torch.from_numpy(np.array(film.convert("RGB"))))
    return torch.stack(frames), durations


def test_scene_is_fixed_by_seed_and_index() -> None:
    first, again, other = make_scene(5, 17), make_scene(5, 17), make_scene(5, 18)
    assert scene_files(first) == scene_files(again)
    assert scene_files(first)["png"] != scene_files(other)["png"]
    assert scene_files(first)["png"] != scene_files(make_scene(6, 17))["png"]


def test_scene_shapes_and_ranges() -> None:
    for index in range(100):
        scene = make_scene(0, index)
        assert scene.caption == WORDS[scene.digit]
        assert scene.film_caption == f"{scene.caption} {scene.direction}"
        assert (scene.image.size, scene.image.mode) == ((32, 32), "RGB")
        assert tuple(scene.video.frames.shape) == (9, 32, 32, 3)
        channels, length = scene.audio.samples.shape
        assert channels == 1
        assert 1600 <= length <= 3200
        assert length % 320 == 0
        assert float(scene.audio.samples.abs().max()) <= 1.0


def test_every_digit_and_direction_is_about_equally_frequent() -> None:
    chosen = [make_scene(3, index) for index in range(300)]
    digits = np.bincount([scene.digit for scene in chosen], minlength=10)
    assert digits.min() >= 15  # 30 are expected; one standard deviation is 5
    directions = [scene.direction for scene in chosen]
    assert all(50 <= directions.count(direction) <= 100 for direction in DIRECTIONS)


def test_a_given_digit_changes_only_the_digit() -> None:
    scene, forced = make_scene(1, 4), make_scene(1, 4, digit=8)
    assert forced.digit == 8
    assert forced.caption == "eight"
    assert forced.direction == scene.direction
    assert forced.audio.samples.shape == scene.audio.samples.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0), "seed and index"),
        ((0, -1), "seed and index"),
        ((0, 0, 10), "digit must be 0 to 9"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scene(*arguments)


def test_sound_holds_the_two_tones_of_its_key() -> None:
    for digit in range(10):
        sound = make_scene(0, 0, digit=digit).audio.samples[0].double().numpy()
        spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
        hz = np.fft.rfftfreq(len(sound), 1 / 8000)
        low, high = hz < 1075, hz >= 1075
        row, column = render.KEYS[digit]
        assert abs(hz[low][spectrum[low].argmax()] - render.ROW_HZ[row]) < 5
        assert abs(hz[high][spectrum[high].argmax()] - render.COLUMN_HZ[column]) < 5


def test_keys_are_those_of_a_telephone() -> None:
    assert render.KEYS[1] == (0, 0)
    assert render.KEYS[6] == (1, 2)
    assert render.KEYS[8] == (2, 1)
    assert render.KEYS[0] == (3, 1)
    assert len(set(render.KEYS.values())) == 10


def test_picture_has_legible_contrast() -> None:
    luma = np.array([0.299, 0.587, 0.114])
    for seed in range(200):
        background, ink = render.random_colors(np.random.default_rng(seed))
        assert abs(luma @ (background - ink)) >= 80
        assert 0 <= min(background.min(), ink.min()) <= max(background.max(), ink.max()) <= 255


def test_digit_shapes_stay_apart_when_turned() -> None:
    # 6 and 9 are the pair that a turn could join: even 20 degrees towards each other they differ.
    def mask(digit: int, degrees: float) -> np.ndarray:
        pose = render.Pose(center=(16, 16), width=14, height=22, stroke=2.5, degrees=degrees)
        return render.digit_mask(digit, pose)

    same = np.abs(mask(6, 20) - mask(6, 10)).sum()
    for degrees in (-20, 0, 20):
        assert np.abs(mask(6, 20) - mask(9, degrees)).sum() > 1.5 * same


def test_mask_covers_stroke_area() -> None:
    # Ink is about the length of the strokes times their width, and half a disc at either end.
    pose = render.Pose(center=(16, 16), width=10, height=20, stroke=3)
    length = 10 + np.hypot(6.5, 20)
    area = 3 * length + np.pi * 1.5**2
    assert render.digit_mask(7, pose).sum() == pytest.approx(area, rel=0.05)


@pytest.mark.parametrize(
    ("direction", "x", "y"), [("left", -8, 0), ("right", 8, 0), ("up", 0, -8), ("down", 0, 8)]
)
def test_film_moves_in_its_direction_and_stays_whole(direction: str, x: int, y: int) -> None:
    scene = next(scene for i in range(100) if (scene := make_scene(2, i)).direction == direction)
    frames = scene.video.frames.numpy().astype(int)
    background = frames[0, -1 if direction == "up" else 0, 0]
    ink = np.abs(frames - background).sum(axis=-1)
    assert len(set(ink.sum(axis=(1, 2)).tolist())) == 1  # nothing leaves the frame
    assert (ink[-1] == np.roll(ink[0], (y, x), axis=(0, 1))).all()


def test_gif_is_lossless_and_keeps_every_frame() -> None:
    for index in range(20):
        video = make_scene(4, index).video
        frames, durations = _decode_gif(encode_gif(video))
        assert torch.equal(frames, video.frames)
        assert durations == {100}


def test_gif_refuses_what_it_cannot_hold() -> None:
    noise = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with pytest.raises(ValueError, match="at most 256"):
        encode_gif(Video(noise, 10.0))
    with pytest.raises(ValueError, match="equal"):
        encode_gif(Video(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 10.0))
    with pytest.raises(ValueError, match="10 ms"):
        encode_gif(Video(noise, 8.0))


def test_raw_shards_hold_the_scenes(tmp_path: Path) -> None:
    shards = write_raw_shards(tmp_path, count=5, seed=9, samples_per_shard=2)
    assert [shard.name for shard in shards] == [f"dialpad-00000{i}.tar" for i in range(3)]
    assert sorted(tmp_path.iterdir()) == shards
    with tarfile.open(shards[1]) as tar:
        files = {member.name: tar.extractfile(member) for member in tar}
        content = {name: file.read() for name, file in files.items() if file is not None}
        assert all(member.mtime == 0 for member in tar)
    extensions = ("gif", "json", "png", "txt", "wav")
    assert list(content) == [f"{key:08d}.{ext}" for key in (2, 3) for ext in extensions]
    scene = make_scene(9, 2)
    assert content["00000002.txt"].decode() == scene.caption
    assert json.loads(content["00000002.json"]) == {
        "digit": scene.digit,
        "direction": scene.direction,
        "film": scene.film_caption,
    }
    picture = Image.open(io.BytesIO(content["00000002.png"]))
    assert np.array_equal(np.asarray(picture), np.asarray(scene.image))
    with wave.open(io.BytesIO(content["00000002.wav"])) as file:
        assert file.getframerate() == 8000
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    assert np.array_equal(samples.astype(np.float32), scene.audio.samples[0].numpy())
    assert torch.equal(_decode_gif(content["00000002.gif"])[0], scene.video.frames)


def test_raw_shards_are_byte_identical(tmp_path: Path) -> None:
    one = write_raw_shards(tmp_path / "a", count=3, seed=1)
    two = write_raw_shards(tmp_path / "b", count=3, seed=1)
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_a_failed_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_shards(tmp_path, "bad", [("0", {"txt": "no bytes"})], 1)  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count of 1 or more"):
        write_raw_shards(tmp_path, count=0, seed=0)
    with pytest.raises(ValueError, match="samples_per_shard"):
        write_raw_shards(tmp_path, count=1, seed=0, samples_per_shard=0)
