"""Sheets and sounds that show what a codec makes of its input."""

from pathlib import Path

import lightning
import numpy as np
import soundfile
import torch
from PIL import Image

from unimm.training import CodecTask, WriteReconstructions
from unimm.training.callbacks import write_sheet, write_sounds
from unimm_tokenizers.losses import PictureObjective
from unimm_tokenizers.vision import VisionCodec, VisionConfig

CODEC = VisionConfig(channels=8, multipliers=(1, 2), patch=4, latent_channels=8, fsq_levels=(4, 4))


def test_what_codes_hold_beyond_the_signal_is_not_shown(tmp_path: Path) -> None:
    task = CodecTask(VisionCodec(CODEC), PictureObjective())
    trainer = lightning.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    batch = {"image": torch.rand(3, 3, 30, 26) * 2 - 1}
    WriteReconstructions(2).on_validation_batch_end(trainer, task, None, batch, 0)
    with Image.open(tmp_path / "samples/step=0/image.png") as sheet:
        assert sheet.size == (2 * 26, 2 * 30)
    WriteReconstructions().on_validation_batch_end(trainer, task, None, batch, 1)
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_originals_stand_above(tmp_path: Path) -> None:
    write_sheet(tmp_path / "a.png", torch.ones(2, 1, 4, 5), -torch.ones(2, 1, 4, 5))
    with Image.open(tmp_path / "a.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (8, 10, 3)
    assert (pixels[:4] == 255).all()
    assert (pixels[4:] == 0).all()


def test_films_are_strips(tmp_path: Path) -> None:
    films = torch.linspace(-1, 1, 3).view(1, 1, 3, 1, 1).expand(2, 3, 3, 4, 5)
    write_sheet(tmp_path / "a.png", films, films)
    with Image.open(tmp_path / "a.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (16, 15, 3)
    assert pixels[0, ::5, 0].tolist() == [0, 128, 255]


def test_sounds_are_files(tmp_path: Path) -> None:
    real, made = torch.full((1, 2, 80), 0.5), torch.zeros(1, 2, 80)
    write_sounds(tmp_path, real, made, 8000)
    for name, level in (("original", 0.5), ("reconstruction", 0.0)):
        samples, rate = soundfile.read(tmp_path / f"0-{name}.wav")
        assert (samples.shape, rate) == ((80, 2), 8000)
        assert np.abs(samples - level).max() < 1e-3
