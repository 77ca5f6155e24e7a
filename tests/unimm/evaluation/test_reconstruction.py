import csv
import dataclasses
import io
import json
import math
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from unimm.cli import main
from unimm.data.dialpad import make_scene, write_raw_shards
from unimm.evaluation.reconstruction import (
    Protocol,
    Results,
    Sample,
    bench,
    combined,
    given,
    make_sample,
    read_results,
    read_samples,
    reference,
    report,
    run,
    taken,
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


class Colour(Uniform):
    """The same of three channels, each a level of codes."""

    num_codebooks = property(lambda self: 3)  # type: ignore[assignment]
    num_channels = property(lambda self: 3)  # type: ignore[assignment]


QUICK = Protocol(limit=5, max_side=128, exactness=0, probes=False)


def _pictures(count: int = 4, side: int = 16) -> list[Sample]:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, side, side), dtype=np.uint8)
    return [make_sample(f"picture-{i}", Image.fromarray(p)) for i, p in enumerate(pixels)]


def test_a_lossless_codec_loses_nothing_and_its_rate_is_known() -> None:
    results = run({"pcm": Uniform(256)}, _pictures(), QUICK)
    [summary] = results.summaries
    assert summary.samples == 4
    assert summary.means["psnr"].value == 100.0
    assert summary.means["ssim"].value == pytest.approx(1.0)
    assert summary.means["bits_per_pixel"] == (8.0, 8.0, 8.0, 4)
    assert summary.tokens == 256
    assert summary.token_rate == 1
    assert 7.5 < summary.entropy[0] <= 8
    assert summary.encode_speed > 0
    assert summary.first_call_seconds is not None


def test_a_coarse_codec_has_the_error_of_its_rounding() -> None:
    results = run({"coarse": Uniform(17)}, _pictures(5, 64), QUICK)
    # Uniform values rounded to steps of 2/16: noise of variance step^2 / 12.
    expected = 10 * math.log10(4 / ((2 / 16) ** 2 / 12))
    assert results.summaries[0].means["psnr"].value == pytest.approx(expected, abs=0.1)


def test_codecs_are_compared_on_the_same_samples() -> None:
    results = run({"fine": Uniform(64), "coarse": Uniform(16)}, _pictures(), QUICK)
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
    quick = dataclasses.replace(QUICK, limit=None)
    results = run({"pcm": codec}, samples, quick)
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
    run({"pcm": codec}, samples, dataclasses.replace(quick, max_failed=0.25)).check()


def test_a_codec_that_fails_everywhere_has_no_means() -> None:
    codec = Uniform(256)
    codec.refuses = 16
    results = run({"pcm": codec}, _pictures(), QUICK)
    assert results.summaries[0].means == {}
    assert "| - |" in results.table()
    with pytest.raises(ValueError, match="4 of 4"):
        results.check()


def test_measures_that_are_not_defined_are_counted_apart() -> None:
    results = run({"pcm": Uniform(256)}, [*_pictures(3), *_pictures(2, side=8)], QUICK)
    [summary] = results.summaries
    assert summary.undefined == {"ssim": 2, "ms_ssim": 5}
    assert (summary.means["ssim"].count, summary.means["psnr"].count) == (3, 5)
    assert "ms_ssim" not in summary.means
    lines = list(csv.reader(io.StringIO(results.to_csv())))
    column = lines[0].index("ssim")
    assert [line[column] == "" for line in lines[1:]] == [False] * 3 + [True] * 2
    assert "SSIM is not defined for 2 samples" in report(results).html()


def test_sounds_have_their_own_measures_and_rates() -> None:
    sound = Audio(torch.rand(1, 8000, generator=torch.Generator().manual_seed(0)) - 0.5, 8000)
    codec = Uniform(256, "audio", rate=8000)
    results = run({"pcm": codec}, [make_sample("s", sound)], Protocol(sample_rate=8000, extras=()))
    means = results.summaries[0].means
    assert set(means) == {
        "si_sdr",
        "mel_distance",
        "stft_distance",
        "log_spectral_distance",
        "kbps",
    }
    assert means["kbps"].value == 64.0  # 8 bits at 8 kHz, the rate of G.711
    assert means["si_sdr"].value == pytest.approx(
        10 * math.log10((1 / 12) / ((2 / 255) ** 2 / 12)), abs=0.2
    )
    assert "x real time" in results.table()


