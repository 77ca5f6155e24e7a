"""What the options of a block do: norm order, soft bounds, windows."""

import pytest
import torch
from torch import Tensor

from unimm import ModelConfig, UnifiedLM
from unimm.model import KVCache
from unimm.model.block import BLOCKS

VOCAB = 64


def make(**options: object) -> UnifiedLM:
    shape = {"vocab_size": VOCAB, "d_model": 32, "num_layers": 1, "num_heads": 2, **options}
    return UnifiedLM(ModelConfig(**shape)).eval()  # type: ignore[arg-type]


@torch.no_grad()
def test_swin_order_bounds_what_a_branch_adds() -> None:
    """However large a branch grows, its norm lets one unit per channel through."""
    x = torch.randn(2, 9, 32)
    positions = torch.arange(9).expand(3, 2, 9)
    added: dict[str, Tensor] = {}
    for order in BLOCKS:
        block = make(norm_order=order).blocks[0]
        for branch in ("attention.out.weight", "feed_forward.down.weight"):
            block.get_parameter(branch).mul_(1e4)
        added[order] = block(x, positions, None, None) - x
    assert added["swin"].square().mean().sqrt() < 2.1
    assert added["pre"].square().mean().sqrt() > 10


@torch.no_grad()
def test_capped_logits_stay_in_bounds_and_in_order() -> None:
    torch.manual_seed(0)
    plain, ids = make(), torch.randint(VOCAB, (2, 9))
    torch.manual_seed(0)
    capped = make(logit_cap=0.05)
    one, two = plain(ids), capped(ids)
    assert two.abs().max() <= 0.05 < one.abs().max()
    torch.testing.assert_close(two, 0.05 * torch.tanh(one / 0.05))


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_a_windowed_layer_sees_so_far_and_no_further(*, cached: bool) -> None:
    lm, ids = make(window=4), torch.randint(VOCAB, (1, 16))

    def hidden(ids: Tensor) -> Tensor:
        return lm.hidden(ids, cache=KVCache(lm.config, 1, 16) if cached else None)

    before = hidden(ids)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    moved = (hidden(changed) - before).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_every_so_manieth_layer_sees_all() -> None:
    config = ModelConfig(window=8, full_every=3, num_layers=7)
    assert [config.window_of(layer) for layer in range(7)] == [8, 8, None, 8, 8, None, 8]
    assert ModelConfig().window_of(0) is None


def test_weights_depend_on_the_seed_and_their_names_alone() -> None:
    """So that a model that is made block by block, or in shards, is the same model."""
    torch.manual_seed(3)
    small = make(num_layers=2).state_dict()
    torch.manual_seed(3)
    large = make(num_layers=2, tied_embeddings=False).state_dict()
    assert all(torch.equal(small[name], large[name]) for name in small)
    torch.manual_seed(4)
    assert not torch.equal(make().state_dict()["embedding.weight"], small["embedding.weight"])
    assert not torch.equal(
        small["blocks.0.attention.out.weight"], small["blocks.1.attention.out.weight"]
    )
