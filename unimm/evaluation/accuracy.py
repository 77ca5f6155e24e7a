"""Any-to-any accuracy: what a model writes in a direction, read by a judge and counted.

A direction is a source and a target modality. Every prompt is a document and has one expected
answer; the model's continuation is searched for its first item of the target modality, and the
judge reads it. A continuation without such an item is wrong, and counted by cause. Text is judged
by exact match after `strip`. Shares come with Wilson intervals (`unimm.evaluation.statistics`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from unimm.evaluation.statistics import Share
from unimm.sequence import TURNS
from unimm.signals import Document, Item, Semantic
from unimm.tokenizer import modality_of

RIGHT = "right"
WRONG = "read as another"
UNREADABLE = "cannot be read"
NOTHING = "wrote nothing"


@dataclass(frozen=True, kw_only=True)
class Direction:
    """What is asked of a model: from one modality to another.

    Args:
        source: modality of the prompts, for example "text".
        target: modality of the answers, for example "image".
        via: a modality in between: the model first answers in it, and then continues that answer
            alone; None asks for the target at once.
        name: as the results show it; "text->image" or "audio->text->image" where it is left out.
        guidance: classifier-free guidance for generation; None takes the bundle's own.
        goal: the accuracy that is aimed at, 0 to 1, shown beside the one that is reached.
        options: further arguments for generation, such as temperature or size.
    """

    source: str
    target: str
    via: str | None = None
    name: str = ""
    guidance: float | None = None
    goal: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            steps = [self.source, *([self.via] if self.via else []), self.target]
            object.__setattr__(self, "name", "->".join(steps))
        if self.goal is not None and not 0 <= self.goal <= 1:
            raise ValueError(f"{self.name}: goal must be a share, 0 to 1, got {self.goal}")


Answer: TypeAlias = Hashable
Judge: TypeAlias = Callable[[list[Any]], Sequence[Answer]]
# (prompts, direction, one seed per prompt) -> continuations
Generate: TypeAlias = Callable[[list[Document], Direction, list[int]], Sequence[Document]]


class Example(NamedTuple):
    """One prompt, what was expected, what the model wrote for it and how that was read."""

    prompt: Document
    expected: Answer
    item: Item | None
    answer: Answer
    cause: str

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one."""
        return self.cause == RIGHT


