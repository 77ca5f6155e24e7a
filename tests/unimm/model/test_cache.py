"""The cache stores each row behind its own length and never runs over its end in silence."""

import pytest
import torch

from unimm.model import KVCache, ModelConfig

CONFIG = ModelConfig(vocab_size=8, d_model=24, num_layers=2, num_heads=4, num_kv_heads=2)
HEADS = (CONFIG.kv_heads, CONFIG.head_dim)


def test_rows_grow_at_their_own_pace() -> None:
    cache = KVCache(CONFIG, batch=2, max_length=8)
    prompt = torch.randn(2, 3, *HEADS)
    keys, values = cache.write(1, prompt, -prompt)
    assert keys.shape == values.shape == (2, 3, *HEADS)
    assert torch.equal(keys, prompt)
    assert torch.equal(values, -prompt)
    cache.advance(3, torch.tensor([1, 3]))
    assert cache.lengths.tolist() == [1, 3]
    new = torch.randn(2, 1, *HEADS)
    keys, _ = cache.write(1, new, new)
    assert torch.equal(keys[0, 1], new[0, 0])  # over the padding
    assert torch.equal(keys[1, 3], new[1, 0])
    assert torch.equal(keys[0, 0], prompt[0, 0])
    other, _ = cache.write(0, new, new)
    assert not other[:, 0].any()  # the other layer has what was written there alone
    cache.advance(1)
    assert cache.lengths.tolist() == [2, 4]


def test_its_dtype_is_its_own() -> None:
    cache = KVCache(CONFIG, batch=1, max_length=2, dtype=torch.bfloat16)
    keys, _ = cache.write(0, torch.ones(1, 1, *HEADS), torch.ones(1, 1, *HEADS))
    assert keys.dtype == torch.bfloat16


def test_it_says_when_it_is_full() -> None:
    cache = KVCache(CONFIG, batch=1, max_length=2)
    x = torch.zeros(1, 2, *HEADS)
    cache.write(0, x, x)
    cache.advance(2)
    with pytest.raises(AssertionError, match="too short"):
        cache.write(0, x[:, :1], x[:, :1])


def test_rows_of_another_cache_are_copied() -> None:
    """A prompt that is read once and continued in many rows, of even and uneven lengths."""
    for lengths in ([3, 3], [1, 3]):
        source = KVCache(CONFIG, batch=2, max_length=3)
        written = torch.randn(CONFIG.num_layers, 2, 2, 3, *HEADS)
        for layer, (own_keys, own_values) in enumerate(written):
            source.write(layer, own_keys, own_values)
        source.advance(3, torch.tensor(lengths))
        cache = KVCache(CONFIG, batch=3, max_length=5)
        cache.copy_rows(source, torch.tensor([1, 0, 1]))
        assert cache.lengths.tolist() == [lengths[1], lengths[0], lengths[1]]
        new = torch.randn(3, 1, *HEADS)
        keys, values = cache.write(1, new, new)
        for row, old in enumerate([1, 0, 1]):
            length = lengths[old]
            assert torch.equal(keys[row, :length], written[1, 0, old, :length])
            assert torch.equal(values[row, :length], written[1, 1, old, :length])
            assert torch.equal(keys[row, length], new[row, 0])


def test_a_static_cache_is_always_whole() -> None:
    cache = KVCache(CONFIG, batch=2, max_length=8, static=True)
    place = cache.lengths.data_ptr()
    for count in (3, 1):
        new = torch.randn(2, count, *HEADS)
        keys, _ = cache.write(0, new, new)
        assert keys.shape == (2, 8, *HEADS)
        start = int(cache.lengths[0])
        assert torch.equal(keys[:, start : start + count], new)
        cache.advance(count)
    assert cache.lengths.tolist() == [4, 4]
    assert cache.lengths.data_ptr() == place
    with pytest.raises(AssertionError, match="too short"):
        cache.advance(5)


def test_a_static_cache_compiles_once_for_rows_of_any_length() -> None:
    graphs: list[object] = []

    def counted(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def step(cache: KVCache, new: torch.Tensor) -> torch.Tensor:
        keys, _ = cache.write(0, new, new)
        return keys.sum() + cache.ends(1).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=counted)
    new = torch.randn(2, 1, *HEADS)
    for lengths in ([1, 1], [1, 0]):
        cache = KVCache(CONFIG, batch=2, max_length=4, static=True)
        cache.advance(1, torch.tensor(lengths))
        assert torch.equal(compiled(cache, new), step(cache, new))
    assert len(graphs) == 1


def test_ends_follow_the_rows() -> None:
    cache = KVCache(CONFIG, batch=2, max_length=8)
    assert cache.ends(1).tolist() == [1, 1]
    assert cache.ends(1) is cache.ends(1)
    assert cache.ends(2).tolist() == [2, 2]
    cache.advance(3, torch.tensor([1, 3]))
    assert cache.ends(1).tolist() == [2, 4]
    other = KVCache(CONFIG, batch=2, max_length=8)
    assert other.ends(1).tolist() == [1, 1]
    other.copy_rows(cache, torch.tensor([1, 0]))
    assert other.ends(1).tolist() == [4, 2]
