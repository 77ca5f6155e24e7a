"""A conversation of mixed media: turns of `<user>` and `<assistant>`, kept as ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from unimm.generation.api import parsed, seeds_of
from unimm.generation.engine import Job, Step, require_pair, run
from unimm.generation.requests import TURN, Size, code_sizes, cut, request_of, settings_of, wish
from unimm.generation.streaming import Piece, pieces
from unimm.model import UnifiedLM
from unimm.signals import Item
from unimm.tokenizer import UnifiedTokenizer


class Chat:
    """A conversation with a model.

    Args:
        lm: the model, in evaluation mode.
        tok: the tokenizer that it was trained with.
        seed: of the first answer, the next ones count on; None draws one.
        sampling: options of `Sampling` for all answers; a value, or modality -> value.

    Attributes:
        ids: int64 (T,), the whole conversation as the model sees it.
    """

    def __init__(
        self, lm: UnifiedLM, tok: UnifiedTokenizer, *, seed: int | None = None, **sampling: Any
    ) -> None:
        require_pair(lm, tok.vocabulary)
        self.lm, self.tok, self.sampling = lm, tok, sampling
        (self._seed,) = seeds_of(seed, 1)
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
        asked, job = self._job(message, modality, size, max_new_tokens)
        steps = list(run(self.lm, self.tok.grammar, job))
        written = [int(step.ids[0]) for step in steps]
        self._keep(asked, written)
        items = self.tok.decode_segments(parsed(self.tok, self._answer(written)))
        return [cut(item, size) for item in items]

    def stream(
        self,
        message: Sequence[Item],
        modality: str | None = None,
        *,
        size: Size | None = None,
        max_new_tokens: int | None = None,
    ) -> Iterator[Piece]:
        """Like `say`, in pieces; the conversation has grown when the last one has come."""
        asked, job = self._job(message, modality, size, max_new_tokens)
        written: list[int] = []

        def answered() -> Iterator[Step]:
            for step in run(self.lm, self.tok.grammar, job):
                written.append(int(step.ids[0]))
                if written[-1] not in self._stops:
                    yield step

        yield from pieces(self.tok, answered(), size)
        self._keep(asked, written)

    @property
    def _stops(self) -> list[int]:
        return [self.tok.vocabulary.marker(name) for name in TURN]

    def _job(
        self,
        message: Sequence[Item],
        modality: str | None,
        size: Size | None,
        max_new_tokens: int | None,
    ) -> tuple[Tensor, Job]:
        tok, device = self.tok, self.lm.device
        mark = tok.vocabulary.marker
        asked = torch.cat(
            [
                self.ids,
                torch.tensor([mark("<user>")]),
                tok.encode(message, complete=False)[1:],
                torch.tensor([mark("<assistant>")]),
            ]
        )
        sizes = code_sizes(tok, modality, size)
        entry = wish(tok, len(asked), modality, sizes, max_new_tokens, TURN)
        settings = settings_of(tok, self.sampling, device, conditioned=True)
        # Guided away from an answer to nothing: the turn alone.
        bare = torch.tensor([tok.grammar.bos, mark("<assistant>")])
        return asked, Job(
            prompts=[asked],
            request=request_of(tok.grammar, [entry], device, TURN),
            settings=settings,
            seeds=[self._seed],
            unconditional=[bare] if settings.guided else None,
        )

    def _keep(self, asked: Tensor, written: Sequence[int]) -> None:
        self._seed += 1
        self.ids = torch.cat([asked, torch.tensor(self._answer(written), dtype=torch.int64)])

    def _answer(self, written: Sequence[int]) -> list[int]:
        """The ids of an answer without the marker that ended it."""
        return [token for token in written if token not in self._stops]
