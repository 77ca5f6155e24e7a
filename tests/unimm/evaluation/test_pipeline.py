"""A whole recipe, from nothing to its page, on a world of two dozen scenes."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import unimm
from unimm.checkpoint import sha256, verify
from unimm.cli import main
from unimm.data.manifest import Manifest
from unimm.evaluation import pipeline, worlds
from unimm.evaluation.pipeline import Stopwatch, evaluate, run

DIRECTIONS = [
    ("text", "image", 0.9),
    ("image", "text", 0.0),
    ("text", "audio", 0.9),
    ("audio", "image", None),
    ("text", "video", None),
]
STEPS = ["raw shards", "codecs", "tokens", "language model", "judges", "any to any", "report"]


def codec(kind: str, config: dict[str, Any], objective: str, signals: dict[str, Any]) -> Any:
    return {
        "model": {
            "class_path": "unimm.training.CodecTask",
            "init_args": {
                "codec": {
                    "class_path": f"unimm_tokenizers.{kind}",
                    "init_args": {"config": config},
                },
                "objective": {"class_path": f"unimm_tokenizers.losses.{objective}"},
                "optimizer": {"warmup": 1},
            },
        },
        "data": {
            "class_path": "unimm.data.module.SignalDataModule",
            "init_args": {"shards": "given", "batch_size": 4, "config": signals},
        },
        "trainer": trainer(),
    }


def trainer() -> dict[str, Any]:
    return {
        "max_steps": 3,
        "accelerator": "cpu",
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
        "val_check_interval": 3,
    }


IMAGE = codec(
    "vision.VisionCodec",
    {
        "channels": 8,
        "multipliers": [1, 2],
        "patch": 4,
        "time_downsample": 4,
        "latent_channels": 8,
        "fsq_levels": [4, 4],
    },
    "PictureObjective",
    {"modality": "image+video", "size": 32, "frames": 9, "video_share": 0.3, "video_batch_size": 2},
)
AUDIO = codec(
    "audio.SpectralCodec",
    {"channels": 16, "num_blocks": 1, "num_codebooks": 2, "codebook_size": 16},
    "SpectrumObjective",
    {"modality": "audio", "num_channels": 1, "sample_rate": 8000, "length": 3200},
)
LM = {
    "model": {
        "class_path": "unimm.training.LanguageTask",
        "init_args": {
            "tokenizer": "given",
            "model": {"d_model": 32, "num_layers": 1, "num_heads": 2},
            "optimizer": {"warmup": 1},
        },
    },
    "data": {
        "class_path": "unimm.data.module.TokenDataModule",
        "init_args": {
            "tokenizer": "given",
            "shards": "given",
            "row_length": 192,  # what a conversation takes
            "batch_size": 4,
        },
    },
    "trainer": {**trainer(), "enable_progress_bar": False},
}
TEMPLATES = [
    {"parts": ["{txt}", "{png}"], "drop_condition": 0.1},
    {"parts": ["{png}", "{txt}"]},
    {"parts": ["{txt}", "{wav}"]},
    {"parts": ["{json.film}", "{gif}"]},
]
RECIPE = {
    "title": "tiny world",
    "data": "made by the test",
    "ship_judges": True,
    "world": "dialpad",
    "train": 24,
    "val": 8,
    "conversations": 4,
    "codecs": {"image": "image.yaml", "audio": "audio.yaml"},
    "templates": "templates.yaml",
    "documents_per_sample": 4,
    "model": "lm.yaml",
    "generation": {"image": {"temperature": 0.9, "guidance": 2.0}, "text": {"temperature": 0.0}},
    "samples": 4,
    "directions": [
        {"source": source, "target": target, "goal": goal, "options": {"max_new_tokens": 100}}
        for source, target, goal in DIRECTIONS
    ],
}


def write_recipe(folder: Path, **files: Any) -> Path:
    whole = {
        "recipe": RECIPE,
        "image": IMAGE,
        "audio": AUDIO,
        "lm": LM,
        "templates": TEMPLATES,
        **files,
    }
    folder.mkdir(parents=True)
    for name, content in whole.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_judges() -> Iterator[None]:
    """Judges of a few scenes: what they say of an untrained model does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "_DIALPAD_PICTURES", 40)
        patch.setattr(worlds, "_DIALPAD_FILMS", 30)
        patch.setattr(worlds, "_DIALPAD_SOUNDS", 20)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("pipeline")
    assert run(str(write_recipe(folder / "tiny")), folder / "out", None) == 0
    return folder / "out"


