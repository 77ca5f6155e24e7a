"""What `unimm inspect` says of everything that the library writes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unimm.checkpoint import seal
from unimm.data.manifest import Manifest
from unimm.data.shards import ShardWriter
from unimm.evaluation.inspection import inspect
from unimm.tokenizer import UnifiedTokenizer
from unimm.training.launch import AtomicCheckpointIO


def rows(text: str) -> dict[str, str]:
    """Lines by their first word."""
    return {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As `unimm fit` writes it."""
    path = tmp_path / "run/checkpoints/final.ckpt"
    entry = {
        "kind": "lm",
        "config": {"d_model": 8, "rope_bases": (1.0, 2.0)},
        "vocabulary": "ab" * 32,
    }
    stored = {
        "global_step": 42,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {},
        "optimizer_states": [{}, {}],
        "TokenDataModule": {"consumed": 1234},
        "unimm": {"entry": entry, "weights": {"w": torch.zeros(3, 5), "b": torch.zeros(5)}},
    }
    AtomicCheckpointIO().save_checkpoint(stored, path)
    return path


def test_a_bundle_shows_vocabulary_codecs_model_and_seal(model_bundle: Path) -> None:
    text = inspect(model_bundle)
    tok = UnifiedTokenizer.from_pretrained(model_bundle)
    assert f"fingerprint {tok.vocabulary.fingerprint[:12]}" in text
    for block in tok.vocabulary:
        row = f"  {block.name} +{block.size:,} +{block.start} +{block.end - 1}"
        assert re.search(rf"^{row}$", text, re.MULTILINE)
    assert "video writes with the blocks of image" in text
    assert f"text model: {tok.text.size} pieces" in text
    assert "codec image: vision" in text
    assert "1 x 16 (K x codebook size)" in text
    assert "downsample       4 x 8 x 8" in text
    assert "codec audio: spectral" in text
    assert "bit rate         0.2 kbit/s" in text  # 25 frames x 2 levels x 4 bits
    assert re.search(r"language model: [\d,]+ parameters, .* \(F32\)", text)
    assert "width 32, 1 layers, 2 heads (2 for keys and values) of 16" in text
    assert re.search(r"sealed: 9 files, .* sha256 agrees with index.json", text)


def test_a_tokenizer_without_a_model_says_so(tokenizer_bundle: Path, tmp_path: Path) -> None:
    assert "language model: none" in inspect(tokenizer_bundle)
    copy = tmp_path / "open"
    shutil.copytree(tokenizer_bundle, copy)
    (copy / "index.json").unlink()
    assert "not sealed: there is no index.json" in inspect(copy)


