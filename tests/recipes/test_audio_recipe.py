"""The audio recipe: what is held back stays out of training, and the debug run learns."""

import importlib.util
import io
import json
import tarfile
import wave
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch

from unimm.data import dialpad
from unimm.data.shards import ShardReader
from unimm.training.launch import launch

RECIPE = Path(__file__).parents[2] / "recipes" / "audio"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", RECIPE / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digit_tar(path: Path) -> Path:
    """Takes 4 (never used), 5 (held back) and 10 to 13 of two speakers, a tone per take."""
    with tarfile.open(path, "w") as tar:
        for speaker in ("ann", "bob"):
            for take in (4, 5, 10, 11, 12, 13):
                file = io.BytesIO()
                with wave.open(file, "wb") as out:
                    out.setparams((1, 2, 8000, 0, "NONE", ""))
                    tone = 8000 * np.sin(0.05 * take * np.arange(4000))
                    out.writeframes(tone.astype("<i2").tobytes())
                member = tarfile.TarInfo(f"{take % 10}_{speaker}_{take}.wav")
                member.size = file.tell()
                file.seek(0)
                tar.addfile(member, file)
    return path


def test_what_is_held_back_is_not_trained_on(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last fifth of a recording is a high tone, the rest a low one; so in the shards."""
    monkeypatch.setattr(prepare, "VERSIONS", {"speech": 1, "music": 1})
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    time = np.arange(10 * 8000) / 8000
    pitch = np.where(time < 8, 500, 2000)
    for name in ("music-tones", "speech-3436"):
        soundfile.write(sounds / f"{name}.ogg", 0.5 * np.sin(2 * np.pi * pitch * time), 8000)
    digits = digit_tar(tmp_path / "fsdd.tar")
    train = dict(prepare.training_samples(sounds, digits))
    held = dict(prepare.held_back_samples(sounds, digits))

    def frequency(files: dict[str, bytes]) -> float:
        samples, rate = soundfile.read(io.BytesIO(files["flac"]))
        assert rate == 16000
        power = torch.fft.rfft(torch.from_numpy(samples)).abs()
        return float(power.argmax()) * rate / len(samples)

    assert {round(frequency(f), -2) for k, f in train.items() if k.startswith("music")} == {500}
    assert {round(frequency(f), -2) for k, f in held.items() if k.startswith("music")} == {2000}
    assert not any("3436" in key for key in train)
    assert sum(key.startswith("unseen_speaker-3436-") for key in held) == 3
    # Half a second a take: of training four, of what is held back one, less than a piece.
    lengths = {
        key: soundfile.info(io.BytesIO(files["flac"])).frames
        for key, files in train.items()
        if key.startswith("digits")
    }
    assert lengths == {f"digits-{speaker}-00-0000": 32000 for speaker in ("ann", "bob")}


def test_the_shards_are_there_and_missing_folders_are_named(
    prepare: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"no \.ogg files; name the folder of the recordings"):
        list(prepare.recordings(tmp_path, training=True))
    dialpad.write_shards(tmp_path / "out", "sounds", [("a", prepare.flac(torch.zeros(1, 99)))], 9)
    (sample,) = list(ShardReader(tmp_path / "out" / "sounds-000000.tar"))
    assert "flac" in sample


def test_the_debug_run_learns_what_is_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RECIPE.parents[1])  # the recipe names its expected.json from there
    dialpad.write_raw_shards(tmp_path / "raw", 40, seed=0)
    cli = launch(
        [
            *("-c", str(RECIPE / "debug.yaml")),
            *("--trainer.default_root_dir", str(tmp_path / "run")),
            *("--data.init_args.shards", str(tmp_path / "raw")),
            *("--data.init_args.val_shards", str(tmp_path / "raw")),
            *("--trainer.enable_progress_bar", "false"),
        ]
    )
    assert cli.trainer.global_step == 20
    expected = json.loads((RECIPE / "expected.json").read_text())
    assert set(expected["losses"]) == {"1", "10", "20"}
    assert expected["losses"]["20"] < 0.8 * expected["losses"]["1"]