def test_the_reference_is_cut_and_reduced_by_the_protocol() -> None:
    protocol = Protocol(max_side=32, max_seconds=0.5, max_frames=5, fps=10.0)
    assert reference(Image.new("RGB", (300, 100)), protocol).shape == (1, 3, 32, 32)
    assert reference(Image.new("L", (30, 60)), protocol).shape == (1, 3, 60, 30)
    film = Video(torch.zeros(9, 48, 64, 3, dtype=torch.uint8), 10.0)
    assert reference(film, protocol).shape == (1, 3, 5, 32, 32)
    stereo = Audio(torch.zeros(2, 8000), 8000)
    assert reference(stereo, protocol).shape == (1, 1, 8000)  # half a second at 16 kHz
    whole = Protocol(
        max_side=None, max_seconds=None, max_frames=None, fps=None, sample_rate=8000, channels=2
    )
    assert reference(film, whole).shape == (1, 3, 9, 48, 64)
    assert reference(stereo, whole).shape == (1, 2, 8000)
    with pytest.raises(ValueError, match="not text"):
        reference("words", protocol)
    with pytest.raises(ValueError, match="max_side must be positive"):
        Protocol(max_side=0)
    with pytest.raises(ValueError, match="channels must be 1 or 2"):
        Protocol(channels=3)


def test_films_are_taken_at_the_rate_of_the_protocol() -> None:
    frames = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 8, 8, 3)
    film = Video(frames.contiguous(), 20.0)
    slow = reference(film, Protocol(fps=5.0, max_frames=None))
    shown = ((slow[0, 0, :, 0, 0] + 1) * 127.5).round().int().tolist()
    assert shown == [0, 4, 8, 12, 16]


def test_reduced_pictures_keep_their_content_and_its_middle() -> None:
    wide = np.zeros((64, 192, 3), dtype=np.uint8)
    wide[:, 64:128] = 255
    signal = reference(Image.fromarray(wide), Protocol(max_side=32))
    assert float(signal[..., 2:-2].min()) > 0.95
    assert float(signal.max()) <= 1


def test_what_a_codec_cannot_hold_counts_as_lost() -> None:
    """Grey of a colour picture, 4 kHz of a sound of 16 kHz: one reference for all codecs."""
    protocol = Protocol()
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    real = reference(red, protocol)
    grey = Uniform(256)
    x = given(real, grey, protocol)
    assert x.shape == (1, 1, 16, 16)
    assert float(x[0, 0, 0, 0]) == pytest.approx(2 * 0.299 - 1, abs=1e-5)
    assert taken(x, x, real, grey, protocol).shape == real.shape
    [summary] = run({"grey": grey}, [make_sample("red", red)]).summaries
    assert summary.means["psnr"].value < 10
    tone = torch.sin(2 * math.pi * 6000 * torch.arange(16000) / 16000)[None] * 0.5
    narrow = Uniform(65536, "audio", rate=8000)
    [summary] = run({"narrow": narrow}, [make_sample("tone", Audio(tone, 16000))]).summaries
    assert summary.means["si_sdr"].value < 0
    assert summary.means["kbps"].value == pytest.approx(16 * 8, rel=1e-3)


def test_a_codec_of_one_size_sees_the_picture_resized() -> None:
    codec = build_codec("semantic-tiny")
    protocol = Protocol(max_side=64)
    real = reference(Image.new("RGB", (64, 64), "red"), protocol)
    x = given(real, codec, protocol)
    assert x.shape == (1, 3, 32, 32)
    assert torch.allclose(taken(x, x, real, codec, protocol), real, atol=1e-4)


def test_delays_are_undone_where_the_protocol_says_so() -> None:
    protocol = Protocol(max_delay=0.01)
    codec = Uniform(256, "audio", rate=16000)
    real = torch.rand(1, 1, 4000) - 0.5
    for delay in (-100, 37, 160):
        late = real.roll(delay, -1)
        made = taken(late, real, real, codec, protocol)
        assert torch.equal(made[..., 200:-200], real[..., 200:-200])
        assert torch.equal(taken(late, real, real, codec, Protocol()), late)


# The mistakes of published figures


