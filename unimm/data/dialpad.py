"""The dial-pad world: digits as words, pictures, sounds and films, made by rule and without end.

A scene shows one digit four times: its English word, a drawn picture (32x32 RGB), the two tones of
its telephone key (ITU-T Q.23, 8 kHz), and a film in which it moves left, right, up or down (9
frames, 10 per second). Scene `index` of world `seed` is fixed by those two numbers alone; picture,
sound and film each have a random stream of their own. Nothing is downloaded.

`write_raw_shards` stores scenes as WebDataset tars in the raw format: `.txt` the word, `.png`,
`.wav` (16-bit), `.gif` (lossless) and `.json` with `digit`, `direction` and the film's caption
`film`. Files are byte-identical from run to run.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import tarfile
import wave
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from unimm.data import dialpad_render as render
from unimm.signals import Audio, Video
from unimm_tokenizers.storage import replacing

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = ("left", "right", "up", "down")

SAMPLE_RATE = 8000
FRAMES = 9
# GIF stores frame times in units of 10 ms, so 10 frames a second is exact and 8 would not be.
FPS = 10.0
# Key and {extension: bytes} of a raw sample.
RawSample: TypeAlias = tuple[str, Mapping[str, bytes]]
# Pixels per frame: the digit crosses 8 of 32 pixels, which leaves room for one of half the frame.
_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True, eq=False)
class Scene:
    """One digit in four modalities; `caption` is its word, `film_caption` adds the direction."""

    digit: int
    direction: str
    caption: str
    image: Image.Image
    audio: Audio
    video: Video

    @property
    def film_caption(self) -> str:
        """What the film shows, such as "seven left"."""
        return f"{self.caption} {self.direction}"


def make_scene(seed: int, index: int, digit: int | None = None) -> Scene:
    """Scene `index` of world `seed`.

    Args:
        seed: the world, a non-negative integer.
        index: the scene, a non-negative integer.
        digit: show this digit (0 to 9) instead of the one that the world chose; direction, poses,
            colours and noise stay as drawn.

    Raises:
        ValueError: a number is out of range.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"make_scene: seed and index must be 0 or more, got {seed} and {index}")
    if digit is not None and not 0 <= digit <= 9:
        raise ValueError(f"make_scene: digit must be 0 to 9, got {digit}")
    choice, picture, tone, film = random_streams([seed, index], 4)
    chosen, direction = int(choice.integers(10)), DIRECTIONS[int(choice.integers(4))]
    shown = chosen if digit is None else digit
    return Scene(
        digit=shown,
        direction=direction,
        caption=WORDS[shown],
        image=draw_picture(shown, picture),
        audio=draw_sound(shown, tone),
        video=draw_film(shown, direction, film),
    )


def random_streams(key: Sequence[int], count: int) -> list[np.random.Generator]:
    """Independent random streams that a key of non-negative integers fixes."""
    streams = np.random.SeedSequence(list(key)).spawn(count)
    return [np.random.Generator(np.random.PCG64(stream)) for stream in streams]


def draw_picture(digit: int, rng: np.random.Generator) -> Image.Image:
    """A picture of a digit, 32 x 32 RGB."""
    return Image.fromarray(render.picture(digit, rng))


def draw_sound(digit: int, rng: np.random.Generator) -> Audio:
    """The two tones of a digit's key, 0.2 to 0.4 s."""
    return Audio(torch.from_numpy(render.tone(digit, rng, SAMPLE_RATE))[None], SAMPLE_RATE)


def draw_film(digit: int, direction: str, rng: np.random.Generator) -> Video:
    """A film of a digit that moves "left", "right", "up" or "down"."""
    frames = render.film(digit, _STEPS[direction], rng, frames=FRAMES)
    return Video(torch.from_numpy(frames), FPS)


def write_raw_shards(
    out: Path, count: int, seed: int, samples_per_shard: int = 1000, workers: int = 1
) -> list[Path]:
    """Write scenes 0 to count - 1 of world `seed` as raw shards `dialpad-000000.tar`, ...

    Args:
        out: folder; made where it is missing, and existing shards of the same name are replaced.
        count: number of scenes.
        seed: the world.
        samples_per_shard: scenes in every shard but the last.
        workers: processes that draw; the bytes do not depend on it.

    Returns:
        The shards, in order.
    """
    return write_drawn(out, "dialpad", partial(_sample, seed), count, samples_per_shard, workers)


