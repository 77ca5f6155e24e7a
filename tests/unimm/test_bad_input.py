"""Bad input through the command line: one line that names file, shard and key, or it just works.

Every case is a whole command; what single functions refuse is tested in their own rooms.
"""

import io
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import lightning.fabric
import lightning.pytorch
import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image

from unimm import UnifiedTokenizer
from unimm.cli import main
from unimm.data import dialpad
from unimm.data.manifest import Manifest
from unimm.data.shards import ShardReader, ShardWriter
from unimm.data.tokenize import npy_header

Captured = pytest.CaptureFixture[str]
TEXT = {"txt": b"seven"}


@pytest.fixture(autouse=True)
def errors_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Lightning also writes to standard error that it found no GPU."""
    for name in (lightning.fabric.__name__, lightning.pytorch.__name__):
        caplog.set_level(logging.WARNING, logger=name)


def call(capsys: Captured, *arguments: str | Path) -> tuple[int, list[str]]:
    """Exit code and the lines on standard error."""
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err.strip().splitlines()


def failed(capsys: Captured, *arguments: str | Path) -> str:
    """The one line of a command that fails."""
    code, lines = call(capsys, *arguments)
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("unimm: error: ")
    return lines[0]


def png(width: int, height: int) -> bytes:
    """A white picture of one bit a pixel: 20,000 x 20,000 of them take 50 kB."""
    stream = io.BytesIO()
    Image.new("1", (width, height), 1).save(stream, "PNG")
    return stream.getvalue()


def wav(samples: np.ndarray, kind: str = "FLOAT") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples.astype(np.float32), 8000, kind, format="WAV")
    return stream.getvalue()


def film(frames: int) -> bytes:
    stream = io.BytesIO()
    first, *others = [Image.new("L", (32, 32), 40 * n) for n in range(frames)]
    first.save(stream, "GIF", save_all=True, append_images=others, duration=100)
    return stream.getvalue()


WHOLE = dialpad.scene_files(dialpad.make_scene(0, 0))
HUGE = png(20_000, 20_000)
NAN = wav(np.array([0.0, np.nan, 0.5]))
EMPTY = wav(np.zeros(0))
REFUSED = [
    ("png", HUGE, "more than the 67108864 pixels that are allowed"),
    ("png", b"", ".png is empty"),
    ("png", WHOLE["png"][: len(WHOLE["png"]) // 2], "damaged picture"),
    ("wav", NAN, "NaN or infinite"),
    ("wav", EMPTY, "no samples"),
    ("wav", b"", ".wav is empty"),
    ("gif", film(3)[:-1], "cut: the film's end mark is missing"),
]
REFUSED_NAMES = [f"{extension}: {reason}" for extension, _, reason in REFUSED]
WORKS = [
    ("png", png(1, 1)),
    ("png", png(1, 999)),
    ("wav", wav(np.zeros(800))),
    ("wav", wav(np.zeros(1))),
    ("gif", film(1)),
]
WORKS_NAMES = ["1x1", "1x999", "silence", "one sample", "one frame"]


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., Path]:
    def write(*samples: Mapping[str, bytes]) -> Path:
        path = tmp_path / "raw/bad.tar"
        with ShardWriter(path) as writer:
            for number, files in enumerate(samples):
                writer.write(f"{number:04d}", files)
        return path

    return write


@pytest.fixture
def recipe(tmp_path: Path, tokenizer_bundle: Path) -> Callable[[Path], Path]:
    """A language model's training on the token shards of a folder."""

    def write(shards: Path) -> Path:
        written = {
            "model": {
                "class_path": "unimm.training.LanguageTask",
                "init_args": {
                    "tokenizer": str(tokenizer_bundle),
                    "model": {"d_model": 32, "num_layers": 1, "num_heads": 2},
                },
            },
            "data": {
                "class_path": "unimm.data.module.TokenDataModule",
                "init_args": {
                    "tokenizer": str(tokenizer_bundle),
                    "shards": str(shards),
                    "row_length": 256,
                    "batch_size": 4,
                },
            },
            "trainer": {
                "default_root_dir": str(tmp_path / "run"),
                "max_steps": 2,
                "accelerator": "cpu",
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "log_every_n_steps": 1,
            },
        }
        path = tmp_path / "lm.yaml"
        path.write_text(yaml.safe_dump(written))
        return path

    return write


def template(tmp_path: Path, field: str) -> Path:
    path = tmp_path / "templates.yaml"
    path.write_text(yaml.safe_dump([{"parts": ["{txt}", f"{{{field}}}"]}]))
    return path


