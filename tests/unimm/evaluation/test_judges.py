from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from PIL import Image

from unimm.data import dialpad_render as render
from unimm.data.dialpad import DIRECTIONS, Scene, make_scene
from unimm.data.digits import load_digits, pad_pictures
from unimm.evaluation.goertzel import ToneJudge, goertzel_power, read_dtmf
from unimm.evaluation.judges import (
    FilmJudge,
    ImageJudge,
    SpeechJudge,
    TrainedJudge,
    centered_frames,
    image_tensor,
    read_direction,
    speech_features,
    train_film_judge,
    train_image_judge,
    train_speech_judge,
)
from unimm.signals import Audio, Video


def _tone(hz: tuple[float, ...], rate: int = 8000, seconds: float = 0.25) -> torch.Tensor:
    time = torch.arange(round(rate * seconds)) / rate
    return torch.stack([0.3 * torch.sin(2 * torch.pi * f * time) for f in hz]).sum(0)[None]


# --- tones -------------------------------------------------------------------------------------


def test_every_rule_made_key_is_read() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    sounds = [Audio(torch.from_numpy(render.tone(i % 10, rng))[None], 8000) for i in range(2000)]
    answers = ToneJudge()(sounds)
    right = sum(answer == i % 10 for i, answer in enumerate(answers))
    assert right / len(sounds) >= 0.995


def test_noise_silence_and_other_sounds_are_not_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [Audio(0.2 * torch.randn(1, 2400, generator=generator), 8000) for _ in range(200)]
    assert set(ToneJudge()(noise)) == {None}
    others = {
        "silence": torch.zeros(1, 2400),
        "too short": _tone((697, 1209))[:, :200],
        "empty": torch.zeros(1, 0),
        "one tone": _tone((697,)),
        "star": _tone((941, 1209)),
        "hash": _tone((941, 1477)),
        "two keys at once": _tone((697, 852, 1209)),
        "music": _tone((440, 550, 660)),
    }
    assert {name for name, x in others.items() if read_dtmf(Audio(x, 8000)) is not None} == set()


def test_keys_are_read_through_noise_gaps_rates_and_detuning() -> None:
    generator = torch.Generator().manual_seed(0)
    for digit, (row, column) in render.KEYS.items():
        hz = (render.ROW_HZ[row], render.COLUMN_HZ[column])
        clean = _tone(hz)
        noisy = clean + clean.std() * torch.randn(clean.shape, generator=generator)
        quiet_ends = torch.cat([torch.zeros(1, 3000), 0.05 * clean, torch.zeros(1, 5000)], dim=1)
        # Q.23 lets a telephone's tones be 1.5% off.
        detuned = _tone((hz[0] * 1.015, hz[1] * 0.985))
        for sound in (clean, noisy, quiet_ends, detuned, clean.repeat(2, 1)):
            assert read_dtmf(Audio(sound, 8000)) == digit
        assert read_dtmf(Audio(_tone(hz, rate=24000), 24000)) == digit


def test_tone_power_shares() -> None:
    power = goertzel_power(_tone((770.0,))[:, :320], (770.0, 1336.0), 8000)
    assert power[0, 0] == pytest.approx(1.0, abs=0.02)
    assert power[0, 1] < 0.001
    assert not goertzel_power(torch.zeros(1, 320), (770.0,), 8000).any()


def test_a_rate_too_low_is_refused() -> None:
    with pytest.raises(ValueError, match="2000 Hz cannot hold tones"):
        read_dtmf(Audio(torch.zeros(1, 2000), 2000))


# --- films: direction ---------------------------------------------------------------------------


def test_direction_of_every_film() -> None:
    scenes = [make_scene(7, index) for index in range(80)]
    assert {scene.direction for scene in scenes} == set(DIRECTIONS)
    assert [read_direction(s.video) for s in scenes] == [s.direction for s in scenes]


def test_direction_through_noise_and_blur() -> None:
    generator = torch.Generator().manual_seed(0)
    for index in range(40):
        scene = make_scene(8, index)
        frames = scene.video.frames.float()
        frames = (frames + 12 * torch.randn(frames.shape, generator=generator)).clamp(0, 255)
        blurred = torch.nn.functional.avg_pool2d(
            frames.permute(0, 3, 1, 2), 3, stride=1, padding=1, count_include_pad=False
        )
        video = Video(blurred.permute(0, 2, 3, 1).to(torch.uint8), 10.0)
        assert read_direction(video) == scene.direction