def _sample(seed: int, index: int) -> RawSample:
    """Key and files of one scene."""
    return f"{index:08d}", scene_files(make_scene(seed, index))


def write_drawn(
    out: Path,
    name: str,
    draw: Callable[[int], RawSample],
    count: int,
    samples_per_shard: int,
    workers: int,
) -> list[Path]:
    """`write_shards` of what `draw` makes of 0 to count - 1, in `workers` processes."""
    if workers == 1:
        return write_shards(out, name, map(draw, range(count)), samples_per_shard)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return write_shards(
            out, name, pool.imap(draw, range(count), chunksize=64), samples_per_shard
        )


def scene_files(scene: Scene, notes: Mapping[str, object] | None = None) -> dict[str, bytes]:
    """The five files of a raw sample, by extension; `notes` are further fields of the JSON."""
    facts = {"digit": scene.digit, "direction": scene.direction, "film": scene.film_caption}
    return {
        "txt": scene.caption.encode(),
        "png": encode_png(scene.image),
        "wav": encode_wav(scene.audio),
        "gif": encode_gif(scene.video),
        "json": json.dumps(facts | dict(notes or {}), sort_keys=True).encode(),
    }


def write_shards(
    out: Path,
    name: str,
    samples: Iterable[RawSample],
    samples_per_shard: int,
) -> list[Path]:
    """Write (key, {extension: bytes}) samples as `{name}-{number:06d}.tar` files in `out`.

    Every tar is written beside its final name and moved there whole; owner, mode and time of its
    members are fixed.

    Raises:
        ValueError: there are no samples, or `samples_per_shard` is below 1.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be 1 or more, got {samples_per_shard}")
    out.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    waiting: list[RawSample] = []
    for sample in samples:
        waiting.append(sample)
        if len(waiting) == samples_per_shard:
            shards.append(_write_tar(out / f"{name}-{len(shards):06d}.tar", waiting))
            waiting = []
    if waiting:
        shards.append(_write_tar(out / f"{name}-{len(shards):06d}.tar", waiting))
    if not shards:
        raise ValueError(f"{out}: no samples to write; ask for a count of 1 or more")
    return shards


def encode_gif(video: Video) -> bytes:
    """A film of at most 256 colours as a GIF without loss.

    Raises:
        ValueError: the film has more colours, two equal frames in a row (which a GIF writer joins
            to one), or a frame rate that is no whole number of 10 ms.
    """
    frames = video.frames.numpy()
    milliseconds = 1000 / video.fps
    if abs(milliseconds / 10 - round(milliseconds / 10)) > 1e-6:
        raise ValueError(f"GIF: {video.fps} frames per second is no whole number of 10 ms a frame")
    if (frames[1:] == frames[:-1]).all(axis=(1, 2, 3)).any():
        raise ValueError("GIF: two frames in a row are equal and would be joined to one")
    # One number per colour: numpy sorts numbers ten times faster than rows.
    packed = frames.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    values, indices = np.unique(packed, return_inverse=True)
    colors = np.stack([values >> 16, values >> 8, values], axis=1).astype(np.uint8)
    if len(colors) > 256:
        raise ValueError(f"GIF: the film has {len(colors)} colours; at most 256 are held exactly")
    pictures = []
    for frame in indices.reshape(frames.shape[:3]).astype(np.uint8):
        picture = Image.fromarray(frame)
        picture.putpalette(colors.tobytes())
        pictures.append(picture)
    stream = io.BytesIO()
    pictures[0].save(
        stream,
        "GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=round(milliseconds),
        loop=0,
        optimize=False,
    )
    return stream.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """A picture as a PNG."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def encode_wav(audio: Audio) -> bytes:
    """A sound as a 16-bit WAV."""
    # By NumPy: torch's threads cost several drawing processes half of their time.
    samples = np.clip(np.round(audio.samples.numpy().T * 32768), -32768, 32767)
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(audio.sample_rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return stream.getvalue()


def _write_tar(path: Path, samples: Iterable[RawSample]) -> Path:
    with replacing(path) as waiting, tarfile.open(waiting, "w", format=tarfile.USTAR_FORMAT) as tar:
        # The default TarInfo has time 0, mode 0644 and no owner: the same bytes everywhere.
        for key, files in samples:
            for extension, content in sorted(files.items()):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path
