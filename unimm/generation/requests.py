"""From what people ask for to what the engine is asked: modalities, sizes, budgets, sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from unimm.checkpoint import did_you_mean
from unimm.generation.engine import FREE
from unimm.generation.grammar import TAIL, Request
from unimm.generation.sampling import Sampling, Settings
from unimm.sequence import MAX_SIZE, Grammar, Rule
from unimm.signals import Audio, Item, Video
from unimm.tokenizer import UnifiedTokenizer
from unimm.vocabulary import SPECIAL_SIZE

Size = float | tuple[int, ...]
MAX_NEW_TOKENS = 1024
CONTEXT = 32_768  # most ids of prompt and answer, unless the bundle's defaults name a "context"
ANSWER = ("<eos>",)
TURN = ("<eos>", "<user>")  # what ends an answer in a conversation


class Wish(NamedTuple):
    """What one row shall write: modality, (t, h, w) in codes (0: free), most ids."""

    modality: str | None
    sizes: tuple[int, int, int]
    budget: int


def wish(
    tok: UnifiedTokenizer,
    prompt: int,
    modality: str | None,
    sizes: tuple[int, int, int],
    max_new_tokens: int | None,
    stops: Sequence[str] = ANSWER,
) -> Wish:
    """One row's wish, checked against what the tokenizer can write and the context can hold.

    Args:
        tok: the tokenizer.
        prompt: ids that the prompt takes.
        modality, max_new_tokens: see `generate`.
        sizes: see `code_sizes`.
        stops: markers that end the row.

    Raises:
        ValueError: the modality has no codec here, or there is no room.
    """
    least = least_ids(tok.grammar, modality, sizes, stops)
    wanted = max_new_tokens
    if wanted is None:
        wanted = least if any(sizes) else max(least, MAX_NEW_TOKENS)
    if wanted < least:
        raise ValueError(f"max_new_tokens is {wanted}; what is asked for needs at least {least}")
    context = int(tok.defaults.get("any", {}).get("context", CONTEXT))
    room = context - prompt
    needed = wanted if max_new_tokens is not None else least
    if needed > room:
        raise ValueError(
            f"the prompt takes {prompt} ids and what is asked for {needed}: {needed - room} more "
            f"than the {context} that the context holds"
        )
    return Wish(modality, sizes, min(wanted, room))


def code_sizes(
    tok: UnifiedTokenizer, modality: str | None, size: Size | None
) -> tuple[int, int, int]:
    """A size in pixels, frames or seconds -> (t, h, w) in codes; 0 where the model chooses.

    Raises:
        ValueError: the modality has no size, or this is none for it.
    """
    fixed = None if modality is None or modality == "text" else tok.grammar.rule(modality).fixed
    if size is None:
        return fixed or (0, 0, 0)
    if modality not in ("image", "video", "audio"):
        raise ValueError(f"size needs modality 'image', 'video' or 'audio', not {modality!r}")
    tok.grammar.rule(modality)
    codec = tok.codecs[modality]
    if modality == "audio":
        if isinstance(size, tuple) or not 0 < size < math.inf:
            raise ValueError(f"the size of a sound is its length in seconds, got {size!r}")
        assert codec.frame_rate is not None
        # A product such as 0.07 * 100 lies a little above the whole number that it is.
        sizes = max(1, math.ceil(size * codec.frame_rate - 1e-6)), 0, 0
    else:
        names = ("height", "width") if modality == "image" else ("frames", "height", "width")
        whole = isinstance(size, tuple) and all(isinstance(n, int) and n > 0 for n in size)
        if not isinstance(size, tuple) or not whole or len(size) != len(names):
            raise ValueError(f"the size of {modality} is ({', '.join(names)}), got {size!r}")
        space = codec.downsample[-1]
        height, width = (-(-pixels // space) for pixels in size[-2:])
        frames = 1 if modality == "image" else 1 + -(-(size[0] - 1) // codec.downsample[0])
        sizes = frames, height, width
        if fixed is not None and sizes != fixed:
            raise ValueError(f"size {size!r}: this model writes {fixed} (t, h, w) codes, no others")
    if max(sizes) > MAX_SIZE:
        raise ValueError(f"size {size!r} takes {max(sizes)} codes a side: at most {MAX_SIZE} fit")
    return sizes


def least_ids(
    grammar: Grammar, modality: str | None, sizes: tuple[int, int, int], stops: Sequence[str]
) -> int:
    """Ids that the smallest answer takes, room for the final stop included."""
    if modality is None:
        return 1 if stops == ANSWER else 2
    if modality == "text":
        return 2
    rule = grammar.rule(modality)
    smallest = (max(1, sizes[0]), max(1, sizes[1]), max(1, sizes[2]))
    return rule.count(smallest) + rule.header + 2 + TAIL


def request_of(
    grammar: Grammar, wishes: Sequence[Wish], device: torch.device, stops: Sequence[str] = ANSWER
) -> Request:
    """The engine's request for rows of wishes."""
    vocabulary = grammar.vocabulary
    ends = torch.zeros(SPECIAL_SIZE, dtype=torch.bool)
    ends[[vocabulary.marker(name) for name in stops]] = True
    opens = torch.zeros_like(ends)
    opens[[rule.open for rule in grammar.rules.values()]] = True
    turns = torch.zeros_like(ends)
    turns[list(grammar.turns)] = True
    anything = ends | opens if bool((ends & turns).any()) else ends | opens | turns
    kinds: dict[str | None, Tensor] = {None: anything, "text": ends}
    for name, rule in grammar.rules.items():
        kinds[name] = torch.zeros_like(ends)
        kinds[name][rule.open] = True
    open_ended = len(stops) > 1  # who is spoken to answers something
    modalities = [entry.modality for entry in wishes]
    return Request(
        text=torch.tensor([m in (None, "text") for m in modalities], device=device),
        markers=torch.stack([kinds[m] for m in modalities]).to(device),
        nonempty=torch.tensor([m == "text" or open_ended for m in modalities], device=device),
        single=torch.tensor([m not in (None, "text") for m in modalities], device=device),
        sizes=torch.tensor([entry.sizes for entry in wishes], device=device),
        budget=torch.tensor([entry.budget for entry in wishes], device=device),
        stops=ends.to(device),
    )