@pytest.mark.parametrize(("extension", "data", "reason"), REFUSED, ids=REFUSED_NAMES)
def test_one_bad_sample_is_left_out_and_named_and_nothing_else_is_lost(
    capsys: Captured,
    caplog: pytest.LogCaptureFixture,
    shard: Callable[..., Path],
    tokenizer_bundle: Path,
    tmp_path: Path,
    extension: str,
    data: bytes,
    reason: str,
) -> None:
    path = shard(WHOLE, {**TEXT, extension: data}, WHOLE)
    given = ("--tokenizer", tokenizer_bundle, "--templates", template(tmp_path, extension))
    code, _ = call(capsys, "tokenize", path, *given, "--out", tmp_path / "tokens")
    assert code == 0
    manifest = Manifest.read(tmp_path / "tokens/bad.tar")
    assert manifest.samples == 2
    (skipped,) = manifest.skipped
    assert skipped["key"] == "0001"
    assert reason in skipped["reason"]
    (record,) = [entry for entry in caplog.records if entry.levelname == "WARNING"]
    for named in (str(path), "0001", reason):
        assert named in record.getMessage()


@pytest.mark.parametrize(("extension", "data", "reason"), REFUSED, ids=REFUSED_NAMES)
def test_a_shard_of_bad_samples_fails_in_one_line(
    capsys: Captured,
    shard: Callable[..., Path],
    tokenizer_bundle: Path,
    tmp_path: Path,
    extension: str,
    data: bytes,
    reason: str,
) -> None:
    path = shard(*[{**TEXT, extension: data}] * 3)
    given = ("--tokenizer", tokenizer_bundle, "--templates", template(tmp_path, extension))
    line = failed(capsys, "tokenize", path, *given, "--out", tmp_path / "tokens")
    for named in (str(path), "the first is 0000", reason):
        assert named in line
    assert not (tmp_path / "tokens/bad.tar").exists()
    assert reason in json.loads((tmp_path / "tokens/failed/bad.tar.json").read_text())["error"]


def test_texts_where_a_template_wants_a_picture(
    capsys: Captured, shard: Callable[..., Path], tokenizer_bundle: Path, tmp_path: Path
) -> None:
    path = shard(TEXT, TEXT)
    given = ("--tokenizer", tokenizer_bundle, "--templates", template(tmp_path, "image"))
    line = failed(capsys, "tokenize", path, *given, "--out", tmp_path / "tokens")
    for named in (str(path), "0000", "a template wants {image}, but the sample has only"):
        assert named in line


@pytest.mark.parametrize(("extension", "data"), WORKS, ids=WORKS_NAMES)
def test_what_is_small_or_silent_is_tokenized(
    capsys: Captured,
    shard: Callable[..., Path],
    tokenizer_bundle: Path,
    tmp_path: Path,
    extension: str,
    data: bytes,
) -> None:
    path = shard({**TEXT, extension: data})
    given = ("--tokenizer", tokenizer_bundle, "--templates", template(tmp_path, extension))
    code, lines = call(capsys, "tokenize", path, *given, "--out", tmp_path / "tokens")
    assert (code, lines) == (0, [])
    (sample,) = ShardReader(tmp_path / "tokens/bad.tar")
    tok = UnifiedTokenizer.from_pretrained(tokenizer_bundle)
    ids = torch.from_numpy(np.load(io.BytesIO(sample["ids.npy"])).astype(np.int64))
    assert tok.decode(ids)[0] == "seven"
    assert len(tok.decode(ids)) == 2


def test_what_is_small_or_silent_is_a_prompt(
    capsys: Captured, model_bundle: Path, tmp_path: Path
) -> None:
    prompts: list[str | Path] = []
    for number, (extension, data) in enumerate(WORKS):
        path = tmp_path / f"{number}.{extension}"
        path.write_bytes(data)
        prompts += ["--prompt", path]
    given = ("--model", model_bundle, *prompts, "--modality", "image", "--seed", "0")
    code, lines = call(capsys, "generate", *given, "--out", tmp_path / "out")
    assert (code, lines) == (0, [])
    assert (tmp_path / "out/01-1.png").is_file()


@pytest.mark.parametrize(("extension", "data", "reason"), REFUSED, ids=REFUSED_NAMES)
def test_a_bad_prompt_is_one_line_that_names_it(
    capsys: Captured, model_bundle: Path, tmp_path: Path, extension: str, data: bytes, reason: str
) -> None:
    prompt = tmp_path / f"prompt.{extension}"
    prompt.write_bytes(data)
    given = ("--model", model_bundle, "--prompt", prompt, "--modality", "text")
    line = failed(capsys, "generate", *given, "--out", tmp_path / "out")
    assert str(prompt) in line
    assert reason in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("extension", "data", "reason"), REFUSED, ids=REFUSED_NAMES)
