import csv
import io
import json
import math
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from unimm.data.dialpad import make_scene, write_raw_shards
from unimm.evaluation.reconstruction import (
    Protocol,
    Results,
    Sample,
    bench,
    make_sample,
    prepare,
    read_samples,
    run,
)
from unimm.signals import Audio, Video
from unimm_tokenizers import build_codec
from unimm_tokenizers.codec import Codec, CodecOutput


class Uniform(Codec):
    """Every value rounded to one of `levels`: a codec whose figures are known by arithmetic."""

    name = "uniform"

    def __init__(self, levels: int, modality: str = "image", rate: int | None = None) -> None:
        super().__init__(None)
        self.levels, self.modalities, self.rate = levels, (modality,), rate
        self.refuses: int | None = None
        self.gain = nn.Parameter(torch.ones(1))

    num_codebooks = property(lambda self: 1)  # type: ignore[assignment]
    codebook_size = property(lambda self: self.levels)  # type: ignore[assignment]
    num_channels = property(lambda self: 1)  # type: ignore[assignment]
    sample_rate = property(lambda self: self.rate)  # type: ignore[assignment]
    downsample = property(lambda self: (1, 1))  # type: ignore[assignment]
    receptive_field = property(lambda self: (1, 1))  # type: ignore[assignment]

    def encode(self, x: Tensor) -> Tensor:
        if x.shape[-1] == self.refuses:
            raise RuntimeError("out of memory\nand more")
        return ((x + 1) / 2 * (self.levels - 1)).round().long()

    def decode(self, codes: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        assert size == tuple(codes.shape[2:])
        return codes.float() / (self.levels - 1) * 2 - 1

    def forward(self, x: Tensor) -> CodecOutput:
        codes = self.encode(x)
        return CodecOutput(self.decode(codes, tuple(x.shape[2:])), x, codes, x.new_zeros(()))


def _pictures(count: int = 4, side: int = 16) -> list[Sample]:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, side, side), dtype=np.uint8)
    return [make_sample(f"picture-{i}", Image.fromarray(p)) for i, p in enumerate(pixels)]


def test_a_lossless_codec_loses_nothing_and_its_rate_is_known() -> None:
    results = run({"pcm": Uniform(256)}, _pictures())
    [summary] = results.summaries
    assert summary.samples == 4
    assert summary.means["psnr"].value == 100.0
    assert summary.means["ssim"].value == pytest.approx(1.0)
    assert summary.means["bits_per_pixel"] == (8.0, 8.0, 8.0, 4)
    assert summary.tokens == 256
    assert 7.5 < summary.entropy[0] <= 8
    assert summary.encode_speed > 0
    assert summary.first_call_seconds is not None


def test_a_coarse_codec_has_the_error_of_its_rounding() -> None:
    results = run({"coarse": Uniform(17)}, _pictures(8, 64))
    # Uniform values rounded to steps of 2/16: noise of variance step^2 / 12.
    expected = 10 * math.log10(4 / ((2 / 16) ** 2 / 12))
    assert results.summaries[0].means["psnr"].value == pytest.approx(expected, abs=0.1)


def test_codecs_are_compared_on_the_same_samples() -> None:
    results = run({"fine": Uniform(64), "coarse": Uniform(16)}, _pictures())
    difference = results.compare("fine", "coarse", "psnr")
    assert difference.count == 4
    assert difference.low > 10
    assert results.compare("coarse", "fine", "psnr").value == pytest.approx(-difference.value)
    with pytest.raises(ValueError, match="share kbps on no sample"):
        results.compare("fine", "coarse", "kbps")


