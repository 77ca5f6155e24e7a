"""The decoder: causal, blind to other documents, the same with a cache and without."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unimm import ModelConfig, UnifiedLM
from unimm.model import ExpertsConfig, KVCache
from unimm_tokenizers.storage import save_model

VOCAB, LENGTH = 64, 24
SHAPES = {
    "plain": ModelConfig(vocab_size=VOCAB, d_model=32, num_layers=2, num_heads=2),
    "grouped": ModelConfig(
        vocab_size=VOCAB, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48
    ),
    "one key head": ModelConfig(
        vocab_size=VOCAB, d_model=24, num_layers=1, num_heads=4, num_kv_heads=1
    ),
    "untied": ModelConfig(
        vocab_size=VOCAB, d_model=32, num_layers=2, num_heads=2, tied_embeddings=False
    ),
    "three bases": ModelConfig(
        vocab_size=VOCAB, d_model=32, num_layers=1, num_heads=2, rope_bases=(1e4, 100.0, 50.0)
    ),
    "swin": ModelConfig(
        vocab_size=VOCAB, d_model=32, num_layers=2, num_heads=2, norm_order="swin", logit_cap=2.0
    ),
    "windowed": ModelConfig(
        vocab_size=VOCAB,
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        window=LENGTH - 2,
        full_every=2,
    ),
    "experts": ModelConfig(
        vocab_size=VOCAB, d_model=32, num_layers=2, num_heads=2, experts=ExpertsConfig(every=2)
    ),
}


@pytest.fixture(params=SHAPES.values(), ids=list(SHAPES))
def lm(request: pytest.FixtureRequest) -> UnifiedLM:
    return UnifiedLM(request.param).eval()


def random_ids(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape)


def random_positions(*shape: int) -> Tensor:
    """As three axes of a picture would have them: not all alike, not in order."""
    return torch.randint(LENGTH, (3, *shape))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_shapes(lm: UnifiedLM) -> None:
    config, head = lm.config, lm.config.head_dim
    ids = random_ids(2, LENGTH)
    assert lm(ids).shape == (2, LENGTH, VOCAB)
    assert lm.hidden(ids).shape == (2, LENGTH, config.d_model)
    assert lm.head_weight.shape == (VOCAB, config.d_model)
    assert (lm.head_weight is lm.embedding.weight) == config.tied_embeddings
    rows = lm.state_dict()["blocks.0.attention.qkv.weight"].shape[0]
    assert rows == (config.num_heads + 2 * config.kv_heads) * head
    assert lm.num_parameters == sum(p.numel() for p in set(lm.parameters()))
    assert lm.device == torch.device("cpu")


@torch.no_grad()
def test_later_ids_change_nothing_before_them(lm: UnifiedLM) -> None:
    ids, positions = random_ids(2, LENGTH), random_positions(2, LENGTH)
    logits = lm(ids, positions)
    for at in (1, LENGTH // 2, LENGTH - 1):
        changed = ids.clone()
        changed[:, at] = (changed[:, at] + 1) % VOCAB
        other = lm(changed, positions)
        close(other[:, :at], logits[:, :at])
        assert (other[:, at:] - logits[:, at:]).abs().amax((1, 2)).min() > 1e-4


@torch.no_grad()
def test_default_positions_are_those_of_text(lm: UnifiedLM) -> None:
    ids = random_ids(2, LENGTH)
    line = torch.arange(LENGTH).expand(3, 2, -1)
    assert torch.equal(lm(ids), lm(ids, line))
    close(lm(ids, line + 7), lm(ids))  # only distances count
    assert (lm(ids, line * 3) - lm(ids)).abs().max() > 1e-4


@torch.no_grad()
def test_every_position_axis_counts(lm: UnifiedLM) -> None:
    ids = random_ids(1, LENGTH)
    line = torch.arange(LENGTH).expand(3, 1, -1)
    for axis in range(3):
        moved = line.clone()
        moved[axis] *= 2
        assert (lm(ids, moved) - lm(ids, line)).abs().max() > 1e-5


@torch.no_grad()
def test_packed_documents_are_alone(lm: UnifiedLM) -> None:
    """Three documents in one row, and one row of padding behind: each as if by itself."""
    lengths = (5, 1, 11)
    documents = [(random_ids(1, n), random_positions(1, n)) for n in lengths]
    padding = LENGTH - sum(lengths)
    ids = torch.cat([*(d[0] for d in documents), random_ids(1, padding)], 1)
    positions = torch.cat(
        [*(d[1] for d in documents), torch.zeros(3, 1, padding, dtype=torch.int64)], 2
    )
    numbers = torch.tensor([*range(len(lengths)), -1])
    segment_ids = numbers.repeat_interleave(torch.tensor([*lengths, padding]))[None]
    logits = lm(ids, positions, segment_ids)
    start = 0
    for (alone, places), length in zip(documents, lengths, strict=True):
        close(logits[:, start : start + length], lm(alone, places))
        start += length
    mixed = lm(ids, positions)
    assert (mixed[:, lengths[0] :] - logits[:, lengths[0] :]).abs().max() > 1e-4


@torch.no_grad()
def test_rows_of_a_batch_are_alone(lm: UnifiedLM) -> None:
    ids, positions = random_ids(3, LENGTH), random_positions(3, LENGTH)
    together = lm(ids, positions)
    for row in range(3):
        close(together[row : row + 1], lm(ids[row : row + 1], positions[:, row : row + 1]))


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [LENGTH], [7, 1, 1, 8, 7]])
def test_cached_equals_uncached(lm: UnifiedLM, chunks: list[int]) -> None:
    ids, positions = random_ids(2, LENGTH), random_positions(2, LENGTH)
    cache, at, parts = KVCache(lm.config, 2, LENGTH), 0, []
    for count in chunks:
        new = slice(at, at + count)
        parts.append(lm.hidden(ids[:, new], positions[:, :, new], cache=cache))
        cache.advance(count)
        at += count
    close(lm.cap(torch.cat(parts, 1) @ lm.head_weight.T), lm(ids, positions))


@torch.no_grad()
def test_cached_positions_go_on_from_each_rows_length(lm: UnifiedLM) -> None:
    """Prompts of different lengths side by side, padded on the right."""
    ids, lengths = random_ids(2, LENGTH), torch.tensor([4, 9])
    cache = KVCache(lm.config, 2, LENGTH)
    lm.hidden(ids[:, :9], cache=cache)
    cache.advance(9, lengths)
    following = torch.stack([ids[row, n : n + 3] for row, n in enumerate(lengths.tolist())])
    hidden = lm.hidden(following, cache=cache)
    for row, length in enumerate(lengths.tolist()):
        whole = lm.hidden(ids[row : row + 1, : length + 3])
        close(hidden[row : row + 1], whole[:, length:])


def test_gradients_reach_every_parameter(lm: UnifiedLM) -> None:
    # Enough ids that every expert is chosen by some.
    lm(random_ids(4, LENGTH), random_positions(4, LENGTH)).square().mean().backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_initial_weights_follow_depth() -> None:
    """Residual outputs start smaller by the square root of twice the depth (GPT-2, section 2.3)."""
    lm = UnifiedLM(ModelConfig(vocab_size=512, d_model=64, num_layers=8, num_heads=4))
    state = lm.state_dict()
    assert float(state["embedding.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(state["blocks.3.attention.qkv.weight"].std()) == pytest.approx(0.02, rel=0.1)
    for name in ("attention.out", "feed_forward.down"):
        assert float(state[f"blocks.3.{name}.weight"].std()) == pytest.approx(0.005, rel=0.1)
    assert torch.equal(state["norm.weight"], torch.ones(64))


def test_save_and_load(lm: UnifiedLM, tmp_path: Path) -> None:
    lm.save_pretrained(tmp_path)
    again = UnifiedLM.from_pretrained(tmp_path)
    assert again.config == lm.config
    assert not again.training
    ids = random_ids(2, LENGTH)
    assert torch.equal(again(ids), lm(ids))


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_loading_is_strict(tmp_path: Path, change: str) -> None:
    lm = UnifiedLM(SHAPES["plain"])
    state = lm.state_dict()
    if change == "missing":
        del state["norm.weight"]
    elif change == "extra":
        state["norm.bias"] = torch.zeros(32)
    else:
        state["norm.weight"] = torch.zeros(31)
    save_model(tmp_path / "lm", dataclasses.asdict(lm.config), state)
    with pytest.raises(ValueError, match=r"weights do not fit the config, first at 'norm\.") as e:
        UnifiedLM.from_pretrained(tmp_path)
    assert "\n" not in str(e.value)


def test_a_bundle_without_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no language model"):
        UnifiedLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no folder 'nowhere'"):
        UnifiedLM.from_pretrained("nowhere")
