# pyright: strict
# torch's own types are partly unknown, and what users give is checked whatever its annotation says.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnnecessaryIsInstance=false

"""What people call: `generate`, `generate_batch`, `infill`, `extend`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from unimm.generation.engine import Job, require_pair, run
from unimm.generation.requests import (
    Size,
    code_sizes,
    cut,
    partial_ids,
    request_of,
    settings_of,
    wish,
)
from unimm.model import UnifiedLM
from unimm.sequence import Segment
from unimm.signals import Audio, Item, Video
from unimm.tokenizer import UnifiedTokenizer, joined, modality_of

Number = TypeVar("Number", int, float)
PerModality = Number | Mapping[str, Number] | None
_ROUNDING = 1e-6  # of a length in seconds, against its whole number of samples


def generate(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompt: Sequence[Item],
    modality: str | None = None,
    size: Size | None = None,
    num_samples: int = 1,
    max_new_tokens: int | None = None,
    temperature: PerModality[float] = None,
    top_k: PerModality[int] = None,
    top_p: PerModality[float] = None,
    guidance: PerModality[float] = None,
    seed: int | Sequence[int] | None = None,
    *,
    min_p: PerModality[float] = None,
    repetition_penalty: PerModality[float] = None,
    unconditional: Sequence[Item] | None = None,
) -> list[list[Item]]:
    """Continue a document.

    Args:
        lm: the model.
        tok: the tokenizer that it was trained with.
        prompt: a document; may be empty.
        modality: "text", "image", "audio", "video", "semantic": the next item is of this kind and
            generation ends with it. None: the model chooses and goes on until it ends.
        size: (height, width) in pixels, seconds, or (frames, height, width); None: the model
            chooses. Needs a modality. Codes come whole; what they hold beyond the size is cut off.
        num_samples: how many continuations.
        max_new_tokens: most ids to write; None: what the size needs, else 1,024.
        temperature, top_k, top_p, min_p, repetition_penalty, guidance: see `Sampling`; a value, or
            modality -> value. None takes the bundle's default for the modality.
        seed: of the first sample, the next ones count on; or one for each. None: draws one.
        unconditional: what guidance compares with: the prompt without the part that the answer
            shall follow; None: nothing at all.

    Returns:
        `num_samples` documents, each the continuation only.

    Raises:
        ValueError: the modality has no codec here, the size does not fit it, prompt and answer do
            not fit the context, guidance is asked for an empty prompt, or the model was not made
            for this tokenizer.
    """
    return generate_batch(
        lm,
        tok,
        [prompt] * num_samples,
        modality,
        size=size,
        max_new_tokens=max_new_tokens,
        seeds=seeds_of(seed, num_samples),
        unconditional=None if unconditional is None else [unconditional] * num_samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        guidance=guidance,
    )


def generate_batch(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompts: Sequence[Sequence[Item]],
    modality: str | Sequence[str | None] | None = None,
    *,
    size: Size | list[Size | None] | None = None,
    max_new_tokens: int | None = None,
    seeds: Sequence[int] | None = None,
    unconditional: Sequence[Sequence[Item]] | None = None,
    **sampling: Any,
) -> list[list[Item]]:
    """Continue many documents at once; see `generate`.

    Args:
        lm, tok: see `generate`.
        prompts: B documents.
        modality: of all rows, or B of them.
        size: of all rows, or a list of B.
        max_new_tokens: see `generate`; for each row.
        seeds: B seeds; None: 0, 1, 2, ... What a row draws does not depend on the others.
        unconditional: B documents, or None.
        sampling: options of `Sampling`, for all rows; a value, or modality -> value.

    Returns:
        B documents, each the continuation only.

    Raises:
        ValueError: as for `generate`, or a list has not B members.
    """
    count = len(prompts)
    seeds = list(range(count)) if seeds is None else list(seeds)
    modalities = [modality] * count if isinstance(modality, str | None) else list(modality)
    sizes = list(size) if isinstance(size, list) else [size] * count
    named = {"seeds": seeds, "modality": modalities, "size": sizes, "unconditional": unconditional}
    for name, values in named.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{name}: {count} prompts need as many, got {len(values)}")
    if not prompts:
        return []
    job = make_job(
        lm, tok, prompts, modalities, sizes, max_new_tokens, seeds, unconditional, sampling
    )
    return _documents(tok, write(lm, tok, job), sizes)


def infill(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompt: Sequence[Item],
    item: Item,
    rewrite: tuple[float, float],
    *,
    num_samples: int = 1,
    seed: int | Sequence[int] | None = None,
    **sampling: Any,
) -> list[list[Item]]:
    """Write a stretch of a picture, sound or film anew and keep the rest.

    The kept part is what the codec makes of it. The model sees what stands before the stretch in
    the sequence; what follows stays as it is but can't be looked ahead to.

    Args:
        lm, tok, num_samples, seed, sampling: see `generate`.
        prompt: what stands before the item.
        item: a picture, an `Audio` or a `Video`.
        rewrite: (first, end) of the stretch: rows of pixels, seconds, or frames. Codes are written
            whole, so that a little more may change.

    Returns:
        `num_samples` documents of one item each, of the given item's size.

    Raises:
        ValueError: the item has no such stretch, and as for `generate`.
    """
    kind, codes = _coded(tok, item)
    unit = tok.codecs[kind].downsample
    at = torch.arange(codes.shape[1])  # rows of a picture, frames of a sound or film
    if isinstance(item, Audio):
        rate = tok.codecs[kind].sample_rate
        assert rate is not None
        length, size = item.seconds, item.seconds
        begins, ends = at * unit[0] / rate, (at + 1) * unit[0] / rate
    elif isinstance(item, Video):
        length, size = len(item.frames), tuple(item.frames.shape[:3])
        # Frame 0 has a code frame of its own; the others share theirs.
        begins, ends = 1 + (at - 1) * unit[0], 1 + at * unit[0]
    else:
        assert isinstance(item, Image.Image)
        length, size = item.height, (item.height, item.width)
        begins, ends = at * unit[-2], (at + 1) * unit[-2]
    first, end = rewrite
    if not 0 <= first < end <= length * (1 + _ROUNDING):
        raise ValueError(f"rewrite: expected 0 <= first < end <= {length:g}, got {rewrite}")
    slack = _ROUNDING * length  # seconds are no whole number of samples
    free = (ends > first + slack) & (begins < end - slack)
    seeds = seeds_of(seed, num_samples)
    return _write_partial(lm, tok, prompt, kind, codes, free, size, seeds, sampling)


def extend(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompt: Sequence[Item],
    item: Item,
    size: float,
    *,
    num_samples: int = 1,
    seed: int | Sequence[int] | None = None,
    **sampling: Any,
) -> list[list[Item]]:
    """Continue a sound or a film where it ends.

    Args:
        lm, tok, num_samples, seed, sampling: see `generate`.
        prompt: what stands before the item.
        item: an `Audio` or a `Video`; the codes that it fills are kept, its last, half filled one
            is written anew.
        size: of the result: seconds, or frames.

    Returns:
        `num_samples` documents of one item each: the beginning as the codec makes it, and more.

    Raises:
        ValueError: the item is no sound or film, or longer than `size`, and as for `generate`.
    """
    kind, codes = _coded(tok, item)
    codec = tok.codecs[kind]
    if isinstance(item, Audio):
        assert codec.frame_rate is not None
        length, whole = item.seconds, int(item.seconds * codec.frame_rate + _ROUNDING)
        target: Size = size
    elif isinstance(item, Video):
        length, whole = len(item.frames), 1 + (len(item.frames) - 1) // codec.downsample[0]
        target = (int(size), *item.frames.shape[1:3])
    else:
        raise ValueError(f"extend: a sound or a film can go on, {kind} can't; see infill")
    if not size > length:
        raise ValueError(f"extend: the {kind} has {length:g} already; ask for more than {size:g}")
    total = code_sizes(tok, kind, target)[0]
    longer = codes.new_zeros(codes.shape[0], total, *codes.shape[2:])
    longer[:, :whole] = codes[:, :whole]
    free = torch.arange(total) >= whole
    seeds = seeds_of(seed, num_samples)
    return _write_partial(lm, tok, prompt, kind, longer, free, target, seeds, sampling)


def _coded(tok: UnifiedTokenizer, item: Item) -> tuple[str, Tensor]:
    """Modality and codes (K, *grid) of a picture, sound or film."""
    kind = modality_of(item)
    if kind not in ("image", "audio", "video"):
        raise ValueError(f"a picture, sound or film has a stretch to write, {kind} has none")
    (segment,) = tok.segments([item])
    return kind, segment.codes


def _write_partial(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompt: Sequence[Item],
    kind: str,
    codes: Tensor,
    free: Tensor,
    size: Size,
    seeds: list[int],
    sampling: Mapping[str, Any],
) -> list[list[Item]]:
    """Items of which codes (K, n, ...) are kept where `free`, bool (n,), is not set."""
    require_pair(lm, tok.vocabulary)
    if not seeds:
        return []
    ids = tok.encode(prompt, complete=False)
    rule = tok.grammar.rule(kind)
    t, h, w = (1,) * (4 - codes.ndim) + tuple(codes.shape[1:])
    sizes = (t, h, w) if rule.order == "raster" else (codes.shape[1], 0, 0)
    entry = wish(tok, len(ids), kind, sizes, None)
    places = free.view(-1, *(1,) * (codes.ndim - 2)).expand(codes.shape[1:])
    counted = (t, h, w) if rule.order == "raster" else (codes.shape[1], 1, 1)
    given = partial_ids(tok.grammar, rule, codes, places, counted)
    settings = settings_of(tok, sampling, lm.device, conditioned=len(ids) > 1)
    rows = len(seeds)
    job = Job(
        prompts=[ids] * rows,
        request=request_of(tok.grammar, [entry] * rows, lm.device),
        settings=settings,
        seeds=seeds,
        unconditional=[ids[:1]] * rows if settings.guided else None,
        given=given.expand(rows, -1),
    )
    return _documents(tok, write(lm, tok, job), [size] * rows)


# What the public functions share


def seeds_of(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed per sample.

    Raises:
        ValueError: the count is negative, or there is another number of seeds.
    """
    if count < 0:
        raise ValueError(f"num_samples must be 0 or more, got {count}")
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    if isinstance(seed, int):
        return [seed + number for number in range(count)]
    if len(seed) != count:
        raise ValueError(f"seed: {count} samples need as many seeds, got {len(seed)}")
    return list(seed)


