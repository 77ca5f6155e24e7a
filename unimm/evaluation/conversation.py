"""Judged conversations: four turns of mixed media on the dial-pad world, right or wrong as a whole.

Each turn names only what is new ("say it", "now nine"), so that an answer is right only if the
model took the rest from what was said before. The judges of any-to-any accuracy read the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from unimm.checkpoint import find_bundle
from unimm.data.dialpad_talk import Turns, make_turns
from unimm.evaluation.accuracy import Answer, Judge
from unimm.evaluation.report import write_results
from unimm.evaluation.statistics import Share
from unimm.evaluation.worlds import PROMPT_SEED, judges
from unimm.generation import Chat, say_together
from unimm.model import UnifiedLM
from unimm.signals import Document
from unimm.tokenizer import UnifiedTokenizer, modality_of

JUDGES_FOLDER = "judges"


class Conversations(NamedTuple):
    """whole: conversations of which every turn was right. turns: right answers to each turn."""

    whole: Share
    turns: list[Share]

    def __str__(self) -> str:
        turns = ", ".join(f"{share.value:.1%}" for share in self.turns)
        return f"right as a whole: {self.whole}; by turn: {turns}"


def converse(
    model: str | Path, out: str | Path, *, runs: int = 100, seed: int = 0
) -> Conversations:
    """Hold conversations with a bundle, judge them and write `results.json`.

    Args:
        model: bundle: shipped name, folder, or Hub repository id.
        out: folder of the results, and of judges where the bundle brings none.
        runs: conversations.
        seed: of the first conversation's answers, the next ones count on.

    Raises:
        ValueError: `runs` is below 1, or the bundle can't be read.
    """
    if runs < 1:
        raise ValueError(f"converse: runs must be at least 1, got {runs}")
    lm, tok = UnifiedLM.from_pretrained(model), UnifiedTokenizer.from_pretrained(model)
    shipped = find_bundle(model) / JUDGES_FOLDER
    judged = judges("dialpad", None, shipped if shipped.is_dir() else Path(out, JUDGES_FOLDER))
    talks = [make_turns(PROMPT_SEED, index, "image") for index in range(runs)]
    answers = talk(lm, tok, talks, seed)
    found = judge_conversations(talks, answers, judged.judges)
    write_results(
        Path(out, "results.json"),
        model=str(model),
        seed=seed,
        whole=found.whole.to_dict(),
        turns=[share.to_dict() for share in found.turns],
        judges=judged.accuracy,
    )
    return found


def talk(
    lm: UnifiedLM, tok: UnifiedTokenizer, talks: Sequence[Turns], seed: int
) -> list[list[Document]]:
    """The model's answers to the turns of each conversation; it chooses what to answer with."""
    chats = [Chat(lm, tok, seed=seed + 4 * number) for number in range(len(talks))]
    turns = [say_together(chats, [[turns.asked[number]] for turns in talks]) for number in range(4)]
    return [list(answers) for answers in zip(*turns, strict=True)]


def judge_conversations(
    talks: Sequence[Turns], answers: Sequence[Sequence[Document]], readers: dict[str, Judge]
) -> Conversations:
    """Count what is right: the asked modality, alone, showing what was asked for."""
    right = [
        [_right(turns, turn, own[turn], readers) for turn in range(4)]
        for turns, own in zip(talks, answers, strict=True)
    ]
    count = len(right)
    return Conversations(
        Share(sum(map(all, right)), count),
        [Share(sum(row[turn] for row in right), count) for turn in range(4)],
    )


def _right(turns: Turns, turn: int, answer: Document, readers: dict[str, Judge]) -> bool:
    if len(answer) != 1 or modality_of(answer[0]) != turns.targets[turn]:
        return False
    read: Answer = readers[turns.targets[turn]]([answer[0]])[0]
    return read == turns.answers[turn]
