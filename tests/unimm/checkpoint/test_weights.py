"""Weights in one file or in shards: whole or absent, and strictly those of the model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unimm import UnifiedLM
from unimm.checkpoint.weights import load_weights, save_weights


def state() -> dict[str, torch.Tensor]:
    """Ten tensors of 400 bytes."""
    return {f"part.{number}": torch.full((100,), float(number)) for number in range(10)}


class Holder(torch.nn.Module):
    """A module with those tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.part = torch.nn.ParameterList(torch.zeros(100) for _ in range(10))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_shards_and_their_index(tmp_path: Path) -> None:
    save_weights(tmp_path, {"a": 1}, state(), shard_bytes=1300)
    files = [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    assert names(tmp_path) == ["config.json", *files, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4000
    assert index["weight_map"]["part.9"] == files[3]
    assert all((tmp_path / file).stat().st_size < 1300 + 600 for file in files)
    holder = Holder()
    load_weights(holder, tmp_path)
    assert [float(p.detach().mean()) for p in holder.part] == list(range(10))


def test_half_precision_makes_fewer_shards(tmp_path: Path) -> None:
    save_weights(tmp_path, {}, state(), torch.bfloat16, shard_bytes=1300)
    assert len(list(tmp_path.glob("model-*"))) == 2
    holder = Holder()
    load_weights(holder, tmp_path, dtype=None)
    assert holder.part[3].dtype == torch.bfloat16
    load_weights(holder, tmp_path)
    assert holder.part[3].dtype == torch.float32


@pytest.mark.parametrize(("first", "second"), [(1300, 10**9), (10**9, 1300), (900, 1300)])
def test_what_stood_there_is_replaced(first: int, second: int, tmp_path: Path) -> None:
    """No file of the old form stays behind to be read for the new one."""
    save_weights(tmp_path / "new", {}, state(), shard_bytes=second)
    save_weights(tmp_path / "old", {}, {"other": torch.zeros(900)}, shard_bytes=first)
    save_weights(tmp_path / "old", {}, state(), shard_bytes=first)
    save_weights(tmp_path / "old", {}, state(), shard_bytes=second)
    assert names(tmp_path / "old") == names(tmp_path / "new")
    load_weights(Holder(), tmp_path / "old")


def test_a_whole_model_in_shards(tmp_path: Path, tiny_lm: UnifiedLM) -> None:
    tiny_lm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    save_weights(tmp_path / "lm", config, tiny_lm.state_dict(), shard_bytes=20_000)
    assert len(list((tmp_path / "lm").glob("model-*"))) > 2
    again = UnifiedLM.from_pretrained(tmp_path)
    for name, tensor in tiny_lm.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model-00002-of-00004.safetensors").unlink(), "00002.*: the file is mis"),
        (
            lambda f: (f / "model-00002-of-00004.safetensors").write_bytes(b"?" * 99),
            "00002-of-00004.safetensors: damaged safetensors file",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": []}'),
            "index.json: this is no index of weights",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../b.safetensors"}}'
            ),
            "names a file outside its folder: '../b.safetensors'",
        ),
        (
            lambda f: save_file({"part.3": torch.zeros(7)}, f / "model-00002-of-00004.safetensors"),
            "weights do not fit the config, first at 'part.3'",
        ),
    ],
)
def test_damage_is_named(change: object, message: str, tmp_path: Path) -> None:
    save_weights(tmp_path, {}, state(), shard_bytes=1300)
    assert callable(change)
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(Holder(), tmp_path)
    assert "\n" not in str(caught.value)