def make_job(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompts: Sequence[Sequence[Item]],
    modalities: Sequence[str | None],
    sizes: Sequence[Size | None],
    max_new_tokens: int | None,
    seeds: Sequence[int],
    unconditional: Sequence[Sequence[Item]] | None,
    sampling: Mapping[str, Any],
) -> Job:
    """The engine's job for documents; see `generate_batch`."""
    require_pair(lm, tok.vocabulary)
    ids = encoded(tok, prompts)
    wishes = [
        wish(tok, len(own), modality, code_sizes(tok, modality, size), max_new_tokens)
        for own, modality, size in zip(ids, modalities, sizes, strict=True)
    ]
    conditioned = unconditional is not None or all(len(own) > 1 for own in ids)
    settings = settings_of(tok, sampling, lm.device, conditioned=conditioned)
    return Job(
        prompts=ids,
        request=request_of(tok.grammar, wishes, lm.device),
        settings=settings,
        seeds=seeds,
        unconditional=without(tok, ids, unconditional) if settings.guided else None,
    )


def without(
    tok: UnifiedTokenizer, ids: Sequence[Tensor], unconditional: Sequence[Sequence[Item]] | None
) -> Sequence[Tensor]:
    """The prompts that guidance compares with."""
    if unconditional is not None:
        return encoded(tok, unconditional)
    return [torch.tensor([tok.grammar.bos])] * len(ids)


