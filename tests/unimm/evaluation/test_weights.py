"""Measures by a network: files that are checked, never fetched; and their arithmetic."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from unimm.evaluation.reconstruction import Protocol, WeightFile, make_sample, read_weights, run
from unimm.evaluation.reconstruction.lpips import LPIPS
from unimm.evaluation.reconstruction.weights import (
    Moments,
    edit_distance,
    frechet_distance,
    open_judges,
)
from unimm.signals import Audio, Video
from unimm_tokenizers.adapters import FunctionCodec, FunctionConfig
from unimm_tokenizers.storage import sha256

SCRIPTS = "ignore:`torch.jit:DeprecationWarning"


class Inception(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        return x.mean(dim=(2, 3))


class I3D(nn.Module):
    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        return x.mean(dim=(2, 3, 4))


class Recogniser(nn.Module):
    """Hears a letter in every 100 samples: E where they are loud, else the end of a word."""

    def forward(self, x: Tensor) -> Tensor:
        loud = x.unfold(1, 100, 100).abs().mean(dim=2) > 0.1
        labels = torch.where(loud, 2, 1)
        return torch.nn.functional.one_hot(labels, 29).float()


class Opinion(nn.Module):
    def forward(self, x: Tensor, rate: int) -> Tensor:
        return 1 + 4 * x.abs().amax(dim=1)


def scripted(folder: Path, name: str, module: nn.Module) -> WeightFile:
    path = folder / f"{name}.pt"
    torch.jit.script(module).save(str(path))
    return WeightFile(path, sha256(path))


def rounding(levels: int, modality: str = "image") -> FunctionCodec:
    config = FunctionConfig(
        modality=modality,
        codebook_size=levels,
        num_codebooks=1 if modality == "audio" else 3,
        downsample=(1,) if modality == "audio" else (1, 1, 1) if modality == "video" else (1, 1),
        num_channels=1 if modality == "audio" else 3,
        sample_rate=16000 if modality == "audio" else None,
    )
    top = levels - 1
    return FunctionCodec(config, lambda x: ((x + 1) / 2 * top).round(), lambda c: c / top * 2 - 1)


def test_nothing_is_measured_without_its_file_and_the_results_say_which() -> None:
    judges, skipped = open_judges({})
    assert judges == []
    assert set(skipped) == {"lpips_alex", "lpips_vgg", "wer", "utmos", "rfid", "rfvd"}
    assert "alexnet-owt-7be5be79.pth not named (https://" in skipped["lpips_alex"]
    picture = Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8))
    results = run({"a": rounding(4)}, [make_sample("a", picture)])
    assert set(results.skipped) == {"lpips_alex", "lpips_vgg", "rfid"}
    assert "inception-2015-12-05.pt not named" in results.table()


@pytest.mark.filterwarnings(SCRIPTS)
def test_files_are_checked_before_anything_runs(tmp_path: Path) -> None:
    file = scripted(tmp_path, "inception", Inception())
    with pytest.raises(ValueError, match="this is another file"):
        open_judges({"inception": file._replace(sha256="0" * 64)})
    with pytest.raises(ValueError, match="the weights are missing"):
        open_judges({"inception": file._replace(path=tmp_path / "nothing.pt")})
    with pytest.raises(ValueError, match="'lpips' is none of alexnet, vgg16"):
        open_judges({"lpips": file})
    listed = {"inception": {"file": "inception.pt", "sha256": file.sha256}}
    (tmp_path / "weights.json").write_text(json.dumps(listed))
    assert read_weights(tmp_path) == {"inception": file}
    (tmp_path / "weights.json").write_text('{"inception": 3}')
    with pytest.raises(ValueError, match=r"weights\.json: expected"):
        read_weights(tmp_path)


@pytest.mark.filterwarnings(SCRIPTS)
def test_rfid_and_rfvd_are_distances_of_all_samples_together(tmp_path: Path) -> None:
    weights = {
        "inception": scripted(tmp_path, "inception", Inception()),
        "i3d": scripted(tmp_path, "i3d", I3D()),
    }
    generator = np.random.default_rng(0)
    samples = []
    for index in range(6):
        pixels = generator.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
        samples.append(make_sample(f"p{index}", Image.fromarray(pixels[0])))
        samples.append(make_sample(f"f{index}", Video(torch.from_numpy(pixels), 10.0)))
    codecs = {"fine": rounding(256), "coarse": rounding(2), "film": rounding(3, "video")}
    results = run(codecs, samples, Protocol(exactness=0, probes=False), weights=weights)
    fine, coarse, film = results.summaries
    assert fine.whole["rfid"] == pytest.approx(0, abs=1e-3)
    assert coarse.whole["rfid"] > 1
    assert film.whole["rfvd"] > 0
    assert "rFID" in results.table()
    assert "rfid" not in results.skipped


@pytest.mark.filterwarnings(SCRIPTS)
def test_speech_alone_is_heard_by_a_recogniser(tmp_path: Path) -> None:
    weights = {
        "asr": scripted(tmp_path, "asr", Recogniser()),
        "utmos": scripted(tmp_path, "utmos", Opinion()),
    }
    loud, quiet = torch.full((1, 800), 0.5), torch.zeros(1, 800)
    words = Audio(torch.cat([loud, quiet, loud, quiet], dim=1), 16000)
    samples = [make_sample("speech-1", words), make_sample("robin", words)]
    protocol = Protocol(exactness=0, probes=False, extras=())
    codecs = {"fine": rounding(256, "audio"), "deaf": rounding(1, "audio")}
    codecs["deaf"].to_signal = lambda codes: torch.zeros(codes.shape)  # type: ignore[method-assign]
    codecs["deaf"].to_codes = lambda x: torch.zeros(x.shape)  # type: ignore[method-assign]
    results = run(codecs, samples, protocol, weights=weights)
    fine, deaf = results.summaries
    assert (fine.means["wer"].value, fine.means["wer"].count) == (0.0, 1)
    assert deaf.means["wer"].value == 1.0
    assert fine.undefined["wer"] == 1
    assert fine.means["utmos"].value == pytest.approx(3, abs=0.02)


def test_a_frechet_distance_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = Moments(), Moments()
    x = torch.randn(4000, 3, generator=generator)
    for part in x.split(1000):
        first.add(part)
    second.add(2 * x + torch.tensor([1.0, 0, 0]))
    # Of N(m, S) and N(2m + e, 4S): |m + e|^2 + tr(S + 4S - 2 * 2S).
    shift = (x.double().mean(0) + torch.tensor([1.0, 0, 0])).square().sum()
    expected = float(shift + torch.cov(x.double().T).trace())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_words_are_counted_as_levenshtein_does() -> None:
    assert edit_distance([], ["a", "b"]) == 2
    assert edit_distance(list("abc"), list("axcd")) == 2
    assert edit_distance(list("abc"), list("abc")) == 0


def trunk(widths: list[tuple[int, int, int, int]]) -> dict[str, Tensor]:
    state = {}
    for index, wide, narrow, size in widths:
        state[f"features.{index}.weight"] = torch.randn(wide, narrow, size, size) / (narrow * size)
        state[f"features.{index}.bias"] = torch.zeros(wide)
    return state


def test_lpips_is_its_formula_on_one_layer() -> None:
    """With four heads of zero, the rest is the distance of unit features of the first layer."""
    state = trunk([(0, 4, 3, 11), (3, 4, 4, 5), (6, 4, 4, 3), (8, 4, 4, 3), (10, 4, 4, 3)])
    heads = {f"lin{i}.model.1.weight": torch.zeros(1, 4, 1, 1) for i in range(5)}
    heads["lin0.model.1.weight"] += torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1)
    lpips = LPIPS("alex", state, heads)
    a, b = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    features = []
    for x in (a, b):
        scaled = (x - lpips.shift) / lpips.scale
        found = nn.functional.conv2d(scaled, state["features.0.weight"], None, 4, 2).relu()
        features.append(nn.functional.normalize(found, dim=1))
    weights = torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1)
    expected = ((features[0] - features[1]).square() * weights).sum(1).mean(dim=(1, 2))
    assert torch.allclose(lpips(a, b), expected, atol=1e-5)
    assert lpips(a, a).tolist() == [0, 0]
    del state["features.8.bias"]
    with pytest.raises(ValueError, match=r"LPIPS on alex: the weights hold no 'features.8.bias'"):
        LPIPS("alex", state, heads)


def test_lpips_files_are_state_dicts_that_cannot_run_code(tmp_path: Path) -> None:
    state = trunk([(0, 4, 3, 11), (3, 4, 4, 5), (6, 4, 4, 3), (8, 4, 4, 3), (10, 4, 4, 3)])
    heads = {f"lin{i}.model.1.weight": torch.ones(1, 4, 1, 1) for i in range(5)}
    weights = {}
    for name, tensors in {"alexnet": state, "lpips_alex_heads": heads}.items():
        torch.save(tensors, tmp_path / name)
        weights[name] = WeightFile(tmp_path / name, sha256(tmp_path / name))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sample = make_sample("noise", Image.fromarray(pixels))
    results = run({"coarse": rounding(3)}, [sample], weights=weights)
    value = results.summaries[0].means["lpips_alex"].value
    assert value > 0
    assert not math.isnan(value)
