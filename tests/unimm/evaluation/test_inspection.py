"""What `unimm inspect` says of everything that the library writes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unimm.checkpoint import save_weights, seal
from unimm.data.manifest import Manifest
from unimm.data.shards import ShardWriter
from unimm.evaluation.inspection import inspect
from unimm.model import UnifiedLM
from unimm.tokenizer import UnifiedTokenizer
from unimm.training.launch import AtomicCheckpointIO


def rows(table: list[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """Rows of a table by one of its columns."""
    return {row[key]: row for row in table}


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
    found = inspect(model_bundle)
    tok = UnifiedTokenizer.from_pretrained(model_bundle)
    lm = UnifiedLM.from_pretrained(model_bundle)
    data = json.loads(json.dumps(found.data()))
    assert (data["kind"], data["name"]) == ("bundle", str(model_bundle))
    vocabulary = data["vocabulary"]
    assert vocabulary["fingerprint"] == tok.vocabulary.fingerprint
    assert vocabulary["ids"] == len(tok.vocabulary)
    assert vocabulary["shared_blocks"] == {"video": "image"}
    assert [(b["block"], b["size"], b["first"], b["last"]) for b in vocabulary["blocks"]] == [
        (block.name, block.size, block.start, block.end - 1) for block in tok.vocabulary
    ]
    assert data["text_model"]["pieces"] == tok.text.size
    codecs = {codec["name"]: codec for codec in data["codecs"]}
    picture, sound = codecs["image"], codecs["audio"]
    assert (picture["class"], picture["codebooks"], picture["codebook_size"]) == ("vision", 1, 16)
    assert picture["downsample"] == [4, 8, 8]
    assert (picture["bits_per_pixel"], picture["bits_per_pixel_of_film"]) == (4 / 64, 4 / 256)
    assert (sound["class"], sound["bit_rate"]) == ("spectral", 25 * 2 * 4)
    assert data["language_model"]["parameters"] == lm.num_parameters
    assert data["language_model"]["weights"]["types"] == ["F32"]
    assert data["seal"]["files"] == 9
    assert data["sampling_defaults"] is None


def test_a_bundle_as_people_read_it(model_bundle: Path) -> None:
    text = str(inspect(model_bundle))
    tok = UnifiedTokenizer.from_pretrained(model_bundle)
    assert text.splitlines()[0] == f"bundle {model_bundle}"
    assert re.search(r"^  seal  9 files, .* sha256 agrees with index.json$", text, re.MULTILINE)
    for name, value in {
        "fingerprint": tok.vocabulary.fingerprint[:12],
        "shared blocks": "video writes with the blocks of image",
        "bit rate": "0.2 kbit/s",
        "downsample": "4 x 8 x 8",
        "modalities": "image, video",
        "layers": "1",
    }.items():
        assert re.search(rf"^  {name} +{re.escape(value)}$", text, re.MULTILINE)
    for block in tok.vocabulary:
        row = f"  {block.name} +{block.size:,} +{block.start:,} +{block.end - 1:,}"
        assert re.search(rf"^{row}$", text, re.MULTILINE)
    assert "sampling defaults: none" in text


def test_a_tokenizer_without_a_model_says_so(tokenizer_bundle: Path, tmp_path: Path) -> None:
    assert inspect(tokenizer_bundle).data()["language_model"] is None
    assert "language model: none" in str(inspect(tokenizer_bundle))
    copy = tmp_path / "open"
    shutil.copytree(tokenizer_bundle, copy)
    (copy / "index.json").unlink()
    assert inspect(copy).data()["seal"] is None
    assert "none: there is no index.json" in str(inspect(copy))


def test_what_ships_by_its_name() -> None:
    """A bundle that holds a codec and nothing else; a codec of a bundle."""
    alone = inspect("photo-f8").data()
    assert (alone["vocabulary"], alone["text_model"]) == (None, None)
    assert [codec["codebook_size"] for codec in alone["codecs"]] == [16384]
    assert inspect("dialpad/audio").data()["modalities"] == ["audio"]
    (regions,) = inspect("semantic").data()["codecs"]
    assert (regions["bits_per_code"], regions.get("bits_per_pixel")) == (10, None)


def test_weights_in_shards_are_added_up(model_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(model_bundle, copy)
    (copy / "index.json").unlink()
    whole = inspect(copy).data()["language_model"]
    config = json.loads((copy / "lm/config.json").read_text())
    save_weights(copy / "lm", config, load_file(copy / "lm/model.safetensors"), shard_bytes=20_000)
    assert len(list((copy / "lm").glob("*.safetensors"))) > 1
    assert inspect(copy).data()["language_model"]["parameters"] == whole["parameters"]


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
    found = inspect(str(copy))
    assert found.data()["sampling_defaults"] == tok.defaults
    assert "  image  temperature 0.9, guidance 3" in str(found)
    assert "F16" in found.data()["codecs"][0]["weights"]["types"]


def test_a_codec_folder(model_bundle: Path) -> None:
    sound = inspect(model_bundle / "codecs/audio").data()
    assert (sound["kind"], sound["name"]) == ("codec", str(model_bundle / "codecs/audio"))
    assert (sound["frame_rate"], sound["sample_rate"]) == (25, 8000)
    assert inspect(model_bundle / "codecs/image").data()["modalities"] == ["image", "video"]


def test_damaged_weights_are_named(model_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "image"
    shutil.copytree(model_bundle / "codecs/image", copy)
    (copy / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged safetensors file"):
        inspect(copy)


def test_a_checkpoint_and_its_run_folder(checkpoint: Path) -> None:
    found = inspect(checkpoint)
    data = json.loads(json.dumps(found.data()))
    assert (data["kind"], data["name"]) == ("checkpoint", str(checkpoint))
    assert data["holds"] == "language model"
    assert (data["step"], data["lightning"], data["optimizers"]) == (42, "2.6.6", 2)
    assert data["samples_used"] == {"TokenDataModule": 1234}
    assert data["parameters_and_buffers"] == 20
    assert data["vocabulary"] == "ab" * 32
    assert data["config"] == {"d_model": 8, "rope_bases": [1.0, 2.0]}
    assert re.search(r"^  vocabulary +(ab){6}$", str(found), re.MULTILINE)
    assert inspect(checkpoint.parents[1]) == found


def test_a_checkpoint_of_others_says_so(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(2)}}, path)
    data = inspect(path).data()
    assert data["holds"] == "a model of others: not written by `unimm fit`"
    assert data["step"] is None


def test_damaged_checkpoints_are_refused(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"final\.ckpt: damaged or cut"):
        inspect(checkpoint)
    with pytest.raises(ValueError, match="no whole checkpoint is there"):
        inspect(checkpoint.parents[1])
    with pytest.raises(ValueError, match=r"none\.ckpt: no such checkpoint"):
        inspect(checkpoint.with_name("none.ckpt"))


def test_a_raw_shard(raw_shards: Path) -> None:
    found = inspect(raw_shards / "dialpad-000001.tar")
    data = found.data()
    assert data["kind"] == "raw shard"
    assert (data["samples"], data["manifest"]) == (12, None)
    assert data["keys"] == ["00000012", "00000023"]
    files = rows(data["files"], "file")
    assert files.keys() == {".gif", ".json", ".png", ".txt", ".wav"}
    assert {row["samples"] for row in files.values()} == {12}
    assert "keys      00000012 to 00000023" in str(found)


def test_a_token_shard(token_shards: Path) -> None:
    shard = token_shards / "dialpad-000000.tar"
    manifest = Manifest.read(shard)
    assert manifest.recipe is not None
    found = inspect(shard)
    data = json.loads(json.dumps(found.data()))
    assert (data["kind"], data["samples"], data["documents"]) == ("token shard", 48, 48)
    for name in ("vocabulary", "source", "templates", "coders"):
        assert data[name] == getattr(manifest.recipe, name)
    total = sum(manifest.tokens.values())
    assert (data["ids"], data["ids_each"]) == (total, total / 48)
    modalities = rows(data["modalities"], "modality")
    assert {name: row["ids"] for name, row in modalities.items()} == manifest.tokens
    assert sum(row["share"] for row in modalities.values()) == pytest.approx(1)
    items = {name: modalities[name]["items"] for name in ("image", "audio", "video")}
    assert items == {"image": 24, "audio": 12, "video": 12}
    assert modalities["image"]["ids_each"] == 22  # 16 codes, 4 digits of size and 2 marks
    documents = rows(data["documents_of_templates"], "template")["{txt} {png}"]
    assert documents["documents"] == 12
    assert 24 < documents["shortest"] <= documents["median"] <= documents["longest"] < 40
    shares = [float(value) for value in re.findall(r"([\d.]+)%", str(found))]
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_folders_of_shards_are_added_up(raw_shards: Path, token_shards: Path) -> None:
    raw = inspect(raw_shards).data()
    assert (raw["kind"], raw["shards"], raw["samples"]) == ("shards", 2, 24)
    assert "vocabulary" not in raw
    found = inspect(token_shards)
    data = found.data()
    assert (data["shards"], data["samples"], data["documents"]) == (2, 96, 96)
    manifests = [Manifest.read(path) for path in sorted(token_shards.glob("*.tar"))]
    assert manifests[0].recipe is not None
    assert data["vocabulary"] == [manifests[0].recipe.vocabulary]
    assert [row["ids"] for row in data["files"]] == [sum(m.tokens.values()) for m in manifests]
    pattern = inspect(f"{token_shards}/dialpad-{{000000..000001}}.tar")
    assert str(pattern).splitlines()[1:] == str(found).splitlines()[1:]


def test_many_shards_are_listed_in_part(tmp_path: Path) -> None:
    for number in range(23):
        with ShardWriter(tmp_path / f"s-{number:03d}.tar") as writer:
            writer.write("a", {"txt": b"one"})
    found = inspect(tmp_path)
    assert len(found.data()["files"]) == 23
    text = str(found)
    assert "s-019.tar" in text
    assert "s-020.tar" not in text
    assert "and 3 more" in text


def test_skipped_samples_are_named(token_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(token_shards, tmp_path / "t")
    shard = tmp_path / "t/dialpad-000000.tar"
    manifest = Manifest.read(shard)
    note = {"key": "00000003", "reason": "not a picture"}
    Manifest(**{**vars(manifest), "skipped": (note,)}).write(shard.parent)
    found = inspect(shard)
    assert found.data()["left_out"] == [note]
    assert re.search(r"left out +1, first 00000003: not a picture", str(found))


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
    vocabulary = inspect(model_bundle / "vocabulary.json").data()
    assert vocabulary["fingerprint"] == tok.vocabulary.fingerprint
    assert inspect(model_bundle / "text.model").data()["pieces"] == tok.text.size
    weights = inspect(model_bundle / "lm/model.safetensors")
    tensors = rows(weights.data()["tensors"], "tensor")
    assert tensors["embedding.weight"]["type"] == "F32"
    height, width = tensors["embedding.weight"]["shape"]
    assert re.search(rf"embedding\.weight +F32 +{height} x {width}\n", str(weights))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match=r"cut\.safetensors: damaged safetensors file"):
        inspect(tmp_path / "cut.safetensors")


def test_a_hugging_face_model(tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 330, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": torch.zeros(330, 8)}, tmp_path / "model.safetensors")
    found = inspect(tmp_path)
    data = found.data()
    assert (data["kind"], data["tensors"], data["vocab_size"]) == ("Hugging Face model", 1, 330)
    assert "`unimm convert`" in str(found)


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