def test_results_say_how_right_and_how_long(done: Path) -> None:
    results = json.loads((done / "results.json").read_text())
    names = [f"{source}->{target}" for source, target, _ in DIRECTIONS]
    assert list(results["accuracy"]) == names
    assert all(0 <= value <= 1 for value in results["accuracy"].values())
    assert list(results["seconds"]) == STEPS
    assert all(value > 0 for value in results["seconds"].values())
    assert [part["total"] for part in results["directions"]] == [4] * len(names)
    assert results["judges"].keys() == {"image", "video", "audio"}
    assert results["recipe"] == RECIPE


def test_the_page_is_one_file_with_everything(done: Path) -> None:
    html = (done / "report.html").read_text()
    assert set(re.findall(r'(?:src|href)="(\w+):', html)) == {"data"}
    for step in STEPS[:-1]:  # the page can not hold how long it took itself
        assert step in html
    for run_name in ("lm", "image", "audio"):
        assert re.search(rf">{run_name}<", html)


def test_the_bundle_is_sealed_half_precise_and_writes(done: Path) -> None:
    bundle = done / "bundle"
    verify(bundle)
    assert (bundle / "index.json").is_file()
    lm, tok = (
        unimm.UnifiedLM.from_pretrained(bundle),
        unimm.UnifiedTokenizer.from_pretrained(bundle),
    )
    assert tok.defaults == RECIPE["generation"]
    assert tok.vocabulary.modalities == ("text", "image", "video", "audio")
    ((picture,),) = unimm.generate(lm, tok, ["seven"], "image", size=(32, 32), seed=0)
    assert picture.size == (32, 32)  # type: ignore[union-attr]
    (bundle_size, full) = (
        (folder / "codecs/image/model.safetensors").stat().st_size
        for folder in (bundle, done / "tokenizer")
    )
    assert bundle_size < 0.75 * full


def test_the_bundle_has_a_card_and_its_judges(done: Path) -> None:
    card = (done / "bundle/README.md").read_text()
    results = json.loads((done / "results.json").read_text())
    assert "# tiny world\n" in card
    assert "## Training data\n\nmade by the test\n" in card
    assert "| image codec | `vision`, " in card
    weights = done / "bundle/lm/model.safetensors"
    assert f"| lm/model.safetensors | {sha256(weights)} |" in card
    for name, value in results["accuracy"].items():
        assert f"| {name} | {value:.1%} |" in card
    for path in (done / "judges").rglob("*.*"):
        shipped = done / "bundle/judges" / path.relative_to(done / "judges")
        assert shipped.read_bytes() == path.read_bytes()


def test_shards_of_both_splits_are_tokenized(done: Path) -> None:
    for split, scenes in (("train", 24), ("val", 8)):
        manifest = Manifest.read(done / "tokens" / split / "dialpad-000000.tar")
        assert manifest.samples == 4 * scenes
        assert manifest.tokens.keys() == {"text", "image", "audio", "video"}
    talk = Manifest.read(done / "tokens/train/talk-000000.tar")
    assert talk.samples == RECIPE["conversations"]
    raw = [(done / "raw" / split / "dialpad-000000.tar").read_bytes() for split in ("train", "val")]
    assert raw[0] != raw[1]


