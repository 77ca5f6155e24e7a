"""The command line: every command on a tiny world, its exit codes, and errors of one line."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import unimm
from unimm.cli import main
from unimm.data.manifest import Manifest

Captured = pytest.CaptureFixture[str]


def failed(capsys: Captured, *arguments: str | Path) -> str:
    """The one line that a failing command writes; exit code 1."""
    assert main([str(argument) for argument in arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("unimm: error: ")
    return lines[0].removeprefix("unimm: error: ")


def run(*arguments: str | Path) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture
def recipe(tmp_path: Path, raw_shards: Path) -> Callable[..., Path]:
    """A codec for sounds, two steps; extra keys go into its trainer."""

    def write(**extra: object) -> Path:
        config = {"channels": 16, "num_blocks": 1, "num_codebooks": 2, "codebook_size": 16}
        signals = {"modality": "audio", "num_channels": 1, "sample_rate": 8000, "length": 3200}
        codec = {
            "class_path": "unimm_tokenizers.audio.SpectralCodec",
            "init_args": {"config": config},
        }
        objective = {"class_path": "unimm_tokenizers.losses.SpectrumObjective"}
        trainer = {
            "default_root_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        }
        written = {
            "model": {
                "class_path": "unimm.training.CodecTask",
                "init_args": {"codec": codec, "objective": objective},
            },
            "data": {
                "class_path": "unimm.data.module.SignalDataModule",
                "init_args": {"shards": str(raw_shards), "batch_size": 4, "config": signals},
            },
            "trainer": {**trainer, **extra},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(written))
        return path

    return write


def test_help_is_quick_and_loads_no_torch() -> None:
    script = (
        "import sys\n"
        "from unimm.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as stop:\n"
        "    heavy = {'torch', 'numpy', 'lightning', 'PIL', 'yaml', 'rich'} & set(sys.modules)\n"
        "    print('code', stop.code, 'loaded', sorted(heavy))\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "code 0 loaded []"
    for command in ("demo", "fit", "tokenize", "generate", "bench", "inspect", "doctor"):
        assert re.search(rf"^    {command} ", done.stdout, re.MULTILINE)
    # Processor time: the clock on the wall also counts what else the machine does.
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 0.5


def test_the_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == unimm.__version__


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["inspect"],
        ["inspect", "a", "--nonsense"],
        ["generate", "--model", "m"],
        ["generate", "--model", "m", "--out", "o", "--modality", "smell"],
        ["tokenize", "raw.tar", "--tokenizer", "t", "--out", "o", "--workers", "many"],
        ["demo", "--fas"],
    ],
)
def test_wrong_usage_exits_with_2(capsys: Captured, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: unimm" in capsys.readouterr().err


def test_fit_without_a_recipe_is_wrong_usage(capsys: Captured) -> None:
    assert main(["fit", "--trainer.max_steps", "3"]) == 2
    assert "name a recipe with -c RECIPE.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["inspect", "./nowhere"], ["bench", "./nowhere", "--data", "d", "--out", "o"]]
)
@pytest.mark.parametrize("place", ["before", "after", None])
def test_debug_shows_the_traceback(
    capsys: Captured, arguments: list[str], place: str | None
) -> None:
    given = {"before": ["--debug", *arguments], "after": [*arguments, "--debug"], None: arguments}
    assert main(given[place]) == 1
    err = capsys.readouterr().err
    assert ("Traceback (most recent call last)" in err) == (place is not None)
    assert err.splitlines()[-1].startswith("unimm: error: ")


def test_a_recipe_is_trained_resumed_validated_and_exported(
    capsys: Captured, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run("fit", "-c", recipe())
    checkpoint = tmp_path / "run/checkpoints/final.ckpt"
    run("inspect", checkpoint)
    assert re.search(r"step +2\n", capsys.readouterr().out)
    run("fit", "-c", recipe(), "--trainer.max_steps", "3")
    run("inspect", tmp_path / "run")
    assert re.search(r"step +3\n", capsys.readouterr().out)
    values = [
        "--data.init_args.val_shards",
        yaml.safe_load(recipe().read_text())["data"]["init_args"]["shards"],
    ]
    capsys.readouterr()
    run("validate", "--json", "-c", recipe(), "--ckpt_path", checkpoint, *values)
    told = json.loads(capsys.readouterr().out)  # Lightning's own table goes to the other stream
    assert told["run"] == str(tmp_path / "run")
    assert told["metrics"]["val/audio/psnr"] > 0
    run("export", tmp_path / "run", tmp_path / "codec", "--half")
    assert unimm.load_codec(tmp_path / "codec").sample_rate == 8000


def test_a_misspelled_key_is_one_line_with_a_hint(
    capsys: Captured, recipe: Callable[..., Path]
) -> None:
    line = failed(capsys, "fit", "-c", recipe(max_step=3))
    assert line.endswith("recipe.yaml: unknown key 'trainer.max_step' (did you mean 'max_steps'?)")
    line = failed(capsys, "fit", "-c", recipe(), "--trainer.max_stepp=3")
    assert line.endswith("unknown key 'trainer.max_stepp' (did you mean 'max_steps'?)")
    assert "no recipe file 'nowhere.yaml'" in failed(capsys, "fit", "-c", "nowhere.yaml")
    line = failed(capsys, "fit", "-c", "dialpad/image-codecs.yaml")
    assert "did you mean 'dialpad/image-codec.yaml'?" in line


def test_from_raw_shards_to_answers(capsys: Captured, model_bundle: Path, tmp_path: Path) -> None:
    raw, tok, tokens, out = (tmp_path / name for name in ("raw", "tok", "tokens", "out"))
    run("shards", "dialpad", "--out", raw, "--count", "6", "--seed", "3")
    assert f"{raw}: 6 samples in 1 shards" in capsys.readouterr().out
    codecs = [
        part for name in ("image", "audio") for part in ("--codec", f"{model_bundle}/codecs/{name}")
    ]
    run("tokenizer", *codecs, "--text-from", raw, "--out", tok)
    assert unimm.UnifiedTokenizer.from_pretrained(tok).vocabulary.modalities == (
        "text",
        "image",
        "video",
        "audio",
    )
    run("tokenize", f"{raw}/dialpad-{{000000..000000}}.tar", "--tokenizer", tok, "--out", tokens)
    manifest = Manifest.read(tokens / "dialpad-000000.tar")
    assert (manifest.samples, manifest.kind) == (6, "tokens")
    assert "1 shards written, 0 kept, 0 failed" in capsys.readouterr().out
    run("tokenize", raw, "--tokenizer", tok, "--out", tokens, "--verify")
    assert "0 shards written, 1 kept" in capsys.readouterr().out
    run("inspect", tokens)
    assert "vocabulary" in capsys.readouterr().out

    prompt = ["--prompt", "seven", "--modality", "image", "--num-samples", "2", "--seed", "1"]
    run("generate", "--model", model_bundle, *prompt, "--temperature", "0.8", "--out", out)
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.name for path in written] == ["01-1.png", "02-1.png"]
    assert json.loads((out / "results.json").read_text())["files"] == ["01-1.png", "02-1.png"]


def test_templates_decide_the_documents(
    capsys: Captured, raw_shards: Path, tokenizer_bundle: Path, tmp_path: Path
) -> None:
    templates = tmp_path / "templates.yaml"
    templates.write_text("- {parts: ['{txt}', '{png}']}\n- {parts: ['{wav}']}\n")
    given = ["tokenize", raw_shards, "--tokenizer", tokenizer_bundle, "--templates", templates]
    run(*given, "--documents-per-sample", "2", "--seed", "5", "--out", tmp_path / "tokens")
    manifest = Manifest.read(tmp_path / "tokens/dialpad-000000.tar")
    assert manifest.samples == 24
    assert manifest.tokens.keys() == {"text", "image", "audio"}
    line = failed(capsys, *given, "--out", tmp_path / "tokens")
    assert "was made with templates" in line
    run(*given, "--overwrite", "--out", tmp_path / "tokens")
    capsys.readouterr()
    templates.write_text("- {parts: ['{txt}', '{pgn}']}\n")
    assert "unknown field 'pgn' (did you mean 'png'?)" in failed(
        capsys, *given, "--out", tmp_path / "other"
    )


def test_a_shard_that_fails_is_named_and_the_others_are_made(
    capsys: Captured, raw_shards: Path, tokenizer_bundle: Path, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    whole, cut = (raw_shards / f"dialpad-00000{number}.tar" for number in (0, 1))
    (raw / "a.tar").write_bytes(whole.read_bytes())
    (raw / "b.tar").write_bytes(cut.read_bytes()[:9000])
    given = ["tokenize", raw, "--tokenizer", tokenizer_bundle, "--out", tmp_path / "tokens"]
    assert main([str(argument) for argument in given]) == 1
    captured = capsys.readouterr()
    assert "1 shards written, 0 kept, 1 failed" in captured.out
    assert re.search(r"unimm: error: b\.tar: .*b\.tar: cut at byte 9000", captured.err)
    assert (tmp_path / "tokens/a.tar.json").is_file()
    assert not (tmp_path / "tokens/b.tar").exists()


def test_users_mistakes_are_one_line(
    capsys: Captured, model_bundle: Path, tokenizer_bundle: Path, raw_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert "no folder './nowhere'" in failed(
        capsys, "generate", "--model", "./nowhere", "--out", out, "--prompt", "a"
    )
    assert "holds no language model" in failed(
        capsys, "generate", "--model", tokenizer_bundle, "--out", out, "--prompt", "a"
    )
    assert "prompt 'cat.png': no such file" in failed(
        capsys, "generate", "--model", model_bundle, "--out", out, "--prompt", "cat.png"
    )
    assert "missing shards" in failed(
        capsys, "tokenize", "nowhere-{0..3}.tar", "--tokenizer", tokenizer_bundle, "--out", out
    )
    assert "templates.yaml: the file is missing" in failed(
        capsys,
        *("tokenize", raw_shards, "--tokenizer", tokenizer_bundle, "--out", out),
        *("--templates", tmp_path / "templates.yaml"),
    )
    assert "no checkpoint is there" in failed(capsys, "export", tmp_path / "no", out)
    assert "no recipe 'dialpat'" in failed(
        capsys, "evaluate", "--model", model_bundle, "--recipe", "dialpat", "--out", out
    )
    assert not out.exists()


def test_doctor_looks_at_the_machine(capsys: Captured) -> None:
    run("doctor")
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 13
    assert all(line.startswith(("ok ", "warn")) for line in lines)
