"""Judged worlds: what is shown and expected in each direction, and judges that are kept."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from unimm.data import dialpad
from unimm.evaluation import worlds
from unimm.evaluation.accuracy import Direction
from unimm.evaluation.judges import (
    DigitNetwork,
    FilmJudge,
    ImageJudge,
    NetworkConfig,
    SpeechJudge,
)
from unimm.evaluation.worlds import check_data, judges, prompts_for, validation_scenes
from unimm.signals import Audio
from unimm_tokenizers.storage import write_json

SCENES = [dialpad.make_scene(5, index) for index in range(3)]
MEDIA = ("image", "audio", "video")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judges of a few scenes."""
    monkeypatch.setattr(worlds, "_DIALPAD_PICTURES", 40)
    monkeypatch.setattr(worlds, "_DIALPAD_FILMS", 30)
    monkeypatch.setattr(worlds, "_DIALPAD_SOUNDS", 20)


@pytest.mark.parametrize(("source", "target"), [*product(MEDIA, ("text", *MEDIA))])
def test_a_medium_is_shown_as_it_is(source: str, target: str) -> None:
    prompts = prompts_for(Direction(source=source, target=target), SCENES)
    for (shown,), scene in zip(prompts.documents, SCENES, strict=True):
        assert shown is getattr(scene, source)


@pytest.mark.parametrize("target", ["image", "audio"])
def test_a_picture_or_a_sound_is_asked_for_by_its_word(target: str) -> None:
    prompts = prompts_for(Direction(source="text", target=target), SCENES)
    assert prompts.documents == [[scene.caption] for scene in SCENES]
    assert prompts.answers == [scene.digit for scene in SCENES]


def test_a_film_is_asked_for_by_word_and_way() -> None:
    prompts = prompts_for(Direction(source="text", target="video"), SCENES)
    assert prompts.documents == [[f"{scene.caption} {scene.direction}"] for scene in SCENES]
    assert prompts.answers == [(scene.digit, scene.direction) for scene in SCENES]


@pytest.mark.parametrize("source", MEDIA)
def test_words_are_the_answer_to_everything_else(source: str) -> None:
    prompts = prompts_for(Direction(source=source, target="text"), SCENES)
    assert prompts.answers == [scene.caption for scene in SCENES]


def test_prompts_come_from_a_world_of_their_own() -> None:
    scenes = validation_scenes("dialpad", None, 8)
    assert len(scenes) == 8
    # The recipe's seeds of training and validation, and the judges'.
    for seed in (0, 1, worlds.JUDGE_SEED):
        others = [dialpad.make_scene(seed, index) for index in range(8)]
        pictures = {scene.image.tobytes() for scene in others}
        assert not pictures & {scene.image.tobytes() for scene in scenes}


def test_real_scenes_are_those_of_the_validation_split(shared_data: Path) -> None:
    first, second = (validation_scenes("digits", shared_data / "digits", 12) for _ in range(2))
    assert len(first) == 12
    assert [scene.digit for scene in first] == [scene.digit for scene in second]
    assert np.array_equal(np.asarray(first[0].image), np.asarray(second[0].image))


def test_data_is_named_where_it_is_needed_and_only_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs real data: name its folder with --data"):
        check_data("digits", None)
    with pytest.raises(ValueError, match="makes its own data: leave out --data"):
        check_data("dialpad", tmp_path)
    with pytest.raises(ValueError, match="needs real data"):
        validation_scenes("digits", None, 3)
    with pytest.raises(ValueError, match="needs real data"):
        judges("digits", None, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_judges_are_trained_once_and_read_again(tmp_path: Path) -> None:
    first = judges("dialpad", None, tmp_path)
    assert first.judges.keys() == {"text", "image", "video", "audio"}
    assert first.accuracy.keys() == {"image", "video", "audio"}
    assert all(0 <= value <= 1 for value in first.accuracy.values())
    assert first.accuracy["audio"] > 0.9  # the tones are read by rule
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    times = {path: path.stat().st_mtime_ns for path in files}
    second = judges("dialpad", None, tmp_path)
    assert second.accuracy == first.accuracy
    assert {path: path.stat().st_mtime_ns for path in files} == times
    for modality in MEDIA:
        items = [getattr(scene, modality) for scene in SCENES]
        assert second.judges[modality](items) == first.judges[modality](items)
    assert first.judges["text"]([" seven "]) == ["seven"]
    assert first.judges["audio"]([Audio(torch.zeros(1, 800), 8000)]) == [None]


@pytest.mark.usefixtures("small")
def test_a_training_that_was_stopped_goes_on_with_the_judge_that_is_missing(
    tmp_path: Path,
) -> None:
    network = DigitNetwork(NetworkConfig(channels=3)).eval()
    ImageJudge(network).save(tmp_path / "image")
    write_json(tmp_path / "accuracy.json", {"image": 0.25})
    before = (tmp_path / "image/model.safetensors").stat().st_mtime_ns
    assert judges("dialpad", None, tmp_path).accuracy["image"] == 0.25
    assert (tmp_path / "image/model.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "video/model.safetensors").is_file()


def test_judges_that_are_kept_need_no_data(tmp_path: Path) -> None:
    picture, sound = NetworkConfig(channels=1), NetworkConfig(channels=1, grid=(5, 4))
    ImageJudge(DigitNetwork(picture).eval()).save(tmp_path / "image")
    SpeechJudge(DigitNetwork(sound).eval()).save(tmp_path / "audio")
    FilmJudge(DigitNetwork(NetworkConfig(channels=3)).eval()).save(tmp_path / "video")
    figures = {"image": 0.99, "audio": 0.98, "video": 0.97}
    write_json(tmp_path / "accuracy.json", figures)
    judged = judges("digits", tmp_path / "nowhere", tmp_path)
    assert judged.accuracy == figures
    (answer,) = judged.judges["audio"]([SCENES[0].audio])
    assert answer in range(10)


def test_a_damaged_judge_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "accuracy.json", {"image": 0.9, "video": 0.9})
    with pytest.raises(ValueError, match=r"image/config\.json: the file is missing"):
        judges("dialpad", None, tmp_path)