def test_a_second_run_does_only_what_is_left(done: Path) -> None:
    kept = [
        path
        for folder in ("raw", "codecs", "tokenizer", "tokens", "image", "audio", "judges")
        for path in (done / folder).rglob("*")
        if path.is_file()
    ]
    times = {path: path.stat().st_mtime_ns for path in kept}
    before = json.loads((done / "results.json").read_text())
    weights = (done / "bundle/lm/model.safetensors").read_bytes()
    (done / "report.html").unlink()
    assert main(["run", str(done.parent / "tiny"), "--out", str(done)]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    assert (done / "report.html").is_file()
    assert (done / "bundle/lm/model.safetensors").read_bytes() == weights
    after = json.loads((done / "results.json").read_text())
    assert after["accuracy"] == before["accuracy"]
    # Time spent in a step adds up over runs.
    assert all(after["seconds"][step] >= before["seconds"][step] for step in STEPS)


def test_a_bundle_is_judged_by_itself(done: Path, tmp_path: Path) -> None:
    out = tmp_path / "judged"
    command = ["evaluate", "--model", done / "bundle", "--recipe", done.parent / "tiny"]
    assert main([str(part) for part in (*command, "--samples", 2, "--out", out)]) == 0
    # No judge was trained: the bundle ships with its own.
    written = ["answers.png", "report.html", "results.json"]
    assert sorted(path.name for path in out.iterdir()) == written
    results = json.loads((out / "results.json").read_text())
    assert [part["total"] for part in results["directions"]] == [2] * len(DIRECTIONS)
    assert list(results["seconds"]) == STEPS[4:]
    assert results["judges"] == json.loads((done / "results.json").read_text())["judges"]


def test_the_fast_demo_judges_a_bundle(
    model_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an untrained bundle and few prompts in the place of those that ship."""
    shutil.copytree(model_bundle, tmp_path / "bundles/dialpad")
    write_recipe(tmp_path / "recipes/dialpad")
    monkeypatch.setattr("unimm.checkpoint.SHIPPED", tmp_path / "bundles")
    monkeypatch.setattr("unimm.evaluation.recipe._SHELVES", (tmp_path / "recipes",))
    monkeypatch.setattr(pipeline, "FAST_SAMPLES", 2)
    assert main(["demo", "--fast", "--out", str(tmp_path / "demo")]) == 0
    results = json.loads((tmp_path / "demo/results.json").read_text())
    assert [part["total"] for part in results["directions"]] == [2] * len(DIRECTIONS)
    assert list(results["seconds"]) == STEPS[4:]
    assert (tmp_path / "demo/report.html").is_file()


BROKEN = {**AUDIO, "trainer": {**trainer(), "max_step": 3}}


def test_a_codec_that_fails_is_one_line_that_names_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = {**RECIPE, "codecs": {"audio": "audio.yaml"}}
    recipe, out = write_recipe(tmp_path / "tiny", recipe=alone, audio=BROKEN), tmp_path / "out"
    assert main(["run", str(recipe), "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    log = out / "audio.log"
    assert line.startswith(f"unimm: error: audio codec: training failed (exit code 1), see {log}: ")
    assert line.endswith("unknown key 'trainer.max_step' (did you mean 'max_steps'?)")
    assert log.read_text().strip().splitlines()[-1] in line
    assert not (out / "codecs").exists()
    assert not (out / "tokens").exists()
    # The steps that were reached are timed all the same.
    assert list(json.loads((out / "seconds.json").read_text())) == STEPS[:2]


@pytest.mark.slow  # two processes that import torch
def test_a_codec_that_fails_stops_the_others(tmp_path: Path) -> None:
    endless = {**IMAGE, "trainer": {**trainer(), "max_steps": 10**7}}
    recipe = write_recipe(tmp_path / "tiny", image=endless, audio=BROKEN)
    with pytest.raises(ValueError, match="audio codec: training failed"):
        run(str(recipe), tmp_path / "out", None)


def test_processes_are_named_as_they_end() -> None:
    slow, quick = (
        subprocess.Popen([sys.executable, "-S", "-c", f"import time; time.sleep({seconds})"])
        for seconds in (1.5, 0.0)
    )
    ended = pipeline._as_they_end({"slow": slow, "quick": quick})
    assert next(ended) == "quick"
    slow.kill()
    assert list(ended) == ["slow"]
    assert slow.returncode == -9


@pytest.mark.parametrize(("text", "said"), [("one\ntwo \n\n", "two"), ("", "it wrote nothing")])
def test_a_killed_training_is_named_with_its_log(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "image.log").write_text(text)
    told = pipeline._failure(tmp_path, "image", -9)
    log = tmp_path / "image.log"
    assert told == f"image codec: training failed (exit code -9), see {log}: {said}"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "digits"], "needs real data: name its folder with --data"),
        (["run", "dialpad", "--data", "."], "makes its own data: leave out --data"),
        (["run", "dialpat"], "no recipe 'dialpat'"),
        (["evaluate", "--recipe", "dialpad", "--model", "./nowhere"], "no folder './nowhere'"),
        (["evaluate", "--recipe", "nothing", "--model", "."], "no recipe 'nothing'"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("unimm: error: ")
    assert told in line
    assert not (tmp_path / "out").exists()


def test_no_samples_are_no_measurement(model_bundle: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path / "tiny"))
    with pytest.raises(ValueError, match="samples must be 1 or more, got 0"):
        evaluate(str(model_bundle), recipe, tmp_path / "out", None, 0)
    assert not (tmp_path / "out").exists()


def test_a_stopwatch_adds_up_over_runs_and_failures(tmp_path: Path) -> None:
    def spend(watch: Stopwatch, fail: bool) -> None:
        with watch.step("work", Console(quiet=True)):
            time.sleep(0.02)
            if fail:
                raise ValueError("stopped")

    path = tmp_path / "seconds.json"
    with pytest.raises(ValueError, match="stopped"):
        spend(Stopwatch(path), fail=True)
    first = json.loads(path.read_text())["work"]
    assert first >= 0.02
    watch = Stopwatch(path)
    spend(watch, fail=False)
    assert watch.seconds["work"] >= first + 0.02
    assert json.loads(path.read_text()) == watch.seconds