def test_failed_samples_are_counted_and_named_and_count_in_no_mean() -> None:
    codec = Uniform(256)
    codec.refuses = 20

    def damaged() -> Any:
        raise ValueError("file.png: cut after 12 bytes")

    samples = [*_pictures(6), *_pictures(1, side=20), Sample("broken", "image", damaged)]
    results = run({"pcm": codec}, samples)
    [summary] = results.summaries
    assert (summary.samples, summary.failed) == (6, 2)
    assert [(f.key, f.reason) for f in results.failures] == [
        ("picture-0", "out of memory"),
        ("broken", "file.png: cut after 12 bytes"),
    ]
    assert summary.means["psnr"].count == 6
    with pytest.raises(
        ValueError, match="pcm: 2 of 8 image samples failed, first picture-0: out of"
    ):
        results.check()
    run({"pcm": codec}, samples, Protocol(max_failed=0.25)).check()


def test_a_codec_that_fails_everywhere_has_no_means() -> None:
    codec = Uniform(256)
    codec.refuses = 16
    results = run({"pcm": codec}, _pictures())
    assert results.summaries[0].means == {}
    assert "| - |" in results.table()
    with pytest.raises(ValueError, match="4 of 4"):
        results.check()


def test_measures_that_are_not_defined_are_counted_apart() -> None:
    results = run({"pcm": Uniform(256)}, [*_pictures(3), *_pictures(2, side=8)])
    [summary] = results.summaries
    assert summary.undefined == {"ssim": 2}
    assert (summary.means["ssim"].count, summary.means["psnr"].count) == (3, 5)
    lines = list(csv.reader(io.StringIO(results.to_csv())))
    column = lines[0].index("ssim")
    assert [line[column] == "" for line in lines[1:]] == [False] * 3 + [True] * 2
    assert "SSIM is not defined for 2 samples" in results.report().html()


def test_sounds_have_their_own_measures_and_rates() -> None:
    sound = Audio(torch.rand(1, 8000, generator=torch.Generator().manual_seed(0)) - 0.5, 8000)
    codec = Uniform(256, "audio", rate=8000)
    results = run({"pcm": codec}, [make_sample("s", sound)])
    means = results.summaries[0].means
    assert set(means) == {"si_sdr", "mel_distance", "log_spectral_distance", "kbps"}
    assert means["kbps"].value == 64.0  # 8 bits at 8 kHz, the rate of G.711
    assert means["si_sdr"].value == pytest.approx(
        10 * math.log10((1 / 12) / ((2 / 255) ** 2 / 12)), abs=0.2
    )
    assert "x real time" in results.table()


def test_the_protocol_cuts_and_reduces() -> None:
    vision, sound = build_codec("vision-tiny-f8-video"), build_codec("soundstream-8khz")
    protocol = Protocol(max_side=32, max_seconds=0.5, max_frames=5)
    assert prepare(Image.new("RGB", (300, 100)), vision, protocol).shape == (3, 32, 32)
    assert prepare(Image.new("L", (30, 60)), vision, protocol).shape == (3, 60, 30)
    film = Video(torch.zeros(9, 48, 64, 3, dtype=torch.uint8), 10.0)
    assert prepare(film, vision, protocol).shape == (3, 5, 32, 32)
    assert prepare(Audio(torch.zeros(1, 8000), 8000), sound, protocol).shape == (1, 4000)
    whole = Protocol(max_side=None, max_seconds=None, max_frames=None)
    assert prepare(film, vision, whole).shape == (3, 9, 48, 64)
    assert prepare(Audio(torch.zeros(1, 8000), 8000), sound, whole).shape == (1, 8000)
    with pytest.raises(ValueError, match="not text"):
        prepare("words", vision, protocol)
    with pytest.raises(ValueError, match="max_side must be positive"):
        Protocol(max_side=0)


def test_reduced_pictures_keep_their_content_and_its_middle() -> None:
    wide = np.zeros((64, 192, 3), dtype=np.uint8)
    wide[:, 64:128] = 255
    codec = build_codec("vision-tiny-f8")
    signal = prepare(Image.fromarray(wide), codec, Protocol(max_side=32))
    assert float(signal[:, :, 2:-2].min()) > 0.95
    assert float(signal.max()) <= 1


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_raw_shards(folder, 6, seed=1)
    return folder


