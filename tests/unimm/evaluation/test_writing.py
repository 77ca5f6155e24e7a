"""Generation into a folder, with an untrained model: every answer is a file that can be read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unimm.data.media import decode
from unimm.evaluation.figures import png_bytes, wav_bytes
from unimm.evaluation.writing import generate_to_folder, gif_bytes, read_prompt, write_document
from unimm.signals import Audio, Semantic, Turn, Video

SIGNALS = {"text": "txt", "image": "png", "audio": "wav", "video": "gif"}
SAMPLES = {"text": 2, "image": 2, "audio": 1, "video": 1}  # an untrained model writes long films


def picture(seed: int = 0, size: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def film(frames: int = 5, colours: int = 4, size: int = 16) -> Video:
    values = np.random.default_rng(0).integers(0, 256, (colours, 3), dtype=np.uint8)
    chosen = np.random.default_rng(1).integers(0, colours, (frames, size, size))
    return Video(torch.from_numpy(values[chosen]), 10.0)


def sound() -> Audio:
    return Audio(torch.sin(torch.arange(1600.0) / 5)[None] * 0.5, 8000)


@pytest.mark.parametrize("modality", SIGNALS)
def test_every_modality_is_written_as_files_that_read_back(
    model_bundle: Path, tmp_path: Path, modality: str
) -> None:
    samples = SAMPLES[modality]
    paths = generate_to_folder(
        model_bundle, ["seven"], modality, tmp_path, num_samples=samples, seed=3
    )
    kinds = {path.suffix for path in paths}
    assert kinds <= {f".{SIGNALS[modality]}"}
    assert [path.name[:3] for path in paths] == sorted(path.name[:3] for path in paths)
    for path in paths:
        decode(SIGNALS[modality], path.read_bytes() or b" ", str(path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["prompt"] == ["seven"]
    assert results["modality"] == modality
    assert results["seed"] == 3
    assert results["files"] == [path.name for path in paths]
    assert results["seconds"]["generate"] > 0
    assert results["tokens"] == sum(sample["tokens"] for sample in results["samples"])
    assert len(results["samples"]) == samples
    if modality != "text":
        assert all(sample["tokens"] > 2 for sample in results["samples"])


def test_a_seed_repeats_the_run_and_no_seed_states_its_own(
    model_bundle: Path, tmp_path: Path
) -> None:
    one = generate_to_folder(model_bundle, ["two"], "text", tmp_path / "one")
    seed = json.loads((tmp_path / "one/results.json").read_text())["seed"]
    two = generate_to_folder(model_bundle, ["two"], "text", tmp_path / "two", seed=seed)
    three = generate_to_folder(model_bundle, ["two"], "text", tmp_path / "three", seed=seed + 1)
    assert one[0].read_bytes() == two[0].read_bytes()
    assert one[0].read_bytes() != three[0].read_bytes()


def test_the_model_may_choose_what_it_writes(model_bundle: Path, tmp_path: Path) -> None:
    paths = generate_to_folder(model_bundle, [], None, tmp_path, num_samples=2, seed=0)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [name for sample in results["samples"] for name in sample["files"]] == [
        path.name for path in paths
    ]
    assert all(path.is_file() for path in paths)


@pytest.mark.parametrize("kind", ["png", "wav", "gif"])
def test_a_prompt_may_be_a_file(model_bundle: Path, tmp_path: Path, kind: str) -> None:
    data = {"png": png_bytes(picture()), "wav": wav_bytes(sound()), "gif": gif_bytes(film())}[kind]
    (tmp_path / f"shown.{kind}").write_bytes(data)
    prompt = [str(tmp_path / f"shown.{kind}"), "is"]
    generate_to_folder(model_bundle, prompt, "text", tmp_path / "out", seed=0, temperature=0.5)
    assert json.loads((tmp_path / "out/results.json").read_text())["prompt"] == prompt


def test_prompts_are_texts_unless_they_name_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("seven").mkdir()
    Path("five").write_text("not read")
    Path("note.txt").write_text("from a file")
    Path("my cat.PNG").write_bytes(png_bytes(picture()))
    assert read_prompt("seven") == "seven"
    assert read_prompt("five") == "five"
    assert read_prompt("") == ""
    assert read_prompt("note.txt") == "from a file"
    assert read_prompt("other.txt is text") == "other.txt is text"
    assert read_prompt("Look at that cat.png") == "Look at that cat.png"
    assert read_prompt("x" * 5000) == "x" * 5000
    read = read_prompt("my cat.PNG")
    assert isinstance(read, Image.Image)
    assert read.tobytes() == picture().tobytes()


@pytest.mark.parametrize("name", ["cat.png", "tone.wav", "film.gif", "a/b/film.mp4"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"prompt '{name}': no such file"):
        read_prompt(name)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(png_bytes(picture())[:200])
    with pytest.raises(ValueError, match=r"cat\.png: \.png: damaged picture"):
        read_prompt(str(path))


def test_bad_requests_write_nothing(model_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="num_samples: at least 1"):
        generate_to_folder(model_bundle, ["two"], "image", out, num_samples=0)
    with pytest.raises(ValueError, match="no codec for 'semantic'"):
        generate_to_folder(model_bundle, ["two"], "semantic", out)
    with pytest.raises(ValueError, match="guidance needs a condition"):
        generate_to_folder(model_bundle, [], "image", out, guidance=2.0)
    with pytest.raises(ValueError, match=r"no folder '\./nowhere'"):
        generate_to_folder("./nowhere", ["two"], "image", out)
    assert not out.exists()


def test_items_are_written_in_their_order(tmp_path: Path) -> None:
    document = [
        Turn("user"),
        "seven \u2581 \U0001f600",
        picture(),
        sound(),
        film(),
        Semantic(picture(1)),
    ]
    paths = write_document(document, tmp_path, 12)
    names = ["12-1.txt", "12-2.txt", "12-3.png", "12-4.wav", "12-5.gif", "12-6.png"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    user, text, shown, heard, moving, regions = (
        decode(path.suffix[1:], path.read_bytes(), path.name) for path in paths
    )
    assert (user, text) == ("<user>", document[1])
    assert shown.tobytes() == picture().tobytes()
    assert regions.tobytes() == picture(1).tobytes()
    assert heard.sample_rate == 8000
    assert torch.allclose(heard.samples, sound().samples, atol=1e-4)
    assert torch.equal(moving.frames, film().frames)
    assert moving.fps == 10.0
    assert write_document([], tmp_path, 13) == []


def test_films_last_as_long_whatever_their_frames() -> None:
    noise = Video(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8), 25.0)
    read = decode("gif", gif_bytes(noise), "noise")
    assert len(read.frames) == 4
    assert read.fps == pytest.approx(25.0)
    assert float((read.frames.float() - noise.frames.float()).abs().mean()) < 40
    still = Video(film(1).frames.expand(3, -1, -1, -1), 10.0)
    read = decode("gif", gif_bytes(still), "still")
    assert len(read.frames) / read.fps == pytest.approx(0.3)
    assert torch.equal(read.frames[0], still.frames[0])
    (one,) = decode("gif", gif_bytes(film(1)), "one frame").frames
    assert torch.equal(one, film(1).frames[0])