def test_no_direction_without_a_clear_way() -> None:
    scene = make_scene(7, 0)
    still = Video(scene.video.frames[:1].repeat(9, 1, 1, 1), 10.0)
    empty = Video(torch.full((9, 32, 32, 3), 90, dtype=torch.uint8), 10.0)
    one = Video(scene.video.frames[:1], 10.0)
    diagonal = torch.zeros(9, 32, 32, 3, dtype=torch.uint8)
    for t in range(9):
        diagonal[t, 4 + 2 * t : 10 + 2 * t, 4 + 2 * t : 10 + 2 * t] = 255
    for video in (still, empty, one, Video(diagonal, 10.0)):
        assert read_direction(video) is None


def test_centered_frames_put_the_digit_in_the_middle() -> None:
    frames = centered_frames(make_scene(7, 3).video)
    assert frames.shape == (9, 3, 32, 32)
    # The film shifts its digit by whole pixels, so all centred frames are the same.
    assert (frames - frames[:1]).abs().max() == 0


# --- learned judges ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(11, index, digit=index % 10) for index in range(700)]


def _digits(scenes: list[Scene]) -> torch.Tensor:
    return torch.tensor([scene.digit for scene in scenes])


@pytest.fixture(scope="module")
def image_judge(scenes: list[Scene]) -> TrainedJudge[ImageJudge]:
    images = image_tensor([scene.image for scene in scenes], 3)
    return train_image_judge(images, _digits(scenes), epochs=8)


@pytest.fixture(scope="module")
def film_judge(scenes: list[Scene]) -> TrainedJudge[FilmJudge]:
    return train_film_judge([scene.video for scene in scenes], _digits(scenes), epochs=8)


def test_image_judge_reads_new_pictures(image_judge: TrainedJudge[ImageJudge]) -> None:
    assert image_judge.examples == 70
    assert image_judge.accuracy >= 0.9
    new = [make_scene(12, index) for index in range(100)]
    answers = image_judge.judge([scene.image for scene in new])
    assert np.mean([a == s.digit for a, s in zip(answers, new, strict=True)]) >= 0.93


def test_image_judge_reads_other_sizes_and_nothing(image_judge: TrainedJudge[ImageJudge]) -> None:
    new = [make_scene(12, index) for index in range(40)]
    small = image_judge.judge([scene.image for scene in new])
    large = image_judge.judge([s.image.resize((64, 64), Image.Resampling.BICUBIC) for s in new])
    assert np.mean([a == b for a, b in zip(small, large, strict=True)]) >= 0.9
    assert image_judge.judge([]) == []


def test_film_judge_reads_digit_and_direction(film_judge: TrainedJudge[FilmJudge]) -> None:
    assert film_judge.accuracy >= 0.9
    new = [make_scene(12, index) for index in range(60)]
    answers = film_judge.judge([scene.video for scene in new])
    assert np.mean([a[0] == s.digit for a, s in zip(answers, new, strict=True)]) >= 0.93
    assert all(a[1] == s.direction for a, s in zip(answers, new, strict=True))
    empty = Video(torch.zeros(9, 32, 32, 3, dtype=torch.uint8), 10.0)
    assert film_judge.judge([empty]) == [(None, None)]


