"""Input noise changes codes within their level, and nothing else."""

from __future__ import annotations

import pytest
import torch

from unimm.training.noise import CodeNoise
from unimm.vocabulary import Vocabulary


def vocabulary() -> Vocabulary:
    return Vocabulary(text_size=40, codecs={"image": [50], "audio": [16, 16]})


def all_ids(rows: int) -> torch.Tensor:
    return torch.arange(len(vocabulary())).expand(rows, -1)


def test_noise_stays_within_the_level_and_leaves_words_and_markers() -> None:
    torch.manual_seed(0)
    noise, ids = CodeNoise(vocabulary(), 0.3).train(), all_ids(400)
    noisy = noise(ids)
    for block in vocabulary():
        part = noisy[:, block.start : block.end]
        assert part.min() >= block.start
        assert part.max() < block.end
        changed = bool((part != ids[:, block.start : block.end]).any())
        assert changed == (block.name in {"image.0", "audio.0", "audio.1"})


def test_the_share_is_the_mean_and_varies_by_row() -> None:
    torch.manual_seed(0)
    noise, ids = CodeNoise(vocabulary(), 0.2).train(), all_ids(2000)
    block = vocabulary()["image.0"]
    changed = (noise(ids) != ids)[:, block.start : block.end].float().mean(1)
    # One in 50 replaced codes is its own replacement.
    assert changed.mean() == pytest.approx(0.2 * 49 / 50, abs=0.01)
    assert changed.min() < 0.05
    assert changed.max() > 0.3


def test_no_noise_outside_training_and_the_same_noise_from_the_same_state() -> None:
    noise, ids = CodeNoise(vocabulary(), 0.2), all_ids(3)
    torch.manual_seed(5)
    first = noise.train()(ids)
    torch.manual_seed(5)
    assert torch.equal(first, noise(ids))
    assert torch.equal(noise.eval()(ids), ids)
    assert torch.equal(CodeNoise(vocabulary(), 0.0).train()(ids), ids)


@pytest.mark.parametrize("share", [-0.1, 0.6])
def test_a_share_out_of_range_is_an_error(share: float) -> None:
    with pytest.raises(ValueError, match="share must be in"):
        CodeNoise(vocabulary(), share)
