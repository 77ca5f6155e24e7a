"""Files are whole or absent, and come back as they were."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from unimm_tokenizers.storage import (
    load_tensors,
    load_weights,
    read_json,
    replacing,
    save_model,
    sha256,
    write_json,
    write_text,
)


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "note.txt"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent  # os.replace is atomic within a file system only
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def interrupted_write(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("hal")
        raise KeyboardInterrupt


def test_a_broken_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "old \u2581")
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(path)
    assert path.read_text(encoding="utf-8") == "old \u2581"
    assert list(tmp_path.iterdir()) == [path]


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    data = {"b": [1, 2.5, None, "\u00e9"], "a": {"x": True}}
    write_json(path, data)
    assert read_json(path) == data
    assert list(json.loads(path.read_text())) == ["b", "a"]
    assert path.read_bytes().endswith(b"\n")


def test_json_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: the file is missing"):
        read_json(path)
    for content in (b"{", b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: not valid JSON"):
            read_json(path)


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"abc" * 100_000)
    assert sha256(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_tensors_come_back(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "a": base,
        "transposed": base.T,
        "view": base[1:3],
        "codes": torch.tensor([1, -(2**40)]),
        "flag": torch.tensor(True),
        "double": torch.randn(3, dtype=torch.float64),
    }
    save_model(tmp_path, {"width": 4}, tensors)
    assert read_json(tmp_path / "config.json") == {"width": 4}
    loaded = load_tensors(tmp_path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"w": torch.randn(64, 64), "count": torch.tensor([3]), "flag": torch.tensor(True)}
    save_model(tmp_path, {}, tensors, dtype)
    assert (tmp_path / "model.safetensors").stat().st_size < 1.2 * 2 * 64 * 64
    loaded = load_tensors(tmp_path)
    assert loaded["w"].dtype == torch.float32
    assert torch.equal(loaded["w"], tensors["w"].to(dtype).float())
    assert torch.equal(loaded["count"], tensors["count"])
    assert torch.equal(loaded["flag"], tensors["flag"])


def test_what_half_precision_cannot_hold_stays(tmp_path: Path) -> None:
    """Usage counts of a large codebook exceed float16's 65,504 and would come back infinite."""
    tensors = {"counts": torch.tensor([1.0, 1e6]), "masked": torch.tensor([0.5, -torch.inf])}
    save_model(tmp_path, {}, tensors, torch.float16)
    loaded = load_tensors(tmp_path)
    assert torch.equal(loaded["counts"], tensors["counts"])
    assert torch.equal(loaded["masked"], tensors["masked"])


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: the file is missing"):
        load_tensors(tmp_path)
    for content in (b"", b"\x00" * 100, b"\xff" * 8):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: damaged safetensors"):
            load_tensors(tmp_path)


def test_weights_are_all_or_nothing(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 3)
    save_model(tmp_path, {}, layer.state_dict())
    other = torch.nn.Linear(2, 3)
    load_weights(other, tmp_path)
    assert torch.equal(other.weight, layer.weight)
    for module, name in (
        (torch.nn.Linear(2, 3, bias=False), "bias"),
        (torch.nn.Linear(5, 3), "weight"),
        (torch.nn.Sequential(torch.nn.Linear(2, 3)), "0.bias"),
    ):
        with pytest.raises(ValueError, match=f"weights do not fit the config, first at '{name}'"):
            load_weights(module, tmp_path)
