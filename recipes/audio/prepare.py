"""Sounds and spoken digits -> raw shards at 16 kHz, in a training and a held-back part.

    python recipes/audio/prepare.py --sounds FOLDER --digits fsdd.tar --out runs/audio/raw

Held back: the last fifth of every recording, all of `UNSEEN` (a speaker that training never hears),
and takes 5 to 9 of the digits; `benchmarks/audio.py` measures on these shards. Training pieces come
at several speeds and loudnesses, which stands in for the voices and rooms that a few minutes of
sound do not have.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from unimm.data.dialpad import write_shards
from unimm.data.digits import read_fsdd

RATE = 16000
UNSEEN = {"speech-3436": "unseen_speaker-3436"}  # recordings held back whole -> their names there
TRAIN_PIECE, VAL_PIECE = 2 * RATE, 4 * RATE
# Kind of recording (the first word of its name) -> how often each second of it is heard: speech is
# a thirtieth of the music.
VERSIONS = {"speech": 40, "music": 5, "animal": 5}
SPEEDS = (0.7, 1.4)
QUIETEST = -15.0  # dB
TRAIN_TAKES, VAL_TAKES = range(10, 50), range(5, 10)

Sample = tuple[str, dict[str, bytes]]


def read(path: Path) -> Tensor:
    """A file -> mono (1, T) at 16 kHz."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = torch.from_numpy(samples).mean(1)[None]
    return torchaudio.functional.resample(mono, rate, RATE).clamp(-1, 1)


def at_speed(sound: Tensor, speed: float) -> Tensor:
    """Faster and higher, or slower and lower; to the nearest hundredth."""
    return torchaudio.functional.resample(sound, round(100 * speed), 100)


def pieces(sound: Tensor, length: int) -> Iterator[Tensor]:
    """Parts of one length; a last part of less than a quarter is left out."""
    for part in sound.split(length, dim=1):
        if part.shape[1] >= length // 4:
            yield part


def flac(sound: Tensor) -> dict[str, bytes]:
    """The files of a sample."""
    file = io.BytesIO()
    soundfile.write(file, sound.clamp(-1, 1).T.numpy(), RATE, format="FLAC", subtype="PCM_16")
    return {"flac": file.getvalue()}


def recordings(folder: Path, *, training: bool) -> Iterator[tuple[str, Tensor]]:
    """Name (kind first, then `-`) and sound of each recording's part."""
    paths = sorted(folder.glob("*.ogg"))
    if not paths:
        raise SystemExit(f"{folder}: no .ogg files; name the folder of the recordings")
    for path in paths:
        sound = read(path)
        cut = 0 if path.stem in UNSEEN else sound.shape[1] * 4 // 5
        part = sound[:, :cut] if training else sound[:, cut:]
        if part.numel():
            yield UNSEEN.get(path.stem, path.stem), part


def digit_strings(tar: Path, *, training: bool) -> Iterator[tuple[str, Tensor]]:
    """Digits of one speaker after each other, in a fixed random order, as one sound."""
    takes = TRAIN_TAKES if training else VAL_TAKES
    known = [each for each in read_fsdd(tar) if each.take in takes]
    for speaker, own in groupby(sorted(known, key=lambda r: r.speaker), key=lambda r: r.speaker):
        each = list(own)
        order = np.random.default_rng(0).permutation(len(each))
        sounds = [each[i].audio for i in order]
        joined = torch.cat([sound.samples for sound in sounds], dim=1)
        yield (
            f"digits-{speaker}",
            torchaudio.functional.resample(joined, sounds[0].sample_rate, RATE),
        )


def training_samples(sounds: Path, digits: Path) -> Iterator[Sample]:
    """Pieces of every recording in all its versions, and of the digits in one."""
    random = np.random.default_rng(0)
    sources = [(n, s, VERSIONS[n.split("-")[0]]) for n, s in recordings(sounds, training=True)]
    sources += [(n, s, 1) for n, s in digit_strings(digits, training=True)]
    for name, sound, versions in sources:
        for version in range(versions):
            speed = 1.0 if version == 0 else round(float(random.uniform(*SPEEDS)), 2)
            for number, piece in enumerate(pieces(at_speed(sound, speed), TRAIN_PIECE)):
                gain = 10 ** (random.uniform(QUIETEST, 0) / 20)
                yield f"{name}-{version:02d}-{number:04d}", flac(piece * gain)


def held_back_samples(sounds: Path, digits: Path) -> Iterator[Sample]:
    """Pieces of what is held back, as they are."""
    parts = (recordings(sounds, training=False), digit_strings(digits, training=False))
    for name, sound in chain(*parts):
        for number, piece in enumerate(pieces(sound, VAL_PIECE)):
            yield f"{name}-{number:04d}", flac(piece)


def main() -> None:
    """Write both parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sounds", type=Path, required=True, help="folder of .ogg recordings")
    parser.add_argument("--digits", type=Path, required=True, help="fsdd.tar")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write_shards(args.out / "train", "sounds", training_samples(args.sounds, args.digits), 1000)
    write_shards(args.out / "val", "sounds", held_back_samples(args.sounds, args.digits), 1000)


if __name__ == "__main__":
    main()
