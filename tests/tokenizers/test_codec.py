"""What every codec keeps: shapes, batches, files, and refusals in one line."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unimm_tokenizers import Codec, CodecOutput
from unimm_tokenizers.audio import (
    SoundStreamCodec,
    SoundStreamConfig,
    SpectralCodec,
    SpectralConfig,
)
from unimm_tokenizers.codec import codec_from_config, register_codec
from unimm_tokenizers.storage import CONFIG_FILE, WEIGHTS_FILE, load_tensors
from unimm_tokenizers.vision import VisionCodec, VisionConfig

SMALL: dict[str, Any] = {"channels": 8, "latent_channels": 8}
CODECS: dict[str, tuple[type[Codec], Any]] = {
    "pictures": (VisionCodec, VisionConfig(**SMALL, multipliers=(1, 2), codebook_size=32)),
    "grey": (
        VisionCodec,
        VisionConfig(**SMALL, multipliers=(1,), num_channels=1, codebook_size=256),
    ),
    "fsq": (VisionCodec, VisionConfig(**SMALL, multipliers=(1, 1), fsq_levels=(4, 3))),
    "film": (
        VisionCodec,
        VisionConfig(**SMALL, multipliers=(1, 2), time_downsample=4, codebook_size=128),
    ),
    "soundstream": (
        SoundStreamCodec,
        SoundStreamConfig(
            **SMALL, strides=(2, 5), dilations=(1, 3), num_codebooks=3, codebook_size=16
        ),
    ),
    "stereo": (
        SoundStreamCodec,
        SoundStreamConfig(
            **SMALL,
            num_channels=2,
            strides=(4,),
            dilations=(1,),
            num_codebooks=1,
            codebook_size=64,
        ),
    ),
    "spectral": (
        SpectralCodec,
        SpectralConfig(
            **SMALL, window=32, hop=8, downsample=2, num_blocks=2, num_codebooks=2, codebook_size=16
        ),
    ),
}


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> Codec:
    """After one training pass, which fits the codebooks to what the encoder gives out."""
    codec_class, config = CODECS[request.param]
    codec = codec_class(config).train()
    size = (640,) if codec.modality == "audio" else (32, 32)
    with torch.no_grad():
        codec(signal(codec, size, batch=8))
    return codec.eval()


def grids(codec: Codec) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Signal sizes, from the smallest on and odd, and the code grids that they must give."""
    if codec.modality == "audio":
        hop = codec.downsample[0]
        return [((n,), (-(-n // hop),)) for n in (1, hop - 1, hop, hop + 1, 4 * hop + 3)]
    time, space = (codec.downsample[0], codec.downsample[-1])
    sides = [(1, 1), (1, 9), (7, 2), (space, space), (2 * space + 1, 13)]
    cells = [tuple(-(-n // space) for n in side) for side in sides]
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = list(zip(sides, cells, strict=True))
    if "video" in codec.modalities:
        for frames in (1, 2, time, time + 1, time + 2):
            side, cell = (9, 5), (-(-9 // space), -(-5 // space))
            found.append(((frames, *side), (1 + -(-(frames - 1) // time), *cell)))
    return found


def signal(codec: Codec, size: tuple[int, ...], batch: int = 1) -> Tensor:
    return torch.rand(batch, codec.num_channels, *size) * 2 - 1


def any_size(codec: Codec) -> tuple[int, ...]:
    return grids(codec)[4][0]


@torch.no_grad()
def test_any_size_comes_back(codec: Codec) -> None:
    for size, grid in grids(codec):
        x = signal(codec, size, batch=2)
        codes = codec.encode(x)
        assert codes.dtype == torch.int64
        assert codes.shape == (2, codec.num_codebooks, *grid)
        assert 0 <= int(codes.min()) <= int(codes.max()) < codec.codebook_size
        made = codec.decode(codes, size)
        assert made.shape == x.shape
        assert made.dtype == torch.float32
        assert bool(made.isfinite().all())
        assert made.abs().max() <= 1
        whole = codec.decode(codes)
        assert torch.equal(whole[(..., *(slice(0, n) for n in size))], made)
        units = [n * d for n, d in zip(grid, codec.downsample[-len(grid) :], strict=True)]
        if len(grid) == 3:  # the first code frame stands for one frame
            units[0] = 1 + (grid[0] - 1) * codec.downsample[0]
        assert list(whole.shape[2:]) == units


@torch.no_grad()
def test_a_batch_is_each_of_its_rows(codec: Codec) -> None:
    x = signal(codec, any_size(codec), batch=5)
    codes = codec.encode(x)
    assert len(codes.unique()) > 2
    made = codec.decode(codes)
    for row in range(5):
        part = slice(row, row + 1)
        assert torch.equal(codec.encode(x[part]), codes[part])
        torch.testing.assert_close(codec.decode(codes[part]), made[part], rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_code_decodes_and_the_same_way_twice(codec: Codec) -> None:
    _, grid = grids(codec)[4]
    codes = torch.randint(codec.codebook_size, (3, codec.num_codebooks, *grid))
    made = codec.decode(codes)
    assert bool(made.isfinite().all())
    assert torch.equal(codec.decode(codes), made)


@torch.no_grad()
def test_any_float_is_taken(codec: Codec) -> None:
    x = signal(codec, any_size(codec))
    codes = codec.encode(x.half().float())
    assert torch.equal(codec.encode(x.half().double()), codes)
    assert torch.equal(codec.encode(x.half()), codes)


def test_a_training_pass(codec: Codec) -> None:
    """Gradients reach the encoder and the decoder; codes are those of the grid."""
    codec.train()
    size, grid = grids(codec)[4]
    output = codec(signal(codec, size, batch=4))
    assert isinstance(output, CodecOutput)
    assert output.reconstruction.shape == output.target.shape
    assert output.codes.shape == (4, codec.num_codebooks, *grid)
    assert output.loss.ndim == 0
    assert float(output.loss.detach()) >= 0
    ((output.reconstruction - output.target).square().mean() + output.loss).backward()
    for name, parameter in codec.named_parameters():
        if "vq" not in name:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name


def test_describes_itself(codec: Codec) -> None:
    assert codec.modality in codec.modalities
    assert (codec.sample_rate is None) == (codec.modality == "image")
    if codec.sample_rate is not None:
        assert codec.frame_rate == codec.sample_rate / codec.downsample[0]
    else:
        assert codec.frame_rate is None
    assert len(codec.receptive_field) == len(codec.downsample)
    pairs = zip(codec.receptive_field, codec.downsample, strict=True)
    assert all(field >= step for field, step in pairs)


# Refusals


def test_bad_signals_are_refused(codec: Codec) -> None:
    size = any_size(codec)
    good = signal(codec, size)
    nan = good.clone()
    nan.view(-1)[-1] = math.nan
    cases = [
        (good[:, :0], "channels"),
        (torch.cat([good, good, good[:, :1]], 1), "channels"),
        (good[0], "expected a signal"),
        (good[..., None, None], "expected a signal"),
        (good.long(), "expected a float signal in .* got torch.int64"),
        (nan, "NaN or infinite"),
        (good + math.inf, "NaN or infinite"),
        (good * 127 + 200, r"expected values in \[-1, 1\], found up to"),
    ]
    for x, message in cases:
        with pytest.raises(ValueError, match=rf"^{codec.name}: .*{message}") as caught:
            codec.encode(x)
        assert "\n" not in str(caught.value)


def test_bad_codes_are_refused(codec: Codec) -> None:
    _, grid = grids(codec)[4]
    good = torch.zeros(1, codec.num_codebooks, *grid, dtype=torch.int64)
    high = codec.codebook_size - 1
    cases = [
        (good - 1, f"codes must lie in 0 to {high}, found -1 to -1"),
        (good + codec.codebook_size, f"found {high + 1} to {high + 1}"),
        (torch.cat([good, good[:, :1]], 1), f"expected codes .*{codec.num_codebooks} levels"),
        (good[0], "expected codes"),
        (good.float(), "expected codes of int64, got torch.float32"),
        (good.int(), "expected codes of int64, got torch.int32"),
    ]
    for codes, message in cases:
        with pytest.raises(ValueError, match=rf"^{codec.name}: .*{message}"):
            codec.decode(codes)


# Files


@torch.no_grad()
def test_save_and_load(codec: Codec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path)
    again = Codec.from_pretrained(tmp_path)
    assert type(again) is type(codec)
    assert again.config == codec.config
    assert not again.training
    x = signal(codec, any_size(codec), batch=2)
    codes = codec.encode(x)
    assert torch.equal(again.encode(x), codes)
    assert torch.equal(again.decode(codes), codec.decode(codes))


@torch.no_grad()
def test_statistics_stay_behind(codec: Codec, tmp_path: Path) -> None:
    """Running sums of the codebooks serve training alone, and start anew where it goes on."""
    codec.save_pretrained(tmp_path)
    endings = codec.quantizer.statistics
    stored = load_tensors(tmp_path)
    assert stored.keys() == {k for k in codec.state_dict() if not k.endswith(endings)}
    again = Codec.from_pretrained(tmp_path)
    x = signal(codec, any_size(codec), batch=2)
    codes = again.encode(x)
    state = {k: v.clone() for k, v in again.state_dict().items() if k.endswith("codebooks.codes")}
    again.train()(x)
    for name, before in state.items():  # a decay of 0.97: one pass moves no code far
        step = (again.state_dict()[name] - before).norm(dim=-1)
        assert step.median() < 0.1 * before.norm(dim=-1).max()
    assert codes.shape == again.eval().encode(x).shape


@torch.no_grad()
def test_half_size_files(codec: Codec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path / "whole")
    codec.save_pretrained(tmp_path / "half", torch.float16)
    sizes = [(tmp_path / name / WEIGHTS_FILE).stat().st_size for name in ("half", "whole")]
    assert sizes[0] < sizes[1]
    again = Codec.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    codes = codec.encode(signal(codec, any_size(codec)))
    torch.testing.assert_close(again.decode(codes), codec.decode(codes), rtol=0, atol=0.02)


def saved(folder: Path, **changes: Any) -> Path:
    codec_class, config = CODECS["pictures"]
    codec_class(config).save_pretrained(folder)
    if changes:
        stored = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps({**stored, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "jpeg"}, "codec class 'jpeg' is unknown; known are .*soundstream.*vision"),
        ({"codec": None}, "codec class 'None' is unknown"),
        ({"chanels": 8}, "config key 'chanels' is unknown to VisionConfig"),
        ({"channels": 16}, "weights do not fit the config, first at '"),
        ({"multipliers": [1]}, "weights do not fit the config, first at '"),
        ({"time_downsample": 3}, "time_downsample must be 1, 2, 4 or 8, got 3"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = saved(tmp_path / "codec", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        Codec.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{re.escape(str(weights))}: damaged safetensors"):
        Codec.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(str(weights))}: the file is missing"):
        Codec.from_pretrained(folder)
    config = folder / CONFIG_FILE
    config.write_text("[]")
    with pytest.raises(ValueError, match=rf"{re.escape(str(config))}: expected a JSON object"):
        Codec.from_pretrained(folder)
    config.write_text("{")
    with pytest.raises(ValueError, match=rf"{re.escape(str(config))}: not valid JSON"):
        Codec.from_pretrained(folder)
    config.unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(str(config))}: the file is missing"):
        Codec.from_pretrained(folder)


def test_a_class_reads_its_own_kind(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    assert VisionCodec.from_pretrained(folder).modality == "image"
    with pytest.raises(ValueError, match=r"holds a 'vision' codec, not a 'soundstream'"):
        SoundStreamCodec.from_pretrained(folder)


def test_codecs_of_others_register_under_a_name() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class TinyConfig:
        num_channels: int = 1
        sides: tuple[int, ...] = (1, 2)

    @register_codec("tiny-of-another-package")
    class TinyCodec(Codec):
        config_class = TinyConfig
        modalities = ("image",)

        @property
        def downsample(self) -> tuple[int, ...]:
            return (1, 1)

        @property
        def receptive_field(self) -> tuple[int, ...]:
            return (1, 1)

        def encode(self, x: Tensor) -> Tensor:
            return ((x + 1) * 127.5).round().long()

        def decode(self, codes: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
            return codes / 127.5 - 1

        def forward(self, x: Tensor) -> CodecOutput:
            return CodecOutput(x, x, self.encode(x), x.new_zeros(()))

    codec = codec_from_config("tiny-of-another-package", {"sides": [3, 4]}, "here")
    assert isinstance(codec, TinyCodec)
    assert codec.config.sides == (3, 4)
    assert codec.name == "tiny-of-another-package"
    with pytest.raises(ValueError, match=r"^there: config key 'side' is unknown to TinyConfig"):
        codec_from_config("tiny-of-another-package", {"side": 3}, "there")
