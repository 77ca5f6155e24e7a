"""The digits world: handwritten and spoken digits, paired by what they show.

Sources, in a folder that the user names: `mnist-images-idx3-ubyte.gz` and
`mnist-labels-idx1-ubyte.gz` (9,000 pictures of MNIST, LeCun et al. 1998, IDX format) and `fsdd.tar`
(2,700 recordings of the Free Spoken Digit Dataset, `{digit}_{speaker}_{take}.wav`, 8 kHz mono).
Nothing is downloaded.

Splits: training is the first 8,000 pictures and takes 10 to 49; validation is the last 1,000
pictures and takes 5 to 9. A scene pairs a picture with a recording of the same digit and adds a
film of that picture moving. Pictures and recordings of a digit are used in turn, so no one is used
more than once oftener than another; in training, the second and later uses of each are augmented.
Validation is never augmented.
"""

from __future__ import annotations

import gzip
import struct
import tarfile
import wave
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from unimm.data.dialpad import (
    DIRECTIONS,
    FPS,
    FRAMES,
    SAMPLE_RATE,
    WORDS,
    Scene,
    scene_files,
    write_shards,
)
from unimm.signals import Audio, Video

Split: TypeAlias = Literal["train", "val"]

SIZE = 32
_TRAIN_PICTURES, _VAL_PICTURES = 8000, 1000
_TAKES = {"train": range(10, 50), "val": range(5, 10)}
# 99.5% of the recordings are shorter; the longest has 2.3 s, most of it silence.
_MAX_SECONDS = 1.0
# In a film the 28-pixel picture is drawn 20 pixels wide (its ink: 14) and crosses 16 pixels.
_FILM_PIXELS, _FILM_STEP = 20, 2


@dataclass(frozen=True, eq=False)
class Recording:
    """One spoken digit; `name` is the file's own, such as "7_theo_12"."""

    name: str
    digit: int
    speaker: str
    take: int
    audio: Audio


class DigitsData(NamedTuple):
    """One split: pictures uint8 (N, 28, 28), their labels int64 (N,), and the recordings."""

    pictures: NDArray[np.uint8]
    labels: NDArray[np.int64]
    recordings: list[Recording]


