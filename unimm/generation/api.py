"""What people call: `generate`, `generate_batch`, `stream`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unimm.generation.engine import require_pair, run
from unimm.generation.grammar import Request
from unimm.generation.sampling import Sampling
from unimm.model import UnifiedLM
from unimm.sequence import MAX_SIZE, Segment
from unimm.signals import Audio, Item, Video
from unimm.tokenizer import UnifiedTokenizer, joined

Size = float | tuple[int, ...]
MAX_NEW_TOKENS = 1024


def generate(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompt: Sequence[Item],
    modality: str | None = None,
    size: Size | None = None,
    num_samples: int = 1,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
    seed: int | None = None,
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
        temperature, top_k, top_p, guidance: None takes the bundle's default for the modality.
        seed: of the first sample, the next ones count on; None draws one at random.

    Returns:
        `num_samples` documents, each the continuation only.

    Raises:
        ValueError: the modality has no codec here, the size does not fit it, guidance is asked for
            an empty prompt, or the model was not made for this tokenizer.
    """
    if num_samples < 0:
        raise ValueError(f"num_samples must be 0 or more, got {num_samples}")
    first = _seed(seed)
    return generate_batch(
        lm,
        tok,
        [prompt] * num_samples,
        modality,
        size=size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance=guidance,
        seeds=[first + number for number in range(num_samples)],
    )


