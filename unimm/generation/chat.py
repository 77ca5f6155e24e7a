"""A conversation of mixed media: turns of `<user>` and `<assistant>`, kept as ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from unimm.generation.api import parsed, seeds_of, write
from unimm.generation.engine import Job, Step, require_pair, run
from unimm.generation.requests import TURN, Size, code_sizes, cut, request_of, settings_of, wish
from unimm.generation.streaming import Piece, pieces
from unimm.model import UnifiedLM
from unimm.signals import Document, Item
from unimm.tokenizer import UnifiedTokenizer

_ROLES = ("user", "assistant")


class Chat:
    """A conversation with a model.

    Args:
        lm: the model, in evaluation mode.
        tok: the tokenizer that it was trained with.
        seed: of the first answer, the next ones count on; None draws one.
        sampling: options of `Sampling` for all answers; a value, or modality -> value.

    Attributes:
        ids: int64 (T,), the whole conversation as the model sees it.
        seed: of the next answer.
    """

    def __init__(
        self, lm: UnifiedLM, tok: UnifiedTokenizer, *, seed: int | None = None, **sampling: Any
    ) -> None:
        require_pair(lm, tok.vocabulary)
        self.lm, self.tok, self.sampling = lm, tok, sampling
        (self.seed,) = seeds_of(seed, 1)
        self.ids = torch.tensor([tok.grammar.bos])

    @property
    def document(self) -> list[Item]:
        """The conversation so far, turns included."""
        return self.tok.decode(self.ids, complete=False)

    def say(
        self,
        message: Sequence[Item],
        modality: str | None = None,
        *,
        size: Size | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Item]:
        """Say something and get the answer; both become part of the conversation.

        Args:
            message: a document; may be empty, then the model goes on by itself.
            modality, size, max_new_tokens: see `generate`. None lets the model choose, as many
                items as it likes, until the turn is the user's again.

        Raises:
            ValueError: as for `generate`; the conversation is then as it was.
        """
        (answer,) = say_together(
            [self], [message], modality, size=size, max_new_tokens=max_new_tokens
        )
        return answer

    def stream(
        self,
        message: Sequence[Item],
        modality: str | None = None,
        *,
        size: Size | None = None,
        max_new_tokens: int | None = None,
    ) -> Iterator[Piece]:
        """`say` in pieces; the conversation has grown when the last one has come.

        Args:
            message, modality, size, max_new_tokens: see `say`.
        """
        (asked,), job = _job([self], [message], modality, size, max_new_tokens)
        stops = _stops(self.tok)
        written: list[int] = []

        def answered() -> Iterator[Step]:
            for step in run(self.lm, self.tok.grammar, job):
                written.append(int(step.ids[0]))
                if written[-1] not in stops:
                    yield step

        yield from pieces(self.tok, answered(), size)
        self.keep(asked, written)

    def keep(self, asked: Tensor, written: Sequence[int]) -> list[int]:
        """Go on behind an answer.

        Args:
            asked: int64 (T,), the conversation up to the answer.
            written: the answer's ids, with the marker that ended it or without.

        Returns:
            The answer's ids without that marker.
        """
        stops = _stops(self.tok)
        answer = [token for token in written if token not in stops]
        self.seed += 1
        self.ids = torch.cat([asked, torch.tensor(answer, dtype=torch.int64)])
        return answer


def say_together(
    chats: Sequence[Chat],
    messages: Sequence[Sequence[Item]],
    modality: str | None = None,
    *,
    size: Size | None = None,
    max_new_tokens: int | None = None,
) -> list[Document]:
    """Say something in each of several conversations; the answers are written in one batch.

    Each is what `Chat.say` would have given alone.

    Args:
        chats: conversations with one and the same model, sampled alike.
        messages: a document for each.
        modality, size, max_new_tokens: see `Chat.say`; for all.

    Raises:
        ValueError: the conversations are none, or not alike, or there is another number of
            messages; and as for `Chat.say`.
    """
    if len(messages) != len(chats):
        raise ValueError(f"{len(chats)} conversations need as many messages, got {len(messages)}")
    if not chats:
        return []
    first = chats[0]
    for chat in chats:
        if (chat.lm, chat.tok, chat.sampling) != (first.lm, first.tok, first.sampling):
            raise ValueError("conversations that go on together need one model and one sampling")
    asked, job = _job(chats, messages, modality, size, max_new_tokens)
    written = write(first.lm, first.tok, job)
    answers = [chat.keep(own, ids) for chat, own, ids in zip(chats, asked, written, strict=True)]
    return [
        [cut(item, size) for item in first.tok.decode_segments(parsed(first.tok, answer))]
        for answer in answers
    ]


def _stops(tok: UnifiedTokenizer) -> list[int]:
    return [tok.vocabulary.marker(name) for name in TURN]


def _job(
    chats: Sequence[Chat],
    messages: Sequence[Sequence[Item]],
    modality: str | None,
    size: Size | None,
    max_new_tokens: int | None,
) -> tuple[list[Tensor], Job]:
    """Each conversation up to the answer, and the engine's job of writing them all."""
    tok, device = chats[0].tok, chats[0].lm.device
    user, assistant = (torch.tensor([tok.vocabulary.marker(f"<{role}>")]) for role in _ROLES)
    asked = [
        torch.cat([chat.ids, user, tok.encode(message, complete=False)[1:], assistant])
        for chat, message in zip(chats, messages, strict=True)
    ]
    sizes = code_sizes(tok, modality, size)
    wishes = [wish(tok, len(own), modality, sizes, max_new_tokens, TURN) for own in asked]
    settings = settings_of(tok, chats[0].sampling, device, conditioned=True)
    # Guided away from the item by itself, which is what training's dropped conditions leave.
    bare = torch.tensor([tok.grammar.bos])
    return asked, Job(
        prompts=asked,
        request=request_of(tok.grammar, wishes, device, TURN),
        settings=settings,
        seeds=[chat.seed for chat in chats],
        unconditional=[bare] * len(chats) if settings.guided else None,
    )
