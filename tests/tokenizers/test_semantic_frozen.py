"""SeTok on a frozen network: its hash, its place outside the weights, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from unimm_tokenizers import Codec
from unimm_tokenizers.semantic import FrozenSeTokCodec, FrozenSeTokConfig, register_backbone
from unimm_tokenizers.semantic.frozen import weights_sha256
from unimm_tokenizers.storage import read_json

NAME = "test-edges"


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6), nn.ReLU())


def config(backbone: str = NAME) -> FrozenSeTokConfig:
    return FrozenSeTokConfig(
        backbone=backbone, dim=16, num_heads=2, codebook_size=32, codebook_dim=4
    )


def test_codes_come_back_and_the_network_stays_outside(tmp_path: Path) -> None:
    register_backbone(NAME, network)
    torch.manual_seed(1)
    codec = FrozenSeTokCodec(config()).eval()
    x = 2 * torch.rand(5, 3, 32, 32) - 1
    codes = codec.encode(x)
    assert torch.equal(torch.cat([codec.encode(one[None]) for one in x]), codes)
    codec.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["backbone_sha256"] == weights_sha256(network())
    assert not any("network" in name for name in codec.state_dict())
    assert torch.equal(Codec.from_pretrained(tmp_path).encode(x), codes)
    register_backbone(NAME, lambda: network(seed=3))
    with pytest.raises(ValueError, match=r"'test-edges' has weights .*, the codec was made with"):
        Codec.from_pretrained(tmp_path)


def test_training_leaves_the_network_alone() -> None:
    own = network()
    before = weights_sha256(own)
    codec = FrozenSeTokCodec(config(), own).train()
    output = codec(2 * torch.rand(4, 3, 32, 32) - 1)
    (output.reconstruction.square().mean() + output.loss).backward()
    assert weights_sha256(own) == before
    assert all(parameter.grad is None for parameter in own.parameters())
    assert all(parameter.grad is not None for parameter in codec.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [("nobody", "backbone 'nobody' is unknown; known are "), ("timm:", "is unknown")],
)
def test_unknown_networks_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenSeTokCodec(config(backbone=name))


def test_a_network_without_a_feature_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must give features \(B, D, h, w\), it gave \(1, 3072\)"):
        FrozenSeTokCodec(config(), nn.Flatten())
