"""How predictable are the codes: what a language model would have to learn, per token and second.

- entropy of each level, and mutual information with the neighbour before (along the last axis of
  the grid) and, of higher levels, with the level below: plug-in estimates less what the same
  number of shuffled pairs gives, as plug-in values are far too high for large codebooks;
- an n-gram: codes given the code before and a second neighbour (the level below; of the first level
  the code above, or two before), absolute discounting, interpolated down to uniform (Chen and
  Goodman 1998, section 2.5);
- a small transformer, the library's own decoder, of fixed size, steps and seed.

Both probes learn from every other sample and are measured in bits per code on the rest, so that
their figures are rates that an entropy coder with that model would reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimm.model import ModelConfig, UnifiedLM

_DISCOUNT = 0.75
_CONTEXT, _BATCH, _STEPS, _RATE = 256, 4, 150, 3e-3
_MIN_CODES = 2 * _CONTEXT  # of training; fewer teach a transformer nothing
_MAX_VOCABULARY = 70_000  # of the transformer: its head would take all the time


@dataclass(frozen=True, kw_only=True)
class Predictability:
    """Bits per code, of each level and over all. None: too little data, or too many codes.

    `mutual_before` and `mutual_below` are per level, bits per code.
    """

    entropy: Sequence[float]
    mutual_before: Sequence[float]
    mutual_below: Sequence[float]
    ngram: float | None
    transformer: float | None


def measure_predictability(
    codes: Sequence[Tensor], codebook_size: int, *, seed: int = 0
) -> Predictability:
    """Codes (1, K, *grid) of every sample -> figures; padding (negative) is left out.

    Raises:
        ValueError: there are no codes.
    """
    grids = [_grid(code) for code in codes]
    if not grids:
        raise ValueError("predictability: there are no codes")
    levels = len(grids[0])
    generator = np.random.Generator(np.random.PCG64(seed))
    before, below = [], []
    for level in range(levels):
        pairs = [(g[level][..., :-1].ravel(), g[level][..., 1:].ravel()) for g in grids]
        before.append(_mutual(pairs, codebook_size, generator))
        lower = [(g[level - 1].ravel(), g[level].ravel()) for g in grids] if level else []
        below.append(_mutual(lower, codebook_size, generator) if lower else 0.0)
    train, test = grids[::2], grids[1::2]
    return Predictability(
        entropy=[
            _entropy(np.concatenate([g[level].ravel() for g in grids])) for level in range(levels)
        ],
        mutual_before=before,
        mutual_below=below,
        ngram=_ngram(train, test, codebook_size) if test else None,
        transformer=_transformer(train, test, codebook_size, seed) if test else None,
    )


def _grid(code: Tensor) -> NDArray[np.int64]:
    """(1, K, *grid) -> (K, rows, columns), without padded columns."""
    grid = code[0].numpy().reshape(code.shape[1], -1, code.shape[-1])
    return grid[:, :, (grid >= 0).all(axis=(0, 1))]


def _entropy(values: NDArray[np.int64]) -> float:
    """Bits per value, of the values' own shares."""
    if not values.size:
        return 0.0
    counts = np.unique(values, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _mutual(
    pairs: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    size: int,
    generator: np.random.Generator,
) -> float:
    """Bits that one of a pair tells of the other, less what shuffled pairs seem to tell."""
    first = np.concatenate([a for a, _ in pairs])
    second = np.concatenate([b for _, b in pairs])
    if not first.size:
        return 0.0
    # The entropies of either side are the same in both terms and cancel.
    joint = _entropy(first * size + second)
    shuffled = _entropy(first * size + generator.permutation(second))
    return max(0.0, shuffled - joint)


def _contexts(grid: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], ...]:
    """Of every code: itself, the code before, the second neighbour; `size` where there is none.

    Levels do not share statistics: the level is part of every context.
    """
    before = np.full_like(grid, size)
    before[..., 1:] = grid[..., :-1]
    second = np.full_like(grid, size)
    second[1:] = grid[:-1]
    if grid.shape[1] > 1:
        second[0, 1:] = grid[0, :-1]
    else:
        second[0, :, 2:] = grid[0, :, :-2]
    level = np.broadcast_to(np.arange(len(grid))[:, None, None], grid.shape)
    return tuple(part.ravel() for part in (grid, level, before, second))