def test_a_changed_bundle_is_refused(tokenizer_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "changed"
    shutil.copytree(tokenizer_bundle, copy)
    (copy / "generation.json").write_text('{"text": {"top_k": 1}}')
    with pytest.raises(ValueError, match=r"generation\.json: the file differs from index\.json"):
        inspect(copy)


def test_sampling_defaults_are_listed(tokenizer_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "defaults"
    tok = UnifiedTokenizer.from_pretrained(tokenizer_bundle)
    tok.defaults = {"image": {"temperature": 0.9, "guidance": 3.0}}
    tok.save_pretrained(copy, torch.float16)
    seal(copy)
    text = inspect(str(copy))
    assert "  image: temperature 0.9, guidance 3.0" in text
    assert "(F16" in text


def test_a_codec_folder(model_bundle: Path) -> None:
    text = inspect(model_bundle / "codecs/audio")
    assert text.startswith(f"codec {model_bundle / 'codecs/audio'}")
    assert "frame rate       25 Hz" in text
    assert "sample rate      8,000 Hz" in text
    picture = inspect(model_bundle / "codecs/image")
    assert "modalities       image, video" in picture
    assert "bits per pixel" in picture


def test_damaged_weights_are_named(model_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "image"
    shutil.copytree(model_bundle / "codecs/image", copy)
    (copy / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged safetensors file"):
        inspect(copy)


def test_a_checkpoint_and_its_run_folder(checkpoint: Path) -> None:
    text = inspect(checkpoint)
    assert text.splitlines()[0] == f"checkpoint {checkpoint}: language model"
    facts = rows(text)
    assert facts["step"] == "42"
    assert facts["lightning"] == "2.6.6"
    assert facts["optimizers"] == "2"
    assert facts["data"] == "1,234 used (TokenDataModule)"
    assert facts["parameters"] == "20 (buffers included)"
    assert facts["vocabulary"] == "abababababab"
    assert "d_model 8, rope_bases 1.0 x 2.0" in text
    assert inspect(checkpoint.parents[1]) == text


def test_a_checkpoint_of_others_says_so(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(2)}}, path)
    assert "(not written by `unimm fit`)" in inspect(path)


def test_damaged_checkpoints_are_refused(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"final\.ckpt: damaged or cut"):
        inspect(checkpoint)
    with pytest.raises(ValueError, match="no whole checkpoint is there"):
        inspect(checkpoint.parents[1])
    with pytest.raises(ValueError, match=r"none\.ckpt: no such checkpoint"):
        inspect(checkpoint.with_name("none.ckpt"))


def test_a_raw_shard(raw_shards: Path) -> None:
    text = inspect(raw_shards / "dialpad-000001.tar")
    assert text.startswith("raw shard ")
    facts = rows(text)
    assert facts["samples"] == "12"
    assert facts["manifest"] == "none"
    for extension in (".gif", ".json", ".png", ".txt", ".wav"):
        assert facts[extension].startswith("12 ")
    assert facts["keys"] == "00000012 to 00000023"


def test_a_token_shard(token_shards: Path) -> None:
    shard = token_shards / "dialpad-000000.tar"
    manifest = Manifest.read(shard)
    assert manifest.recipe is not None
    text = inspect(shard)
    assert text.startswith("token shard ")
    facts = rows(text)
    assert facts["samples"] == "48"
    assert facts["vocabulary"] == manifest.recipe.vocabulary[:12]
    assert facts["source"] == manifest.recipe.source[:12]
    total = sum(manifest.tokens.values())
    assert f"  {total:,} ids in 48 documents, {total / 48:.1f} each" in text
    for modality, count in manifest.tokens.items():
        assert facts[modality].startswith(f"{count:,} {count / total:.1%} ")
    items = {name: facts[name].split()[2:] for name in ("image", "audio", "video")}
    assert {name: count for name, (count, _) in items.items()} == {
        "image": "24",
        "audio": "12",
        "video": "12",
    }
    # 16 codes, 4 digits of size and 2 marks
    assert items["image"][1] == f"{manifest.tokens['image'] / 24:.1f}" == "22.0"
    documents = [line.split() for line in text.splitlines() if line.startswith("  {txt} {png}")]
    assert documents[0][2] == "12"
    shortest, median, longest = (int(n) for n in documents[0][3:])
    assert 24 < shortest <= median <= longest < 40
    shares = [float(value) for value in re.findall(r"([\d.]+)%", text)]
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_folders_of_shards_are_added_up(raw_shards: Path, token_shards: Path) -> None:
    raw = inspect(raw_shards)
    assert raw.startswith(f"2 shards of {raw_shards}: 24 samples, ")
    text = inspect(token_shards)
    assert text.startswith(f"2 shards of {token_shards}: 96 samples, ")
    manifests = [Manifest.read(path) for path in sorted(token_shards.glob("*.tar"))]
    assert manifests[0].recipe is not None
    assert f"vocabulary {manifests[0].recipe.vocabulary[:12]}" in text
    for manifest in manifests:
        assert rows(text)[manifest.shard].endswith(f" {sum(manifest.tokens.values()):,}")
    pattern = inspect(f"{token_shards}/dialpad-{{000000..000001}}.tar")
    assert pattern.splitlines()[1:] == text.splitlines()[1:]


def test_many_shards_are_listed_in_part(tmp_path: Path) -> None:
    for number in range(23):
        with ShardWriter(tmp_path / f"s-{number:03d}.tar") as writer:
            writer.write("a", {"txt": b"one"})
    text = inspect(tmp_path)
    assert text.startswith(f"23 shards of {tmp_path}: 23 samples")
    assert "s-019.tar" in text
    assert "s-020.tar" not in text
    assert "and 3 more" in text


def test_skipped_samples_are_named(raw_shards: Path, token_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(token_shards, tmp_path / "t")
    shard = tmp_path / "t/dialpad-000000.tar"
    manifest = Manifest.read(shard)
    note = {"key": "00000003", "reason": "not a picture"}
    Manifest(**{**vars(manifest), "skipped": (note,)}).write(shard.parent)
    assert rows(inspect(shard))["left"] == "out 1, first 00000003: not a picture"


def test_what_is_damaged_is_named(raw_shards: Path, token_shards: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes((raw_shards / "dialpad-000000.tar").read_bytes()[:7000])
    with pytest.raises(ValueError, match=r"cut\.tar: cut at byte 7000"):
        inspect(cut)
    shutil.copytree(token_shards, tmp_path / "t")
    shard = tmp_path / "t/dialpad-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"its manifest says \d+; make it again"):
        inspect(shard)
    with pytest.raises(ValueError, match=r"its manifest says \d+; make it again"):
        inspect(shard.parent)


def test_parts_of_a_bundle(model_bundle: Path, tmp_path: Path) -> None:
    tok = UnifiedTokenizer.from_pretrained(model_bundle)
    fingerprint = tok.vocabulary.fingerprint[:12]
    assert f"fingerprint {fingerprint}" in inspect(model_bundle / "vocabulary.json")
    assert f"text model: {tok.text.size:,} pieces" in inspect(model_bundle / "text.model")
    weights = inspect(model_bundle / "lm/model.safetensors")
    assert re.search(r"embedding\.weight +F32 +\d+ x \d+\n", weights)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match=r"cut\.safetensors: damaged safetensors file"):
        inspect(tmp_path / "cut.safetensors")


def test_a_hugging_face_model(tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 330, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": torch.zeros(330, 8)}, tmp_path / "model.safetensors")
    found = inspect(tmp_path)
    assert found.splitlines()[0] == f"Hugging Face model {tmp_path}: 1 tensors"
    assert rows(found)["vocab_size"] == "330"
    assert "`unimm convert`" in found


def test_what_can_not_be_inspected_is_said(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cat\.png: nothing that can be inspected; name a bundle"):
        inspect(tmp_path / "cat.png")
    with pytest.raises(ValueError, match="holds nothing that can be inspected"):
        inspect(tmp_path)
    with pytest.raises(ValueError, match=r"1 missing shards: .*none\.tar"):
        inspect(tmp_path / "none.tar")
    with pytest.raises(ValueError, match=r"no folder 'dialpat' and no shipped bundle"):
        inspect("dialpat")