class Origin(NamedTuple):
    """What a scene was made of: the row of its picture within the split, a recording's name."""

    picture: int
    recording: str


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes (http://yann.lecun.com/exdb/mnist).

    Raises:
        ValueError: the file is missing, damaged, or not IDX of unsigned bytes.
    """
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; name the folder that holds MNIST") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    # Header: two zero bytes, the type (8: unsigned byte), the rank, then big-endian sizes.
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes; fetch it again")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{path}: ends inside its header; fetch it again")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    # Python's integers do not overflow, as a product in numpy could for a damaged header.
    expected = 1
    for size in shape:
        expected *= size
    if len(content) - start != expected:
        raise ValueError(
            f"{path}: {len(content) - start} bytes of data, but its header says {expected}; "
            f"fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_fsdd(path: Path) -> list[Recording]:
    """Read a tar of `{digit}_{speaker}_{take}.wav` recordings, sorted by name.

    Sounds are cut to one second and otherwise left as they are.

    Raises:
        ValueError: the tar is missing or damaged, or a member is no such recording.
    """
    recordings = []
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    recordings.append(_recording(path, member.name, file.read()))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; name the folder that holds fsdd.tar") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path}: damaged tar file ({error}); fetch it again") from error
    return sorted(recordings, key=lambda recording: recording.name)


def load_digits(folder: Path, split: Split) -> DigitsData:
    """Read one split of the digits in `folder`.

    Raises:
        ValueError: a file is missing, damaged or too small, or the split has another name.
    """
    if split not in _TAKES:
        raise ValueError(f'split must be "train" or "val", got {split!r}')
    images_path = folder / "mnist-images-idx3-ubyte.gz"
    pictures = read_idx(images_path)
    labels = read_idx(folder / "mnist-labels-idx1-ubyte.gz")
    needed = _TRAIN_PICTURES + _VAL_PICTURES
    if pictures.shape[1:] != (28, 28) or labels.shape != pictures.shape[:1]:
        raise ValueError(
            f"{images_path}: pictures {pictures.shape} and labels {labels.shape} do not belong "
            f"together; expected (N, 28, 28) and (N,)"
        )
    if len(pictures) < needed:
        raise ValueError(f"{images_path}: {len(pictures)} pictures, but the splits need {needed}")
    if labels.max() > 9:
        raise ValueError(f"{images_path}: label {labels.max()} is no digit; fetch the labels again")
    part = slice(_TRAIN_PICTURES) if split == "train" else slice(needed - _VAL_PICTURES, needed)
    recordings = [r for r in read_fsdd(folder / "fsdd.tar") if r.take in _TAKES[split]]
    absent = sorted(set(range(10)) - {r.digit for r in recordings})
    if absent:
        raise ValueError(
            f"{folder / 'fsdd.tar'}: no recording of digits {absent} in the {split} takes "
            f"{_TAKES[split].start} to {_TAKES[split].stop - 1}"
        )
    return DigitsData(pictures[part], labels[part].astype(np.int64), recordings)


def pad_pictures(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pad (N, 28, 28) with black to (N, 32, 32)."""
    return np.pad(pictures, ((0, 0), (2, 2), (2, 2)))


class DigitsWorld:
    """Scenes from one split, in a random order that `seed` fixes.

    Args:
        data: a split, from `load_digits`.
        augment: vary the second and later use of a picture or recording (for training only).
        seed: fixes order, pairs, directions and augmentation.
    """

    def __init__(self, data: DigitsData, *, augment: bool, seed: int) -> None:
        """Index the recordings by digit."""
        self._pictures = pad_pictures(data.pictures)
        self._labels = data.labels
        self._recordings = data.recordings
        self._augment = augment
        self._seed = seed
        self._of_digit = [
            np.array([i for i, r in enumerate(data.recordings) if r.digit == digit])
            for digit in range(10)
        ]

    def scenes(self, count: int) -> Iterator[tuple[Scene, Origin]]:
        """The first `count` scenes, each with its origin.

        A longer run begins with the same scenes.
        """
        turns = [self._recording_turns(digit) for digit in range(10)]
        total = len(self._labels)
        order = np.empty(0, dtype=np.int64)
        for index in range(count):
            use, place = divmod(index, total)
            if place == 0:
                order = self._generator(0, use).permutation(total)
            row = int(order[place])
            recording_use, recording = next(turns[int(self._labels[row])])
            rng = self._generator(1, index)
            picture, audio = self._pictures[row], recording.audio
            direction = DIRECTIONS[int(rng.integers(4))]
            if self._augment and use:
                picture = vary_picture(picture, rng)
            if self._augment and recording_use:
                audio = vary_sound(audio, rng)
            scene = Scene(
                digit=recording.digit,
                direction=direction,
                caption=WORDS[recording.digit],
                image=Image.fromarray(picture),
                audio=audio,
                video=moving_picture(picture, direction, rng),
            )
            yield scene, Origin(picture=row, recording=recording.name)

    def _recording_turns(self, digit: int) -> Iterator[tuple[int, Recording]]:
        """Every recording of a digit in a new random order again and again, with its use count."""
        use = 0
        while True:
            for i in self._generator(2, digit, use).permutation(self._of_digit[digit]):
                yield use, self._recordings[int(i)]
            use += 1

    def _generator(self, *numbers: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, *numbers])))


