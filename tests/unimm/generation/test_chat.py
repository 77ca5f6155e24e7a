"""Conversations: what was said is what the model sees, turn by turn."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unimm import Audio, Turn, UnifiedLM, UnifiedTokenizer
from unimm.generation import Chat, join, say_together
from unimm.signals import Item
from unimm.tokenizer import modality_of

HOT: dict[str, Any] = {"temperature": 5.0, "seed": 3}
SOUND = Audio(torch.linspace(-1, 1, 40)[None], 800)


@pytest.fixture(params=["frame_tok", "level_tok"])
def tok(request: pytest.FixtureRequest) -> UnifiedTokenizer:
    return request.getfixturevalue(request.param)


def test_four_turns_of_mixed_media(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    chat = Chat(tiny_lm, tok, **HOT)
    lengths = [len(chat.ids)]
    (picture,) = chat.say(["seven"], "image", size=(8, 8))
    assert isinstance(picture, Image.Image)
    (sound,) = chat.say(["say it"], "audio", size=0.05)
    assert isinstance(sound, Audio)
    words = chat.say([SOUND, "up"], "text", max_new_tokens=9)
    assert [modality_of(item) for item in words] == ["text"]
    anything = chat.say([], max_new_tokens=20)
    assert anything
    turns = [item for item in chat.document if isinstance(item, Turn)]
    assert [turn.role for turn in turns] == ["user", "assistant"] * 4
    strict = tok.decode(torch.cat([chat.ids, torch.tensor([tok.grammar.eos])]))
    assert list(map(modality_of, strict)) == list(map(modality_of, chat.document))
    assert len(chat.ids) > lengths[0]


def test_a_turn_ends_where_the_users_begins(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    """Whatever comes, an answer holds no turn and no end; and it holds something."""
    for seed in range(8):
        chat = Chat(tiny_lm, tok, temperature=5.0, seed=seed)
        answer = chat.say(["up"], max_new_tokens=24)
        assert answer
        assert not any(isinstance(item, Turn) for item in answer)
        assert int(chat.ids[-1]) != tok.grammar.eos


def test_streamed_answers_are_the_said_ones(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    said, streamed = Chat(tiny_lm, tok, **HOT), Chat(tiny_lm, tok, **HOT)
    for message in (["up"], ["seven", SOUND]):
        answer = said.say(message, max_new_tokens=24)
        pieces = join(streamed.stream(message, max_new_tokens=24))
        assert torch.equal(said.ids, streamed.ids)
        assert list(map(modality_of, pieces)) == list(map(modality_of, answer))


def test_several_conversations_go_on_together(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    """Histories of their own lengths; each answer is the one that it would have been alone."""
    messages: list[list[list[Item]]] = [[["up"], ["seven", SOUND]], [[SOUND], ["up"]], [[], [""]]]
    alone = [Chat(tiny_lm, tok, temperature=5.0, seed=seed) for seed in (3, 9, 20)]
    together = [Chat(tiny_lm, tok, temperature=5.0, seed=seed) for seed in (3, 9, 20)]
    for turn in range(2):
        said = [own[turn] for own in messages]
        answers = say_together(together, said, max_new_tokens=24)
        for chat, message, other, answer in zip(alone, said, together, answers, strict=True):
            own = chat.say(message, max_new_tokens=24)
            assert list(map(modality_of, own)) == list(map(modality_of, answer))
            assert torch.equal(chat.ids, other.ids)


def test_conversations_that_can_not_go_on_together(
    frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    chats = [Chat(tiny_lm, frame_tok, temperature=heat, seed=0) for heat in (1.0, 2.0)]
    with pytest.raises(ValueError, match="2 conversations need as many messages, got 1"):
        say_together(chats, [["up"]])
    with pytest.raises(ValueError, match="need one model and one sampling"):
        say_together(chats, [["up"], ["up"]])
    assert say_together([], []) == []


def test_seeds_and_history_decide(tok: UnifiedTokenizer, tiny_lm: UnifiedLM) -> None:
    def second(first: str, seed: int = 3) -> np.ndarray:
        chat = Chat(tiny_lm, tok, temperature=5.0, seed=seed)
        chat.say([first], "text", max_new_tokens=4)
        (picture,) = chat.say(["up"], "image", size=(16, 16))
        assert isinstance(picture, Image.Image)
        return np.asarray(picture)

    assert np.array_equal(second("seven"), second("seven"))
    assert not np.array_equal(second("seven"), second("seven", 4))


def test_mistakes_leave_the_conversation_as_it_was(
    frame_tok: UnifiedTokenizer, tiny_lm: UnifiedLM
) -> None:
    chat = Chat(tiny_lm, frame_tok, **HOT)
    chat.say(["up"], "text", max_new_tokens=4)
    before = chat.ids
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"modality": "smell"}, "there is no codec for 'smell'"),
        ({"modality": "image", "size": (4000, 4000)}, "that the context holds"),
        ({"modality": "text", "max_new_tokens": 1}, "needs at least 2"),
    ]
    for options, message in mistakes:
        with pytest.raises(ValueError, match=message):
            chat.say(["up"], **options)
        assert chat.ids is before
    with pytest.raises(ValueError, match="unknown sampling option 'beams'"):
        Chat(tiny_lm, frame_tok, beams=4).say(["up"])