def settings_of(
    tok: UnifiedTokenizer, asked: Mapping[str, Any], device: torch.device, *, conditioned: bool
) -> Settings:
    """Sampling of every modality: what is asked for, else the bundle's default for it.

    Args:
        tok: its `defaults` hold modality -> options; "any" holds for those without their own.
        asked: options; a value, or modality -> value.
        device: where rows are drawn.
        conditioned: every prompt has something in it to be guided by.

    Raises:
        ValueError: an option is unknown or out of range, or guidance has nothing to be guided by.
    """
    known = {field.name for field in fields(Sampling)}
    names = ("text", *tok.grammar.rules)
    for name, value in asked.items():
        _require_option(name, known)
        if isinstance(value, Mapping):
            for modality in value:
                if modality not in names:
                    raise ValueError(
                        f"{name}: there is no modality {modality!r} here; they are "
                        f"{', '.join(names)}"
                    )
        values = value.values() if isinstance(value, Mapping) else [value]
        if name == "guidance" and not conditioned and any(v not in (None, 1) for v in values):
            raise ValueError("guidance needs a condition: the prompt is empty")
    table = {}
    for modality in names:
        chosen = {**tok.defaults.get("any", {}), **tok.defaults.get(modality, {})}
        chosen.pop("context", None)
        for name in chosen:
            _require_option(name, known)
        if not conditioned:
            chosen.pop("guidance", None)
        for name, value in asked.items():
            own = value.get(modality) if isinstance(value, Mapping) else value
            if own is not None:
                chosen[name] = own
        table[modality] = Sampling(**chosen)
    return Settings.of(table, list(tok.grammar.rules), device)


def _require_option(name: str, known: set[str]) -> None:
    if name not in known:
        listed = sorted(known)
        raise ValueError(
            f"unknown sampling option {name!r}{did_you_mean(name, listed)}; known are "
            f"{', '.join(listed)}"
        )


def partial_ids(
    grammar: Grammar, rule: Rule, codes: Tensor, free: Tensor, sizes: tuple[int, int, int]
) -> Tensor:
    """The ids of an item of which some codes are still to be written, up to its last code.

    Args:
        grammar: the grammar.
        rule: the item's rule.
        codes: int64 (K, *grid), anything where they are free.
        free: bool (*grid), places that the model writes, all levels of them.
        sizes: (t, h, w) in codes that the item will have.

    Returns:
        int64 (n,), FREE where the model writes.
    """
    header = [rule.open]
    for axis, length in zip("thw", sizes, strict=True):
        header += grammar.size_ids(length) if axis in rule.written else []
    every = free.expand(codes.shape)
    flags = (every if rule.order == "level" else every.movedim(0, -1)).reshape(-1)
    ids = rule.flatten(torch.where(every, 0, codes)).masked_fill(flags, FREE)
    return torch.cat([torch.tensor(header), ids])


def cut(item: Item, size: Size | None) -> Item:
    """An item without what its codes hold beyond the size that was asked for."""
    if size is None:
        return item
    if isinstance(size, tuple):
        if isinstance(item, Video):
            frames, height, width = size
            return Video(item.frames[:frames, :height, :width], item.fps)
        assert isinstance(item, Image.Image)
        return item.crop((0, 0, size[1], size[0]))
    assert isinstance(item, Audio)
    return Audio(item.samples[:, : sample_count(size, item.sample_rate)], item.sample_rate)


def sample_count(seconds: float, sample_rate: int) -> int:
    """Samples of a sound of that length, one at least."""
    return max(1, round(seconds * sample_rate))