def _ngram(
    train: Sequence[NDArray[np.int64]], test: Sequence[NDArray[np.int64]], size: int
) -> float | None:
    """Bits per code of `test`."""
    seen = [
        np.concatenate(parts) for parts in zip(*(_contexts(g, size) for g in train), strict=True)
    ]
    new = [np.concatenate(parts) for parts in zip(*(_contexts(g, size) for g in test), strict=True)]
    if not seen[0].size or not new[0].size:
        return None
    base = size + 1
    probability = np.full(len(new[0]), 1 / size)
    context, wanted = np.zeros_like(seen[0]), np.zeros_like(new[0])
    for part in (1, 2, 3):  # level; and the code before; and the second neighbour
        context, wanted = context * base + seen[part], wanted * base + new[part]
        if part == 3:  # level, two codes and the code itself may pass 63 bits: number what is seen
            context, wanted = _numbered(context, wanted)
        probability = _discounted(context, seen[0], wanted, new[0], probability, base)
    return float(-np.log2(probability).mean())


def _numbered(
    seen: NDArray[np.int64], new: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Small numbers for contexts: equal ones alike."""
    numbers = np.unique(np.concatenate([seen, new]), return_inverse=True)[1]
    return numbers[: len(seen)], numbers[len(seen) :]


def _discounted(
    context: NDArray[np.int64],
    code: NDArray[np.int64],
    wanted: NDArray[np.int64],
    new: NDArray[np.int64],
    below: NDArray[np.float64],
    base: int,
) -> NDArray[np.float64]:
    """Probability of each `new` code after `wanted`, given the one of the shorter context."""
    pairs, pair_counts = np.unique(context * base + code, return_counts=True)
    contexts, totals = np.unique(context, return_counts=True)
    kinds = np.unique(pairs // base, return_counts=True)[1]  # different codes after each context
    count = _looked_up(pairs, pair_counts, wanted * base + new)
    total = _looked_up(contexts, totals, wanted)
    different = _looked_up(contexts, kinds, wanted)
    known = np.maximum(total, 1)
    mixed = np.maximum(count - _DISCOUNT, 0) / known + _DISCOUNT * different / known * below
    return np.where(total > 0, mixed, below)


def _looked_up(
    keys: NDArray[np.int64], values: NDArray[np.int64], wanted: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The value of each key, 0 for keys that are not there."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def _transformer(
    train: Sequence[NDArray[np.int64]], test: Sequence[NDArray[np.int64]], size: int, seed: int
) -> float | None:
    """Bits per code of `test`, under a decoder of two layers trained for fixed steps."""
    levels = len(train[0])
    streams = [
        np.concatenate([_interleaved(grid, size) for grid in part] or [np.zeros(0, np.int64)])
        for part in (train, test)
    ]
    vocabulary = levels * size
    enough = len(streams[0]) >= _MIN_CODES and len(streams[1]) > _CONTEXT
    if not enough or vocabulary > _MAX_VOCABULARY:
        return None
    learn, held = (torch.from_numpy(stream) for stream in streams)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ModelConfig(
            vocab_size=vocabulary, d_model=64, num_layers=2, num_heads=4, d_ff=192, dropout=0.1
        )
        model = UnifiedLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), _RATE, weight_decay=0.1)
        for step in range(_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = _RATE * min(1, step / 20) * (1 - step / _STEPS)
            starts = torch.randint(len(learn) - _CONTEXT, (_BATCH,)).tolist()
            rows = torch.stack([learn[start : start + _CONTEXT + 1] for start in starts])
            loss = _nats(model, rows, size).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return _held_out(model.eval(), held, size)


@torch.no_grad()
def _held_out(model: UnifiedLM, held: Tensor, size: int) -> float:
    """Bits per code over windows that lie side by side, at most 64 of them, spread evenly."""
    count = (len(held) - 1) // _CONTEXT
    chosen = np.linspace(0, count - 1, min(count, 64)).round().astype(int).tolist()
    rows = torch.stack([held[i * _CONTEXT : (i + 1) * _CONTEXT + 1] for i in chosen])
    parts = [_nats(model, part, size).flatten() for part in rows.split(_BATCH)]
    return float(torch.cat(parts).double().mean()) / log(2)


def _nats(model: UnifiedLM, rows: Tensor, size: int) -> Tensor:
    """Negative log-likelihood (B, T) of rows (B, T + 1), among the codes of each one's level."""
    logits = model(rows[:, :-1]).float()
    targets = rows[:, 1:]
    if logits.shape[-1] == size:
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    start = targets // size * size
    allowed = start[..., None] + torch.arange(size)
    narrowed = logits.gather(-1, allowed).transpose(1, 2)
    return torch.nn.functional.cross_entropy(narrowed, targets - start, reduction="none")


def _interleaved(grid: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """(K, rows, columns) -> all levels of one place after another, each with ids of its own."""
    shifted = grid + size * np.arange(len(grid))[:, None, None]
    return shifted.reshape(len(grid), -1).T.ravel()