def test_shards_give_a_sample_for_every_media_file(shards: Path) -> None:
    samples = read_samples(shards)
    kinds = [sample.modality for sample in samples]
    assert {kind: kinds.count(kind) for kind in kinds} == {"image": 6, "audio": 6, "video": 6}
    first = next(sample for sample in samples if sample.modality == "image")
    item = first.load()
    assert isinstance(item, Image.Image)
    assert np.array_equal(np.asarray(item), np.asarray(make_scene(1, 0).image))
    assert [s.key for s in read_samples(str(shards / "dialpad-000000.tar"))] == [
        s.key for s in samples
    ]


def test_folders_give_their_media_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "two.PNG")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.jpg")
    with wave.open(str(tmp_path / "c.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(200))
    (tmp_path / "notes.txt").write_text("no sample")
    samples = read_samples(tmp_path)
    assert [(s.key, s.modality) for s in samples] == [
        ("b/two.PNG", "image"),
        ("c.wav", "audio"),
        ("one.jpg", "image"),
    ]
    assert all(sample.load() is not None for sample in samples)


def test_data_without_media_and_codecs_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no picture, sound or film"):
        read_samples(tmp_path)
    with pytest.raises(ValueError, match="serves audio, but the data holds image"):
        run({"pcm": Uniform(256, "audio", rate=8000)}, _pictures(1))
    with pytest.raises(ValueError, match="missing"):
        run({"pcm": Uniform(256)}, tmp_path / "nothing.tar")


def _stable(results: Results) -> list[tuple[Any, ...]]:
    return [(row.codec, row.modality, row.key, row.tokens, row.values) for row in results.rows]


def test_the_bench_writes_figures_samples_and_a_page(shards: Path, tmp_path: Path) -> None:
    names = ["vision-tiny-f8-video", "soundstream-8khz", "semantic-tiny"]
    protocol = Protocol(limit=2, examples=1)
    results = bench(names, shards, tmp_path, protocol)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html",
        "results.json",
        "samples.csv",
    ]
    stored = json.loads((tmp_path / "results.json").read_text())
    found = {(s["codec"], s["modality"]): s["samples"] for s in stored["summaries"]}
    assert found == {
        ("vision-tiny-f8-video", "image"): 2,
        ("vision-tiny-f8-video", "video"): 2,
        ("soundstream-8khz", "audio"): 2,
        ("semantic-tiny", "semantic"): 2,
    }
    assert stored["protocol"]["data_range"] == 2.0
    assert stored["summaries"][1]["means"]["motion_psnr"]["count"] == 2
    assert len((tmp_path / "samples.csv").read_text().splitlines()) == 9
    page = (tmp_path / "report.html").read_text()
    assert page.count("<audio") == 2
    assert all(name in page for name in names)
    assert "<table" in results._repr_html_()
    again = run({names[1]: build_codec(names[1])}, shards, protocol)
    assert _stable(again) == [row for row in _stable(results) if row[0] == names[1]]


def test_a_bench_with_failures_writes_its_page_and_then_says_so(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (16, 16), "red").save(data / "a.png")
    (data / "b.png").write_bytes((data / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"1 of 2 image samples failed, first b\.png"):
        bench(["vision-tiny-f8"], data, tmp_path / "out")
    assert "b.png" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(ValueError, match="no-such-codec"):
        bench(["no-such-codec"], data, tmp_path / "out")


def test_real_photographs_go_through(shared_data: Path) -> None:
    photos = shared_data / "photos" / "photos-000008.tar"
    results = run(
        {"fine": Uniform(64), "coarse": Uniform(16)}, photos, Protocol(limit=5, max_side=128)
    )
    assert len(results.rows) == 10
    assert results.failures == []
    assert results.compare("fine", "coarse", "psnr").low > 9
