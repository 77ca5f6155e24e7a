"""Every string comes back as it was; every id decodes."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unimm.text import HuggingFaceModel, SentencePieceModel, TextModel, text_file
from unimm.tokenizer import UnifiedTokenizer

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


def foreign_pieces(prefix: bool) -> bytes:
    """A SentencePiece model such as Llama 2's: <unk>, <s>, </s>, bytes, BPE, a space before all."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 5),
        model_writer=out,
        vocab_size=300,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        minloglevel=3,
    )
    return out.getvalue()


@pytest.mark.parametrize("prefix", [True, False])
def test_foreign_sentencepiece(prefix: bool) -> None:
    """Its pieces behind <unk>, <s> and </s>; text is cut as it cuts it, and comes back."""
    model = SentencePieceModel(foreign_pieces(prefix))
    source = sentencepiece.SentencePieceProcessor(model_proto=model.model)
    assert model.first == 3
    assert model.size == source.get_piece_size() - 3
    for text in (
        "one two",
        " one  two ",
        "\u4f60 \U0001f600\n",
        "a\u2581b \u2581\u2581c",
        "</s> <s>",
    ):
        ids = model.encode(text)
        assert model.decode(ids) == text
        assert int(ids.min()) >= 0
        if "\u2581" not in text:
            assert (ids + 3).tolist() == source.encode(text)
    assert TextModel.train(LINES, 300).first == 0  # ours begin with <unk>, and no control pieces


def byte_level() -> HuggingFaceModel:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    return HuggingFaceModel(tokenizer.to_str().encode())


BYTE_LEVEL = byte_level()


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_a_hugging_face_model_gives_every_string_back(text: str) -> None:
    model = BYTE_LEVEL
    ids = model.encode(text)
    assert model.decode(ids) == text
    assert ids.dtype == torch.int64
    assert ids.numel() == 0 or int(ids.max()) < model.size


def test_control_pieces_are_never_made_of_text() -> None:
    for text in ("</s>", "a<s>b", "<s></s>"):
        assert not {0, 1} & set(BYTE_LEVEL.encode(text).tolist())
    assert BYTE_LEVEL.decode(torch.tensor([1])) == "</s>"
    with pytest.raises(ValueError, match="surrogates not allowed"):
        BYTE_LEVEL.encode("\ud800")


def test_a_bundle_holds_one_text_model(tmp_path: Path) -> None:
    assert text_file(tmp_path).name == "text.model"
    for model in (TEXT, BYTE_LEVEL, TEXT):
        UnifiedTokenizer(model).save_pretrained(tmp_path)
        assert [p.name for p in sorted(tmp_path.glob("t*"))] == [model.file]
        again = UnifiedTokenizer.from_pretrained(tmp_path).text
        assert type(again) is type(model)
        assert again.model == model.model
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: the text model is damaged"):
        TextModel.load(tmp_path / "tokenizer.json")