def test_training_is_deterministic_and_leaves_the_global_stream(scenes: list[Scene]) -> None:
    images = image_tensor([scene.image for scene in scenes[:60]], 3)
    labels = _digits(scenes[:60])
    before = torch.get_rng_state()
    one = train_image_judge(images, labels, seed=3, epochs=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    two = train_image_judge(images, labels, seed=3, epochs=1)
    other = train_image_judge(images, labels, seed=4, epochs=1)
    logits = [t.judge.log_probabilities(images) for t in (one, two, other)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_judge_survives_saving(image_judge: TrainedJudge[ImageJudge], tmp_path: Path) -> None:
    image_judge.judge.save(tmp_path / "judge")
    names = {path.name for path in (tmp_path / "judge").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    loaded = ImageJudge.load(tmp_path / "judge")
    images = image_tensor([make_scene(12, 0).image], 3)
    expected = image_judge.judge.log_probabilities(images)
    assert torch.equal(loaded.log_probabilities(images), expected)


def test_loading_refuses_what_is_no_such_judge(
    image_judge: TrainedJudge[ImageJudge], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"config\.json: the file is missing"):
        ImageJudge.load(tmp_path / "absent")
    folder = tmp_path / "judge"
    image_judge.judge.save(folder)
    with pytest.raises(ValueError, match="holds a judge of 'image'; expected 'speech'"):
        SpeechJudge.load(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"width": 24', '"width": 16'))
    with pytest.raises(ValueError, match="weights do not fit"):
        ImageJudge.load(folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged safetensors"):
        ImageJudge.load(folder)


def test_training_refuses_unfit_data(scenes: list[Scene]) -> None:
    labels = torch.zeros(30, dtype=torch.int64)
    with pytest.raises(ValueError, match="not \\(N, C, 32, 32\\)"):
        train_image_judge(torch.zeros(30, 3, 28, 28), labels)
    with pytest.raises(ValueError, match="30 items, but labels"):
        train_image_judge(torch.zeros(30, 3, 32, 32), labels[:20])
    with pytest.raises(ValueError, match="too few"):
        train_image_judge(torch.zeros(5, 3, 32, 32), labels[:5])
    with pytest.raises(ValueError, match="30 films, but labels"):
        train_film_judge([scene.video for scene in scenes[:30]], labels[:20])
    empty = Video(torch.zeros(9, 32, 32, 3, dtype=torch.uint8), 10.0)
    with pytest.raises(ValueError, match=r"film \d+ has an empty middle frame"):
        train_film_judge([empty] * 30, labels)


# --- speech --------------------------------------------------------------------------------------


def test_speech_features_do_not_depend_on_gain_or_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    sound = torch.nn.functional.avg_pool1d(torch.randn(1, 4000, generator=generator), 5, 1)
    full = speech_features([Audio(sound / sound.abs().max(), 8000)])
    assert full.shape == (1, 1, 40, 100)
    assert float(full.min()) >= -1
    assert float(full.max()) == pytest.approx(1.0)
    quiet = speech_features([Audio(0.05 * sound / sound.abs().max(), 8000)])
    assert torch.allclose(full, quiet, atol=1e-3)
    double = torchaudio.functional.resample(sound / sound.abs().max(), 8000, 16000)
    resampled = speech_features([Audio(double, 16000)])
    assert float((full - resampled)[..., :45].abs().mean()) < 0.03


def test_speech_features_take_short_and_long_sounds() -> None:
    sounds = [Audio(torch.rand(1, n) - 0.5, 8000) for n in (10, 300, 20000)]
    features = speech_features([*sounds, Audio(torch.rand(2, 900) - 0.5, 8000)])
    assert features.shape == (4, 1, 40, 100)
    assert bool(features.isfinite().all())


def test_speech_judge_reads_real_speech(shared_data: Path) -> None:
    # One of six speakers and few epochs: a check of the path, not the judge's full worth.
    splits = [load_digits(shared_data / "digits", split) for split in ("train", "val")]
    train, val = ([r for r in part.recordings if r.speaker == "theo"] for part in splits)
    trained = train_speech_judge(
        [r.audio for r in train],
        torch.tensor([r.digit for r in train]),
        validation=([r.audio for r in val], torch.tensor([r.digit for r in val])),
        epochs=6,
    )
    assert trained.examples == 50
    assert trained.accuracy >= 0.9
    silence, empty = Audio(torch.zeros(1, 4000), 8000), Audio(torch.zeros(1, 0), 8000)
    answers = trained.judge([silence, val[0].audio, empty])
    assert answers[0] is None
    assert answers[1] in range(10)
    assert answers[2] is None


@pytest.mark.slow
def test_full_judges_reach_their_goals(shared_data: Path) -> None:
    train, val = (load_digits(shared_data / "digits", split) for split in ("train", "val"))
    images, held = (
        torch.from_numpy(pad_pictures(part.pictures))[:, None].float() / 127.5 - 1
        for part in (train, val)
    )
    image = train_image_judge(
        images,
        torch.from_numpy(train.labels),
        validation=(held, torch.from_numpy(val.labels)),
    )
    assert image.accuracy >= 0.985
    speech = train_speech_judge(
        [r.audio for r in train.recordings],
        torch.tensor([r.digit for r in train.recordings]),
        validation=(
            [r.audio for r in val.recordings],
            torch.tensor([r.digit for r in val.recordings]),
        ),
    )
    assert speech.accuracy >= 0.95