def generate_batch(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompts: Sequence[Sequence[Item]],
    modality: str | None = None,
    *,
    size: Size | None = None,
    max_new_tokens: int | None = None,
    seeds: Sequence[int] | None = None,
    **sampling: Any,
) -> list[list[Item]]:
    """Continue many documents at once; see `generate`.

    Args:
        prompts: B documents.
        seeds: B seeds; None: 0, 1, 2, ... What a row draws does not depend on the others.
        sampling: temperature, top_k, top_p, guidance, for all rows.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
    if not prompts:
        return []
    job = _job(lm, tok, prompts, modality, size, max_new_tokens, sampling)
    written: list[list[int]] = [[] for _ in prompts]
    for step in job.steps(lm, tok, list(seeds)):
        for row, (token, active) in enumerate(
            zip(step.ids.tolist(), step.active.tolist(), strict=True)
        ):
            if active:
                written[row].append(token)
    parsed = [_parse(tok, ids) for ids in written]
    items = iter(tok.decode_segments([segment for segments in parsed for segment in segments]))
    return [[_cut(next(items), size) for _ in segments] for segments in parsed]


def stream(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompt: Sequence[Item],
    modality: str | None = None,
    *,
    size: Size | None = None,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    **sampling: Any,
) -> Iterator[Item]:
    """Continue a document, giving out text pieces as they come and other items as they close.

    Arguments as in `generate`; the pieces joined are what `generate` returns.
    """
    job = _job(lm, tok, [prompt], modality, size, max_new_tokens, sampling)
    text = tok.vocabulary["text"]
    whole = {rule.close for rule in tok.grammar.rules.values()} | set(tok.grammar.turns)
    written: list[int] = []
    said = now = ""  # of the present text: the part that has been given out, and all of it
    for step in job.steps(lm, tok, [_seed(seed)]):
        token = int(step.ids[0])
        written.append(token)
        segments = _parse(tok, written)
        if text.start <= token < text.end:
            now = tok.text.decode(segments[-1].codes)
            if not now.endswith("\ufffd"):  # a character whose last byte is still to come
                yield now[len(said) :]
                said = now
            continue
        if now != said:  # bytes of which no character has come
            yield now[len(said) :]
        said = now = ""
        if token in whole:
            yield _cut(tok.decode_segments(segments[-1:])[0], size)


def _seed(seed: int | None) -> int:
    return int(torch.randint(2**31, ())) if seed is None else seed


def _parse(tok: UnifiedTokenizer, written: list[int]) -> list[Segment]:
    ids = torch.tensor([tok.grammar.bos, *written])
    return tok.grammar.parse(ids, strict=False)


def _cut(item: Item, size: Size | None) -> Item:
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
    count = max(1, round(size * item.sample_rate))
    return Audio(item.samples[:, :count], item.sample_rate)


@dataclass(frozen=True)
class _Job:
    prompts: list[Tensor]
    unconditional: list[Tensor] | None
    request: Request
    sampling: Sampling
    max_new: int

    def steps(self, lm: UnifiedLM, tok: UnifiedTokenizer, seeds: list[int]) -> Iterator[Any]:
        return run(
            lm,
            tok.grammar,
            self.prompts,
            self.request,
            self.sampling,
            self.max_new,
            seeds,
            self.unconditional,
        )


def _job(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    prompts: Sequence[Sequence[Item]],
    modality: str | None,
    size: Size | None,
    max_new_tokens: int | None,
    asked: dict[str, Any],
) -> _Job:
    require_pair(lm, tok.vocabulary)
    ids = _encoded(tok, prompts)
    sampling = _sampling(tok, modality, asked, conditioned=all(len(p) > 1 for p in ids))
    sizes = _code_sizes(tok, modality, size)
    request = _request(tok, lm, modality, sizes, len(ids))
    guide = sampling.guidance != 1.0
    bare = [torch.tensor([tok.grammar.bos])] * len(ids) if guide else None
    if max_new_tokens is None:
        max_new_tokens = MAX_NEW_TOKENS if size is None else _least(tok, modality, sizes)
    least = _least(tok, modality, sizes)
    if max_new_tokens < least:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}; what is asked for needs at least {least}"
        )
    return _Job(ids, bare, request, sampling, max_new_tokens)


def _encoded(tok: UnifiedTokenizer, prompts: Sequence[Sequence[Item]]) -> list[Tensor]:
    """Prompts to ids; items of all prompts are coded together, equal prompts once."""
    unique = {id(prompt): joined(prompt) for prompt in prompts}
    segments = iter(tok.encode_items([item for prompt in unique.values() for item in prompt]))
    ids = {
        key: tok.grammar.encode([next(segments) for _ in prompt], complete=False)
        for key, prompt in unique.items()
    }
    return [ids[id(prompt)] for prompt in prompts]


def _sampling(
    tok: UnifiedTokenizer, modality: str | None, asked: dict[str, Any], *, conditioned: bool
) -> Sampling:
    known = {field.name for field in fields(Sampling)}
    defaults = dict(tok.defaults.get(modality or "any", {}))
    for name in sorted((asked.keys() | defaults.keys()) - known):
        raise ValueError(f"unknown sampling option {name!r}; known are {', '.join(sorted(known))}")
    if not conditioned:
        defaults.pop("guidance", None)
        if asked.get("guidance") not in (None, 1, 1.0):
            raise ValueError("guidance needs a condition: the prompt is empty")
    chosen = {name: value for name, value in asked.items() if value is not None}
    return Sampling(**{**defaults, **chosen})


def _code_sizes(
    tok: UnifiedTokenizer, modality: str | None, size: Size | None
) -> tuple[int, int, int]:
    """A size in pixels, frames or seconds -> (t, h, w) in codes; 0 where the model chooses."""
    if size is None:
        return 0, 0, 0
    if modality not in ("image", "video", "audio"):
        raise ValueError(f"size needs modality 'image', 'video' or 'audio', not {modality!r}")
    tok.grammar.rule(modality)
    codec = tok.codecs[modality]
    if modality == "audio":
        if isinstance(size, tuple) or not 0 < size < math.inf:
            raise ValueError(f"the size of a sound is its length in seconds, got {size!r}")
        assert codec.frame_rate is not None
        sizes = max(1, math.ceil(size * codec.frame_rate)), 0, 0
    else:
        names = ("height", "width") if modality == "image" else ("frames", "height", "width")
        whole = isinstance(size, tuple) and all(isinstance(n, int) and n > 0 for n in size)
        if not isinstance(size, tuple) or not whole or len(size) != len(names):
            raise ValueError(f"the size of {modality} is ({', '.join(names)}), got {size!r}")
        space = codec.downsample[-1]
        height, width = (-(-pixels // space) for pixels in size[-2:])
        frames = 1 if modality == "image" else 1 + -(-(size[0] - 1) // codec.downsample[0])
        sizes = frames, height, width
    if max(sizes) > MAX_SIZE:
        raise ValueError(f"size {size!r} takes {max(sizes)} codes a side: at most {MAX_SIZE} fit")
    return sizes


def _least(tok: UnifiedTokenizer, modality: str | None, sizes: tuple[int, int, int]) -> int:
    """Ids that the smallest answer takes, room for the final `<eos>` included."""
    if modality in (None, "text"):
        return 1 if modality is None else 2
    rule = tok.grammar.rule(modality)
    smallest = (max(1, sizes[0]), max(1, sizes[1]), max(1, sizes[2]))
    return rule.count(smallest) + rule.header + 3


def _request(
    tok: UnifiedTokenizer,
    lm: UnifiedLM,
    modality: str | None,
    sizes: tuple[int, int, int],
    rows: int,
) -> Request:
    grammar = tok.grammar
    between = torch.zeros(lm.config.vocab_size, dtype=torch.bool)
    text = tok.vocabulary["text"]
    if modality in (None, "text"):
        between[text.start : text.end] = True
        between[grammar.eos] = True
    if modality is None:
        between[[rule.open for rule in grammar.rules.values()]] = True
        between[list(grammar.turns)] = True
    elif modality != "text":
        between[grammar.rule(modality).open] = True
    opening = between.clone()
    if modality == "text":  # who asks for words gets at least one piece
        opening[grammar.eos] = False
    device = lm.device
    single = torch.full((rows,), modality not in (None, "text"), device=device)
    forced = torch.tensor(sizes, device=device).expand(rows, 3)
    return Request(
        between.to(device).expand(rows, -1), single, forced, opening.to(device).expand(rows, -1)
    )
