"""What a training made, as folders that people load."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import unimm
from unimm.checkpoint import verify
from unimm.training.export import export
from unimm.training.launch import launch, read_checkpoint

WriteRecipe = Callable[..., Path]


@pytest.fixture
def codec_run(audio_recipe: dict[str, Any], write_recipe: WriteRecipe) -> Path:
    launch(["-c", str(write_recipe(audio_recipe, **{"trainer.max_steps": 3}))])
    return Path(audio_recipe["trainer"]["default_root_dir"])


@pytest.fixture
def language_run(language_recipe: dict[str, Any], write_recipe: WriteRecipe) -> Path:
    launch(["-c", str(write_recipe(language_recipe, **{"trainer.max_steps": 3}))])
    return Path(language_recipe["trainer"]["default_root_dir"])


def trained(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoints/final.ckpt", "cpu")["unimm"]["weights"]


def test_a_codec_comes_out_as_it_was_trained(codec_run: Path, tmp_path: Path) -> None:
    out = export(codec_run, tmp_path / "codec")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    codec = unimm.load_codec(out)
    assert (codec.name, codec.modality, codec.sample_rate) == ("spectral", "audio", 8000)
    assert not codec.training
    weights = trained(codec_run)
    kept = {
        name: value
        for name, value in codec.state_dict().items()
        if not name.endswith(codec.quantizer.statistics)
    }
    assert [name for name, value in kept.items() if not torch.equal(value, weights[name])] == []
    sound = torch.rand(1, 1, 1600) * 2 - 1
    codes = codec.encode(sound)
    assert codes.shape == (1, 2, 5)
    assert codec.decode(codes, (1600,)).shape == sound.shape


def test_half_precision_halves_the_file(codec_run: Path, tmp_path: Path) -> None:
    sizes = [
        (export(codec_run, tmp_path / name, dtype=dtype) / "model.safetensors").stat().st_size
        for name, dtype in (("full", None), ("half", torch.float16))
    ]
    assert 0.45 < sizes[1] / sizes[0] < 0.75
    full, half = (unimm.load_codec(tmp_path / name).state_dict() for name in ("full", "half"))
    assert all(value.dtype != torch.float16 for value in half.values())
    assert all(torch.allclose(half[n].float(), v.float(), atol=1e-2) for n, v in full.items())


def test_a_language_model_becomes_a_bundle_that_writes(
    language_run: Path, tokenizer_bundle: Path, tmp_path: Path
) -> None:
    out = export(language_run, tmp_path / "bundle", tokenizer_bundle)
    verify(out)
    assert (out / "index.json").is_file()
    lm, tok = unimm.UnifiedLM.from_pretrained(out), unimm.UnifiedTokenizer.from_pretrained(out)
    weights = trained(language_run)
    assert [n for n, v in lm.state_dict().items() if not torch.equal(v, weights[n])] == []
    (document,) = unimm.generate(lm, tok, ["seven"], "image", size=(32, 32), seed=0)
    (picture,) = document
    assert isinstance(picture, Image.Image)
    assert picture.size == (32, 32)


def test_the_newest_checkpoint_is_exported(codec_run: Path, tmp_path: Path) -> None:
    final = codec_run / "checkpoints/final.ckpt"
    one, two = export(codec_run, tmp_path / "one"), export(final, tmp_path / "two")
    names = ("config.json", "model.safetensors")
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_a_language_model_needs_its_own_tokenizer(
    language_run: Path, tokenizer_bundle: Path, other_tokenizer_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="needs its tokenizer"):
        export(language_run, tmp_path / "out")
    own, other = (
        unimm.UnifiedTokenizer.from_pretrained(folder).vocabulary.fingerprint[:12]
        for folder in (tokenizer_bundle, other_tokenizer_bundle)
    )
    with pytest.raises(ValueError, match=rf"made with vocabulary {own}, not with .*\({other}\)"):
        export(language_run, tmp_path / "out", other_tokenizer_bundle)
    assert not (tmp_path / "out").exists()


def test_what_is_no_checkpoint_of_ours_is_refused(codec_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no checkpoint is there"):
        export(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no checkpoint is there"):
        export(tmp_path / "empty", tmp_path / "out")
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}, "global_step": 3}, foreign)
    with pytest.raises(ValueError, match=r"foreign\.ckpt: this checkpoint was not written by"):
        export(foreign, tmp_path / "out")
    cut = tmp_path / "cut.ckpt"
    shutil.copy(codec_run / "checkpoints/final.ckpt", cut)
    cut.write_bytes(cut.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.ckpt: damaged or cut"):
        export(cut, tmp_path / "out")
    assert not (tmp_path / "out").exists()