def vary_picture(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Turn by up to 10 degrees, scale by 0.9 to 1.1, shift by up to 2 pixels; (H, W) uint8."""
    angle, scale = np.radians(rng.uniform(-10, 10)), rng.uniform(0.9, 1.1)
    shift = rng.uniform(-2, 2, 2)
    # Pillow maps output pixels to input pixels, about the centre.
    inverse = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
    center = np.array(picture.shape[::-1]) / 2
    offset = center - inverse @ (center + shift)
    matrix = (*inverse[0], offset[0], *inverse[1], offset[1])
    image = Image.fromarray(picture)
    moved = image.transform(
        image.size,
        Image.Transform.AFFINE,
        tuple(float(m) for m in matrix),
        resample=Image.Resampling.BILINEAR,
    )
    return np.asarray(moved)


def vary_sound(audio: Audio, rng: np.random.Generator) -> Audio:
    """Change the speed (and so the pitch) by up to 8% and the gain by -6 to +3 dB; no clipping.

    The result stays on the 16-bit grid and within one second.
    """
    samples = audio.samples[0].double().numpy()
    length = round(len(samples) / rng.uniform(0.92, 1.08))
    # Cutting or padding the spectrum resamples without aliasing.
    spectrum = np.fft.rfft(samples)[: length // 2 + 1]
    varied = np.fft.irfft(spectrum, n=length) * (length / len(samples))
    varied *= 10 ** (rng.uniform(-6, 3) / 20)
    varied = varied[: round(_MAX_SECONDS * audio.sample_rate)] / max(1.0, np.abs(varied).max())
    grid = np.clip(np.round(varied * 32768), -32768, 32767) / 32768
    return Audio(torch.from_numpy(grid.astype(np.float32))[None], audio.sample_rate)


def moving_picture(picture: NDArray[np.uint8], direction: str, rng: np.random.Generator) -> Video:
    """A film of a 32x32 picture (its inner 28 pixels drawn 20 wide) moving 2 pixels a frame."""
    inner = Image.fromarray(picture).crop((2, 2, SIZE - 2, SIZE - 2))
    small = np.asarray(inner.resize((_FILM_PIXELS, _FILM_PIXELS), Image.Resampling.BILINEAR))
    travel = _FILM_STEP * (FRAMES - 1)
    # The box is centred on its way, which takes its empty rim (4 of 28 pixels) out of the frame.
    along = (SIZE - _FILM_PIXELS - travel) // 2 + _FILM_STEP * np.arange(FRAMES)
    if direction in ("left", "up"):
        along = along[::-1]
    across = int(rng.integers(SIZE - _FILM_PIXELS + 1))
    margin = travel
    canvas = np.zeros((FRAMES, SIZE + 2 * margin, SIZE + 2 * margin), np.uint8)
    for t, place in enumerate(along):
        x, y = (place, across) if direction in ("left", "right") else (across, place)
        top, left = margin + int(y), margin + int(x)
        canvas[t, top : top + _FILM_PIXELS, left : left + _FILM_PIXELS] = small
    frames = canvas[:, margin : margin + SIZE, margin : margin + SIZE]
    return Video(torch.from_numpy(np.repeat(frames[..., None], 3, axis=-1)), FPS)


def write_raw_shards(
    folder: Path, out: Path, split: Split, count: int, seed: int, samples_per_shard: int = 1000
) -> list[Path]:
    """Write `count` scenes of a split as raw shards `digits-{split}-000000.tar`, ...

    Args:
        folder: holds the three source files.
        out: folder of the shards; made where it is missing.
        split: "train" (augmented from the second use on) or "val" (never augmented).
        count: number of scenes.
        seed: fixes order, pairs, directions and augmentation.
        samples_per_shard: scenes in every shard but the last.

    Returns:
        The shards, in order. Samples are laid out as `unimm.data.dialpad` describes, with the
        further JSON fields `picture` (row within the split) and `recording`.

    Raises:
        ValueError: a source file is missing or damaged, or a number is out of range.
    """
    world = DigitsWorld(load_digits(folder, split), augment=split == "train", seed=seed)
    samples = (
        (f"{index:08d}", scene_files(scene, origin._asdict()))
        for index, (scene, origin) in enumerate(world.scenes(count))
    )
    return write_shards(out, f"digits-{split}", samples, samples_per_shard)


def _recording(path: Path, name: str, content: bytes) -> Recording:
    parts = Path(name).stem.split("_")
    if len(parts) != 3 or not parts[0].isdigit() or int(parts[0]) > 9 or not parts[2].isdigit():
        raise ValueError(f"{path}: member {name} is not named digit_speaker_take.wav; remove it")
    try:
        with wave.open(BytesIO(content)) as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            promised = file.getnframes()
            data = file.readframes(promised)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path}: member {name} is no WAV file ({error}); remove it") from error
    if (rate, channels, width) != (SAMPLE_RATE, 1, 2):
        raise ValueError(
            f"{path}: member {name} has {channels} channels of {8 * width} bits at {rate} Hz; "
            f"expected mono, 16 bits, {SAMPLE_RATE} Hz"
        )
    # Some readers shorten a cut file without a word, so its header is compared with what is there.
    if not promised or len(data) != 2 * promised:
        raise ValueError(
            f"{path}: member {name} has {len(data) // 2} samples, but its header says {promised}; "
            f"expected a whole recording"
        )
    samples = np.frombuffer(data, "<i2")[: round(_MAX_SECONDS * rate)].astype(np.float32) / 32768
    audio = Audio(torch.from_numpy(samples)[None], rate)
    return Recording(Path(name).stem, int(parts[0]), parts[1], int(parts[2]), audio)