@dataclass(frozen=True, kw_only=True)
class DirectionResult:
    """What was measured in one direction.

    share: right answers of all prompts.
    confusion: expected -> read -> count; what could not be read stands under its cause.
    causes: cause -> count, over all prompts; "right" is one of them.
    examples: evenly spaced prompts, chosen before anything was judged.
    mistakes: the first wrong ones.
    seconds: wall time of generation, without the judge.
    """

    direction: Direction
    share: Share
    confusion: Mapping[str, Mapping[str, int]]
    causes: Mapping[str, int]
    examples: Sequence[Example]
    mistakes: Sequence[Example]
    seconds: float

    @property
    def reached(self) -> bool | None:
        """Whether the accuracy is at least the goal; None without a goal."""
        goal = self.direction.goal
        return None if goal is None else self.share.value >= goal

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, without the media."""
        direction = self.direction
        return {
            "direction": direction.name,
            **self.share.to_dict(),
            "goal": direction.goal,
            "guidance": direction.guidance,
            "options": dict(direction.options),
            "causes": dict(self.causes),
            "confusion": {row: dict(counts) for row, counts in self.confusion.items()},
            "seconds": self.seconds,
        }


def read_text(items: Sequence[str]) -> list[str]:
    """The judge of text: the answer is what stands there, without space around it."""
    return [item.strip() for item in items]


def measure(
    direction: Direction,
    prompts: Sequence[Document],
    expected: Sequence[Answer],
    generate_fn: Generate,
    judge: Judge,
    *,
    batch_size: int = 64,
    seed: int = 0,
    keep: int = 12,
    on_batch: Callable[[int, int], None] | None = None,
) -> DirectionResult:
    """Generate from every prompt, judge what was written, and count.

    Args:
        direction: what is asked; given to `generate_fn` as it is.
        prompts: documents, without what the model shall write.
        expected: the right answer of each prompt, in the judge's terms.
        generate_fn: (prompts, direction, seeds) -> continuations, one per prompt.
        judge: items of the target modality -> answers, None for what can't be read.
        batch_size: prompts given to `generate_fn` at once.
        seed: prompt i gets seed + i, whatever the batch size.
        keep: examples, and mistakes, whose media are kept for a report.
        on_batch: called with (prompts done, prompts in all) after each batch.

    Raises:
        ValueError: there are no prompts, their number and that of the answers differ, or
            generation or judge give another number of results than they were asked for.
    """
    count = len(prompts)
    if not count or count != len(expected):
        raise ValueError(
            f"{direction.name}: {count} prompts and {len(expected)} expected answers; give one "
            f"answer for each of at least one prompt"
        )
    if batch_size < 1:
        raise ValueError(f"{direction.name}: batch_size must be at least 1, got {batch_size}")
    kept = {i * count // min(keep, count) for i in range(min(keep, count))}
    examples: list[Example] = []
    mistakes: list[Example] = []
    causes: Counter[str] = Counter()
    confusion: dict[str, Counter[str]] = {}
    seconds = 0.0
    for start in range(0, count, batch_size):
        rows = range(start, min(start + batch_size, count))
        asked = [prompts[i] for i in rows]
        begun = time.perf_counter()
        written = generate_fn(asked, direction, [seed + i for i in rows])
        seconds += time.perf_counter() - begun
        _require(len(written), len(asked), f"{direction.name}: generation")
        answered = _judge(direction, asked, [expected[i] for i in rows], written, judge)
        for i, example in zip(rows, answered, strict=True):
            causes[example.cause] += 1
            read = example.cause if example.cause not in (RIGHT, WRONG) else label(example.answer)
            confusion.setdefault(label(example.expected), Counter())[read] += 1
            if i in kept:
                examples.append(example)
            if not example.right and len(mistakes) < keep:
                mistakes.append(example)
        if on_batch is not None:
            on_batch(rows.stop, count)
    return DirectionResult(
        direction=direction,
        share=Share(causes[RIGHT], count),
        confusion={row: dict(sorted(confusion[row].items())) for row in sorted(confusion)},
        causes=dict(causes.most_common()),
        examples=tuple(examples),
        mistakes=tuple(mistakes),
        seconds=seconds,
    )


def accuracies(results: Iterable[DirectionResult]) -> dict[str, float]:
    """Direction name -> accuracy, as `results.json` holds it."""
    return {result.direction.name: result.share.value for result in results}


def label(answer: Answer) -> str:
    """An answer as tables show it: a tuple's parts with spaces between, "?" for None."""
    if isinstance(answer, tuple):
        return " ".join(label(part) for part in answer)
    return "?" if answer is None else str(answer)


def _judge(
    direction: Direction,
    prompts: Sequence[Document],
    expected: Sequence[Answer],
    written: Sequence[Document],
    judge: Judge,
) -> list[Example]:
    """Read what was written; the judge sees only what is there."""
    found = [_first(document, direction.target) for document in written]
    shown = [item for item in found if item is not None]
    pictures = [item.image if isinstance(item, Semantic) else item for item in shown]
    answers = list(judge(pictures)) if pictures else []
    _require(len(answers), len(shown), f"{direction.name}: judge")
    reading = iter(answers)
    examples = []
    for prompt, right, item, document in zip(prompts, expected, found, written, strict=True):
        answer = None if item is None else next(reading)
        if item is None:
            cause = _what_instead(document)
        elif _unread(answer):
            cause = UNREADABLE
        else:
            cause = RIGHT if answer == right else WRONG
        examples.append(Example(prompt, right, item, answer, cause))
    return examples


def _first(document: Document, modality: str) -> Item | None:
    return next((item for item in document if modality_of(item) == modality), None)


def _unread(answer: Answer) -> bool:
    return answer is None or (isinstance(answer, tuple) and None in answer)


def _what_instead(document: Document) -> str:
    """The cause where the target modality is missing."""
    kinds = [kind for kind in map(modality_of, document) if kind not in TURNS]
    return f"wrote {kinds[0]}" if kinds else NOTHING


def _require(got: int, asked: int, where: str) -> None:
    if got != asked:
        raise ValueError(f"{where} gave {got} results for {asked}; it must give one for each")