def encoded(tok: UnifiedTokenizer, prompts: Sequence[Sequence[Item]]) -> list[Tensor]:
    """Prompts to ids; items of all prompts are coded together, one and the same prompt once."""
    unique = {id(prompt): joined(prompt) for prompt in prompts}
    segments = iter(tok.encode_items([item for prompt in unique.values() for item in prompt]))
    ids = {
        key: tok.grammar.encode([next(segments) for _ in prompt], complete=False)
        for key, prompt in unique.items()
    }
    return [ids[id(prompt)] for prompt in prompts]


def write(lm: UnifiedLM, tok: UnifiedTokenizer, job: Job) -> list[list[int]]:
    """Run a job to its end: the ids of every answer."""
    steps = list(run(lm, tok.grammar, job))
    ids = torch.stack([step.ids for step in steps], 1).tolist()
    counts = torch.stack([step.active for step in steps], 1).sum(1).tolist()
    return [row[:count] for row, count in zip(ids, counts, strict=True)]


def parsed(tok: UnifiedTokenizer, written: Sequence[int]) -> list[Segment]:
    """What an answer's ids hold."""
    return tok.grammar.parse(torch.tensor([tok.grammar.bos, *written]), strict=False)


def _documents(
    tok: UnifiedTokenizer, written: Sequence[Sequence[int]], sizes: Sequence[Size | None]
) -> list[list[Item]]:
    """Answers to documents; items of all of them are decoded together."""
    rows = [parsed(tok, ids) for ids in written]
    items = iter(tok.decode_segments([segment for segments in rows for segment in segments]))
    return [
        [cut(next(items), size) for _ in segments]
        for segments, size in zip(rows, sizes, strict=True)
    ]
