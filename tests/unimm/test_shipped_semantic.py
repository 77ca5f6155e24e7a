"""The shipped semantic codec: what its card says of regions and lengths holds."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unimm import Semantic, UnifiedTokenizer, load_codec
from unimm.data.composed import best_overlap, composed_scene
from unimm_tokenizers.semantic import SeTokCodec


@pytest.fixture(scope="module")
def codec() -> SeTokCodec:
    made = load_codec("semantic")
    assert isinstance(made, SeTokCodec)
    return made


def scenes(count: int) -> tuple[Tensor, list[np.ndarray]]:
    """Pictures (count, 3, 32, 32) of one digit each, and the digits' masks."""
    rng = np.random.default_rng(0)
    made = [composed_scene(rng) for _ in range(count)]
    x = torch.from_numpy(np.stack([scene.picture for scene in made]))
    return x.movedim(-1, 1).float() / 127.5 - 1, [scene.masks[0] for scene in made]


def test_regions_fit_the_digits(codec: SeTokCodec) -> None:
    x, masks = scenes(24)
    found = codec.explain(x).numpy()
    overlap = [best_overlap(region, mask) for region, mask in zip(found, masks, strict=True)]
    assert np.mean(overlap) >= 0.7


def test_the_number_of_codes_follows_the_picture(codec: SeTokCodec) -> None:
    x, _ = scenes(12)
    plain = torch.full((1, 3, 32, 32), 0.4)
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    counts = [float((codec.encode(y) >= 0).sum((1, 2)).float().mean()) for y in (plain, x, noise)]
    assert counts[0] == 1 < counts[1] < counts[2]


def test_a_batch_changes_no_code(codec: SeTokCodec) -> None:
    x, _ = scenes(6)
    together = codec.encode(x)
    assert torch.equal(torch.cat([codec.encode(one[None]) for one in x]), together)


def test_documents_hold_semantic_pictures() -> None:
    tok = UnifiedTokenizer.from_pretrained("semantic")
    x, _ = scenes(1)
    picture = Image.fromarray(((x[0].movedim(0, -1) + 1) * 127.5).round().byte().numpy())
    ids = tok.encode(["frog", Semantic(picture)])
    text, item = tok.decode(ids)
    assert text == "frog"
    assert isinstance(item, Semantic)
    assert item.image.size == (32, 32)
    assert len(ids) < 40
