"""Every string comes back as it was; every id decodes."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unimm.text import TextModel

LINES = ["seven eight nine", "up and down", "naïve café"] * 3
TEXT = TextModel.train(LINES, size=300)


@given(st.text())
@example("")
@example(" ")
@example("  two  spaces  ")
@example("\u2581 and \u2581\u2581")
@example("<0xE2><unk></s>")
@example("\ufffd \u2047 \x00 \r\n\t\ufeff")
@example("a\u0301 \u00e1 \u3000 \U0001f600")
@settings(max_examples=100)
def test_every_string_round_trips(string: str) -> None:
    ids = TEXT.encode(string)
    assert ids.dtype == torch.int64
    assert ids.ndim == 1
    assert TEXT.decode(ids) == string


@given(st.lists(st.integers(0, TEXT.size - 1), max_size=20))
def test_every_id_decodes_and_what_is_said_stays_said(ids: list[int]) -> None:
    """`stream` relies on it: a prefix that ends in a whole character is never revised."""
    said = ""
    for count in range(1, len(ids) + 1):
        now = TEXT.decode(torch.tensor(ids[:count]))
        assert now.startswith(said)
        said = said if now.endswith("\ufffd") else now


def test_trained_words_are_short() -> None:
    assert len(TEXT.encode("seven eight nine")) < len("seven eight nine")
    assert len(TEXT.encode("\U0001f600")) == 4  # bytes
    assert TEXT.size <= 300


def test_training_is_deterministic() -> None:
    assert TextModel.train(LINES, size=300).model == TEXT.model


def test_long_lines_count() -> None:
    """SentencePiece drops lines of more than 4,192 bytes unless told otherwise."""
    model = TextModel.train(["short", "\u0436" + " long" * 2000], size=300)
    assert len(model.encode("\u0436")) == 1  # a character that was not seen takes two bytes


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "bundle" / "text.model"
    TEXT.save(path)
    again = TextModel.load(path)
    assert again.size == TEXT.size
    assert torch.equal(again.encode("seven up"), TEXT.encode("seven up"))
    assert [p.name for p in path.parent.iterdir()] == ["text.model"]


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "text.model"
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: the file is missing"):
        TextModel.load(path)
    path.write_bytes(TEXT.model[: len(TEXT.model) // 2])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: the text model is damaged"):
        TextModel.load(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextModel.train([]), "there is no text to train the text model on"),
        (lambda: TextModel.train(["", " \n"]), "there is no text"),
        (lambda: TextModel.train(["abc"], size=257), "can't be trained: Vocabulary size is small"),
        (lambda: TEXT.encode("half a pair: \ud83d"), "surrogates not allowed"),
    ],
)
def test_bad_text_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
