"""Judged conversations: what is asked, what counts as right, and the whole command."""

import json
from pathlib import Path
from typing import Any

import pytest

from unimm import Audio, Turn, UnifiedTokenizer
from unimm.data.dialpad import DIRECTIONS, WORDS
from unimm.data.dialpad_talk import Turns, make_turns, write_conversations
from unimm.data.media import LongFile
from unimm.data.shards import ShardReader
from unimm.data.templates import Template, make_document
from unimm.evaluation.conversation import converse, judge_conversations
from unimm.evaluation.goertzel import ToneJudge
from unimm.signals import Document
from unimm.tokenizer import modality_of


def perfect(turns: Turns) -> list[Document]:
    return [[item] for item in turns.shown]


def test_turns_hang_together() -> None:
    for index in range(20):
        turns = make_turns(1, index, "image")
        digit, same, other, (filmed, direction) = turns.answers
        assert digit == same != other == filmed
        assert direction in DIRECTIONS
        assert turns.asked[:2] == (f"show me {WORDS[digit]}", "say it")
        assert turns.asked[2:] == (f"now {WORDS[other]}", f"move it {direction}")
        assert turns.targets == ("image", "audio", "audio", "video")
        assert tuple(map(modality_of, turns.shown)) == turns.targets
        sounds = [item for item in turns.shown if isinstance(item, Audio)]
        assert ToneJudge()(sounds) == [digit, other]
    assert make_turns(1, 4).asked == make_turns(1, 4).asked
    assert len({make_turns(1, index).asked for index in range(20)}) > 10


def test_now_asks_for_what_was_asked_last() -> None:
    turns = make_turns(1, 0, "audio")
    assert turns.asked[0].startswith("say ")
    assert turns.asked[1] == "show it"
    assert turns.targets == ("audio", "image", "image", "video")
    drawn = [make_turns(1, index).targets[0] for index in range(60)]
    assert 25 <= drawn.count("image") <= 55  # 40 are expected; one standard deviation is 3.7


def test_an_answer_is_right_or_not() -> None:
    """Judges that read everything right; then a wrong kind, a wrong digit, and two items."""
    talks = [make_turns(3, index, "image") for index in range(4)]
    tones = ToneJudge()

    def readers(kind: str) -> Any:
        def read(items: list[Any]) -> list[Any]:
            for turns in talks:
                for item, answer in zip(turns.shown, turns.answers, strict=True):
                    if modality_of(item) == kind and items[0] is item:
                        return [answer]
            return [None]

        return read

    judges = {"image": readers("image"), "audio": tones, "video": readers("video")}
    answers = [perfect(turns) for turns in talks]
    found = judge_conversations(talks, answers, judges)
    assert found.whole.value == 1
    assert "right as a whole: " in str(found)
    answers[0][0] = ["seven"]
    answers[1][2] = [talks[1].shown[1]]
    answers[2][3] = [*answers[2][3], "and more"]
    found = judge_conversations(talks, answers, judges)
    assert found.whole.value == 1 / 4
    assert [share.value for share in found.turns] == [3 / 4, 1, 3 / 4, 3 / 4]


def test_conversations_are_training_documents(tmp_path: Path, tokenizer_bundle: Path) -> None:
    (shard,) = write_conversations(tmp_path, 3, seed=3)
    tok = UnifiedTokenizer.from_pretrained(tokenizer_bundle)
    template = Template(["{document}"])
    for index, sample in enumerate(ShardReader(shard).samples):
        assert json.loads(sample["document.json"])
        made = make_document(sample, template)
        document = [item for item in made if not isinstance(item, LongFile)]
        turns = make_turns(3, index)
        roles = [("user", "text", "assistant", target) for target in turns.targets]
        assert [modality_of(item) for item in document] == [kind for role in roles for kind in role]
        assert tuple(document[1::4]) == turns.asked
        assert isinstance(document[0], Turn)
        assert tok.encode(document).ndim == 1


def test_no_conversation_at_all(tmp_path: Path, model_bundle: Path) -> None:
    with pytest.raises(ValueError, match="runs must be at least 1, got 0"):
        converse(model_bundle, tmp_path, runs=0)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """The shipped bundle holds conversations; of 100, 96 were right as a whole."""
    found = converse("dialpad", tmp_path, runs=20)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["whole"]["total"] == found.whole.total == 20
    assert len(results["turns"]) == 4
    assert found.whole.successes >= 16