class Cropping(Uniform):
    """Gives back whole codes, not the size that it was given."""

    def decode(self, codes: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        return super().decode(codes, size)[..., 2:-2, 2:-2]


def test_nothing_is_cropped_to_fit() -> None:
    results = run({"crops": Cropping(256)}, _pictures(2))
    assert [f.reason.partition(":")[0] for f in results.failures] == [
        "decoded (1, 1, 12, 12) of (1, 1, 16, 16)"
    ] * 2
    with pytest.raises(ValueError, match="a codec must honour `size`"):
        results.check()


def test_results_on_references_cropped_otherwise_do_not_stand_in_one_table() -> None:
    one = run({"a": Uniform(16)}, _pictures(3), Protocol(max_side=16))
    two = run({"b": Uniform(16)}, _pictures(3), Protocol(max_side=12))
    with pytest.raises(ValueError, match=r"protocol.max_side is 16 in one and 12 in the other"):
        combined(one, two)
    cropped = [
        make_sample(f"picture-{i}", s.load().crop((1, 1, 13, 13)))  # type: ignore[union-attr]
        for i, s in enumerate(_pictures(3))
    ]
    three = run({"b": Uniform(16)}, cropped, Protocol(max_side=16))
    with pytest.raises(ValueError, match="the image references are not the same signals"):
        combined(one, three)
    four = run({"b": Uniform(64)}, _pictures(3), Protocol(max_side=16, examples=1))
    both = combined(one, four)
    assert both.compare("b", "a", "psnr").low > 10
    assert [s.codec for s in both.summaries] == ["a", "b"]
    with pytest.raises(ValueError, match="a is in two of them"):
        combined(one, one)


def test_the_range_is_that_of_eight_bits_and_cannot_be_chosen() -> None:
    """PSNR as of files, 255 against 255, whatever a codec's own range is."""
    results = run({"coarse": Uniform(16)}, _pictures(1))
    picture = np.asarray(_pictures(1)[0].load(), dtype=np.float64)
    made = np.round(picture / 255 * 15) / 15 * 255
    expected = 10 * math.log10(255**2 / np.mean((made - picture) ** 2))
    assert results.summaries[0].means["psnr"].value == pytest.approx(expected, abs=1e-3)
    assert results.to_dict()["protocol"]["rules"]["data_range"] == 2.0
    with pytest.raises(TypeError, match="data_range"):
        Protocol(data_range=1.0)  # type: ignore[call-arg]


def test_narrow_and_wide_band_are_told_apart_and_never_made_up() -> None:
    with pytest.raises(ValueError, match=r"'pesq' is none of .*say pesq_wb or pesq_nb"):
        Protocol(extras=("pesq",))
    sound = Audio(torch.rand(1, 8000) - 0.5, 8000)
    codec = Uniform(256, "audio", rate=8000)
    narrow = run({"pcm": codec}, [make_sample("speech", sound)], Protocol(sample_rate=8000))
    assert narrow.skipped["pesq_wb"] == (
        "pesq_wb needs sound at 16000 Hz or more, the protocol has 8000"
    )
    assert "PESQ, wide band: pesq_wb needs sound at 16000 Hz" in narrow.table()
    assert "pesq_wb" not in narrow.rows[0].values


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


def defined(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _stable(results: Results) -> list[tuple[Any, ...]]:
    return [
        (row.codec, row.modality, row.key, row.tokens, defined(row.values)) for row in results.rows
    ]


def test_the_bench_writes_figures_samples_and_a_page(shards: Path, tmp_path: Path) -> None:
    names = ["vision-tiny-f8-video", "soundstream-8khz", "semantic-tiny"]
    protocol = Protocol(limit=2, examples=1)
    results = bench(names, shards, tmp_path, protocol)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html",
        "results.json",
        "results.md",
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
    assert stored["protocol"]["rules"]["data_range"] == 2.0
    film = next(s for s in stored["summaries"] if s["modality"] == "video")
    assert film["means"]["motion_psnr"]["count"] == 2
    assert len((tmp_path / "samples.csv").read_text().splitlines()) == 9
    page = (tmp_path / "report.html").read_text()
    assert page.count("<audio") == 2
    assert "regions" in page
    assert all(name in page for name in names)
    assert "<table" in results._repr_html_()
    again = run({names[1]: build_codec(names[1])}, shards, protocol)
    assert _stable(again) == [row for row in _stable(results) if row[0] == names[1]]


def test_the_command_takes_several_places_a_limit_and_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        for number in range(2):
            picture = Image.new("RGB", (16, 16), (80 * number, 0, 0))
            picture.save(tmp_path / place / f"{place}-{number}.png")
    out = tmp_path / "out"
    given = ["bench", "png:64", "--out", str(out), "--split", "reds"]
    places = ["--data", str(tmp_path / "one"), "--data", str(tmp_path / "two")]
    assert main([*given, *places, "--limit", "3", "--quiet"]) == 0
    assert "### image: quality" in capsys.readouterr().out
    results = read_results(out)
    assert [row.key for row in results.rows] == ["one-0.png", "one-1.png", "two-0.png"]
    assert (results.protocol.split, results.protocol.limit) == ("reds", 3)
    assert main([*given, *places, "--weights", str(tmp_path)]) == 1
    assert "weights.json" in capsys.readouterr().err


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
    results = run({"fine": Colour(64), "coarse": Colour(16)}, photos, QUICK)
    assert len(results.rows) == 10
    assert results.failures == []
    assert results.compare("fine", "coarse", "psnr").low > 9


def test_results_come_back_from_their_folder(shards: Path, tmp_path: Path) -> None:
    protocol = Protocol(limit=2, sample_rate=8000)
    results = bench(["soundstream-8khz", "opus:12"], shards, tmp_path, protocol)
    again = read_results(tmp_path)
    assert again.protocol == protocol
    assert again.summaries == results.summaries
    assert _stable(again) == _stable(results)
    difference = results.compare("opus:12", "soundstream-8khz", "mel_distance")
    assert again.compare("opus:12", "soundstream-8khz", "mel_distance") == difference
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="not the results of a benchmark"):
        read_results(tmp_path)


def test_classical_codecs_stand_beside_learned_ones_at_their_rate(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for index in range(3):
        coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(index))
        smooth = torch.nn.functional.interpolate(coarse, (200, 200), mode="bicubic").clamp(0, 1)
        pixels = (smooth[0].permute(1, 2, 0) * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(data / f"{index}.png")
    results = bench(["vision-tiny-f8", "classical"], data, tmp_path / "out", Protocol(probes=False))
    names = [s.codec for s in results.summaries]
    assert {"jpeg:60", "webp:60", "avif:60", "png:8", "avif@0.1406"} <= set(names)
    matched = next(s for s in results.summaries if s.codec == "avif@0.1406")
    assert 0.05 < matched.means["bits_per_pixel"].value <= 0.1406
    assert "at the same rate" in results.table()
    plot = results.plot("image", "ms_ssim")
    assert plot.names == ("vision-tiny-f8", "jpeg", "webp", "avif", "png")
    assert "<svg" in results._repr_html_()
    plot.save(tmp_path / "plot.html")
    assert "<svg" in (tmp_path / "plot.html").read_text()
    with pytest.raises(ValueError, match="kbps of image was not measured"):
        results.plot("image", "kbps")


def test_a_page_opens_offline_and_the_browser_refuses_nothing(
    shards: Path, tmp_path: Path, browse: Any
) -> None:
    names = ["vision-tiny-f8-video", "soundstream-8khz", "jpeg:60"]
    bench(names, shards, tmp_path / "out", Protocol(limit=2, probes=False))
    done = browse(tmp_path / "out" / "report.html")
    assert "Content Security Policy" not in done.stderr
    assert "ERR_" not in done.stderr
    for piece in ("<svg", "<audio", "<th", "jpeg:60"):
        assert piece in done.stdout


def test_a_pages_captions_are_escaped_and_it_stays_small() -> None:
    generator = np.random.default_rng(0)
    samples = []
    for index in range(64):
        noise = generator.integers(0, 256, (160, 160, 3), dtype=np.uint8)
        samples.append(make_sample(f"<script>alert({index})</script>", Image.fromarray(noise)))
    protocol = Protocol(examples=64, exactness=0, probes=False)
    results = run({"<b>pcm": Uniform(256)}, samples, protocol)
    html = report(results).html()
    assert len(html) < 10_000_000
    assert "<script>alert" not in html
    assert "<b>pcm" not in html
    assert html.count("<script>") == 1
    assert "samples have room here" in html
