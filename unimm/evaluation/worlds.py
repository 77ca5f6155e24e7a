"""Judged worlds: validation scenes as prompts, and judges that read what a model answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unimm.data import dialpad, digits
from unimm.data.dialpad import WORDS, Scene
from unimm.data.worlds import World
from unimm.evaluation.accuracy import Answer, Direction, Judge, read_text
from unimm.evaluation.goertzel import ToneJudge
from unimm.evaluation.judges import (
    FilmJudge,
    ImageJudge,
    SpeechJudge,
    TrainedJudge,
    image_tensor,
    train_film_judge,
    train_image_judge,
    train_speech_judge,
)
from unimm.signals import Audio, Document, Video
from unimm_tokenizers.storage import read_json, write_json

JUDGE_SEED = 7  # the judges' own training scenes (dial-pad); prompts come from another world
PROMPT_SEED = 1_000_003
_DIALPAD_PICTURES = 3000
_DIALPAD_FILMS = 600
_DIALPAD_SOUNDS = 500
_DIGITS_FILMS = 3000


class Prompts(NamedTuple):
    """Prompts of a direction and the right answer to each."""

    documents: list[Document]
    answers: list[Answer]


@dataclass(frozen=True)
class Judged:
    """Judges by modality, and the accuracy of each on held-out real items."""

    judges: dict[str, Judge]
    accuracy: dict[str, float]


def check_data(world: World, data: Path | None) -> None:
    """Refuse a world of real data without its folder, and a folder for one that needs none.

    Raises:
        ValueError: says which of the two.
    """
    if world == "digits" and data is None:
        raise ValueError("this recipe needs real data: name its folder with --data")
    if world == "dialpad" and data is not None:
        raise ValueError(f"this recipe makes its own data: leave out --data {data}")


def validation_scenes(world: World, data: Path | None, count: int) -> list[Scene]:
    """Scenes that no training has seen."""
    check_data(world, data)
    if world == "dialpad":
        return [dialpad.make_scene(PROMPT_SEED, index) for index in range(count)]
    assert data is not None
    unseen = digits.DigitsWorld(digits.load_digits(data, "val"), augment=False, seed=PROMPT_SEED)
    return [scene for scene, _ in unseen.scenes(count)]


def prompts_for(direction: Direction, scenes: Sequence[Scene]) -> Prompts:
    """What is shown of each scene, and what should come back."""
    return Prompts(
        [_shown(direction, scene) for scene in scenes],
        [_answer(direction.target, scene) for scene in scenes],
    )


def _shown(direction: Direction, scene: Scene) -> Document:
    if direction.source == "text":
        return [scene.film_caption if direction.target == "video" else scene.caption]
    return [{"image": scene.image, "audio": scene.audio, "video": scene.video}[direction.source]]


def _answer(target: str, scene: Scene) -> Answer:
    if target == "text":
        return WORDS[scene.digit]
    return (scene.digit, scene.direction) if target == "video" else scene.digit


def judges(world: World, data: Path | None, folder: Path) -> Judged:
    """Judges of a world; trained once, then read from `folder`."""
    check_data(world, data)
    trainers = _dialpad_trainers() if data is None else _digits_trainers(data)
    figures = folder / "accuracy.json"
    accuracy: dict[str, float] = read_json(figures) if figures.exists() else {}
    found: dict[str, Judge] = {"text": read_text}
    for modality, (kind, train) in trainers.items():
        place = folder / modality
        if modality not in accuracy:
            trained = train()
            trained.judge.save(place)
            accuracy[modality] = trained.accuracy
            write_json(figures, accuracy)
        found[modality] = kind.load(place)
    if world == "dialpad":
        found["audio"] = ToneJudge()
        accuracy["audio"] = _accuracy(found["audio"], _sounds(_DIALPAD_SOUNDS))
    return Judged(found, accuracy)


def _sounds(count: int) -> list[tuple[Audio, int]]:
    """Dial-pad sounds with their digits, from the judges' own world."""
    scenes = (dialpad.make_scene(JUDGE_SEED, index) for index in range(count))
    return [(scene.audio, scene.digit) for scene in scenes]


def _accuracy(judge: Judge, items: Sequence[tuple[Any, int]]) -> float:
    read = judge([item for item, _ in items])
    return float(np.mean([a == digit for a, (_, digit) in zip(read, items, strict=True)]))


_Trainers = dict[str, tuple[type, Callable[[], TrainedJudge]]]


def _dialpad_trainers() -> _Trainers:
    def picture() -> TrainedJudge[ImageJudge]:
        scenes = [dialpad.make_scene(JUDGE_SEED, index) for index in range(_DIALPAD_PICTURES)]
        return train_image_judge(
            image_tensor([scene.image for scene in scenes], 3), _labels(scenes), epochs=8
        )

    def film() -> TrainedJudge[FilmJudge]:
        scenes = [dialpad.make_scene(JUDGE_SEED, index) for index in range(_DIALPAD_FILMS)]
        return train_film_judge([scene.video for scene in scenes], _labels(scenes))

    return {"image": (ImageJudge, picture), "video": (FilmJudge, film)}


def _digits_trainers(data: Path) -> _Trainers:
    @cache  # read only where a judge is still to be trained
    def split(name: Literal["train", "val"]) -> digits.DigitsData:
        return digits.load_digits(data, name)

    def pixels(part: digits.DigitsData) -> tuple[Tensor, Tensor]:
        padded = torch.from_numpy(digits.pad_pictures(part.pictures))[:, None]
        return padded.float() / 127.5 - 1, torch.as_tensor(part.labels).long()

    def sounds(part: digits.DigitsData) -> tuple[list[Audio], Tensor]:
        recordings = part.recordings
        return [r.audio for r in recordings], torch.tensor([r.digit for r in recordings])

    def films(part: digits.DigitsData, count: int) -> tuple[list[Video], Tensor]:
        world = digits.DigitsWorld(part, augment=False, seed=JUDGE_SEED)
        scenes = [scene for scene, _ in world.scenes(count)]
        return [scene.video for scene in scenes], _labels(scenes)

    def picture() -> TrainedJudge[ImageJudge]:
        return train_image_judge(*pixels(split("train")), validation=pixels(split("val")))

    def speech() -> TrainedJudge[SpeechJudge]:
        return train_speech_judge(*sounds(split("train")), validation=sounds(split("val")))

    def film() -> TrainedJudge[FilmJudge]:
        made, held_out = films(split("train"), _DIGITS_FILMS), films(split("val"), 500)
        return train_film_judge(*made, validation=held_out)

    return {
        "image": (ImageJudge, picture),
        "audio": (SpeechJudge, speech),
        "video": (FilmJudge, film),
    }


def _labels(scenes: Sequence[Scene]) -> Tensor:
    return torch.tensor([scene.digit for scene in scenes])