def test_a_bad_file_of_a_folder_is_left_out_and_named(
    capsys: Captured,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    extension: str,
    data: bytes,
    reason: str,
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.txt").write_bytes(b"seven")
    bad = folder / f"bad.{extension}"
    bad.write_bytes(data)
    code, _ = call(capsys, "shards", folder, "--out", tmp_path / "raw")
    assert code == 0
    assert [str(bad) in message and reason in message for message in caplog.messages] == [True]
    (path,) = (tmp_path / "raw").glob("*.tar")
    assert len(ShardReader(path)) == 1
    (folder / "good.txt").unlink()
    line = failed(capsys, "shards", folder, "--out", tmp_path / "none")
    assert str(bad) in line
    assert reason in line


@pytest.mark.parametrize("name", ["vocabulary.json", "text.model", "lm/model.safetensors"])
def test_a_bundle_with_a_changed_byte(
    capsys: Captured, model_bundle: Path, raw_shards: Path, tmp_path: Path, name: str
) -> None:
    bundle = tmp_path / "bundle"
    for path in model_bundle.rglob("*"):
        if path.is_file():
            target = bundle / path.relative_to(model_bundle)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    out = tmp_path / "out"
    for command in (
        ("generate", "--model", bundle, "--prompt", "seven", "--out", out),
        ("tokenize", raw_shards, "--tokenizer", bundle, "--out", out),
        ("evaluate", "--model", bundle, "--recipe", "dialpad", "--out", out),
        ("inspect", bundle),
    ):
        line = failed(capsys, *command)
        assert f"{bundle / name}: the file differs from index.json" in line
    assert not out.exists()


def rewritten(shard: Path, ids: list[int], out: Path) -> Path:
    """A committed token shard whose second document holds other ids."""
    manifest = Manifest.read(shard)
    with ShardWriter(out / shard.name) as writer:
        for number, sample in enumerate(ShardReader(shard)):
            files = {name: sample[name] for name in sample.members}
            if number == 1:
                array = np.array(ids, "<u2")
                files["ids.npy"] = npy_header("<u2", len(array)) + array.tobytes()
            writer.write(sample.key, files)
    changes = {"bytes": writer.bytes, "sha256": writer.sha256}
    text = {**json.loads((shard.parent / f"{shard.name}.json").read_text()), **changes}
    (out / f"{shard.name}.json").write_text(json.dumps(text))
    assert Manifest.read(out / shard.name).samples == manifest.samples
    return out


def test_ids_outside_the_vocabulary(
    capsys: Captured,
    recipe: Callable[[Path], Path],
    token_shards: Path,
    tokenizer_bundle: Path,
    tmp_path: Path,
) -> None:
    source = token_shards / "dialpad-000000.tar"
    second = list(ShardReader(source))[1]
    ids = np.load(io.BytesIO(second["ids.npy"])).tolist()
    size = len(UnifiedTokenizer.from_pretrained(tokenizer_bundle).vocabulary)
    ids[2] = 60_000
    folder = rewritten(source, ids, tmp_path / "tokens")
    line = failed(capsys, "fit", "-c", recipe(folder))
    for named in (str(folder / source.name), second.key, "60000"):
        assert named in line
    assert size < 60_000


def test_shards_of_another_vocabulary(
    capsys: Captured,
    recipe: Callable[[Path], Path],
    raw_shards: Path,
    tokenizer_bundle: Path,
    other_tokenizer_bundle: Path,
    tmp_path: Path,
) -> None:
    tokens = tmp_path / "tokens"
    given = ("tokenize", raw_shards, "--out", tokens)
    assert call(capsys, *given, "--tokenizer", other_tokenizer_bundle) == (0, [])
    own, other = (
        UnifiedTokenizer.from_pretrained(folder).vocabulary.fingerprint[:12]
        for folder in (tokenizer_bundle, other_tokenizer_bundle)
    )
    line = failed(capsys, "fit", "-c", recipe(tokens))
    for named in ("dialpad-000000.tar", own, other):
        assert named in line
    line = failed(capsys, *given, "--tokenizer", tokenizer_bundle)
    assert "dialpad-000000.tar: was made with" in line
    assert "vocabulary" in line


def test_a_misspelled_key_of_a_recipe_folder(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("world: dialpad\nsampels: 3\n")
    line = failed(capsys, "run", tmp_path, "--out", tmp_path / "out")
    assert line.endswith("recipe.yaml: unknown key 'sampels' (did you mean 'samples'?)")
    assert not (tmp_path / "out").exists()


def test_too_many_damaged_samples_stop_a_codecs_training_and_are_named(
    capsys: Captured, shard: Callable[..., Path], tmp_path: Path
) -> None:
    path = shard({"wav": wav(np.zeros(800))}, {"wav": NAN}, {"wav": NAN})
    written = {
        "model": {
            "class_path": "unimm.training.CodecTask",
            "init_args": {
                "codec": {
                    "class_path": "unimm_tokenizers.audio.SpectralCodec",
                    "init_args": {"config": {"channels": 16, "num_blocks": 1}},
                },
                "objective": {"class_path": "unimm_tokenizers.losses.SpectrumObjective"},
            },
        },
        "data": {
            "class_path": "unimm.data.module.SignalDataModule",
            "init_args": {
                "shards": str(path),
                "batch_size": 2,
                "config": {
                    "modality": "audio",
                    "num_channels": 1,
                    "sample_rate": 8000,
                    "length": 800,
                },
            },
        },
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
    }
    recipe = tmp_path / "audio.yaml"
    recipe.write_text(yaml.safe_dump(written))
    line = failed(capsys, "fit", "-c", recipe)
    for named in (str(path), "0001", "0002", "NaN", "more than 1.0%"):
        assert named in line


def test_a_file_where_a_folder_is_wanted(capsys: Captured, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    line = failed(capsys, "shards", "dialpad", "--count", "2", "--out", file / "raw")
    assert str(file) in line
    assert file.read_text() == ""
