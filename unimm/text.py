"""The text model: strings to piece ids and back, by SentencePiece or by Hugging Face `tokenizers`.

A model that is trained here is SentencePiece with byte fallback (Kudo and Richardson, arXiv
1808.06226), without normalisation, dummy prefix or merged whitespace: every string comes back as
it was. A foreign model, which a converted language model brings along, may change what its own
normaliser changes. No text ever becomes a control piece: only the grammar writes markers.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import sentencepiece
import torch
from torch import Tensor

from unimm.checkpoint import replacing

FILES = ("text.model", "tokenizer.json")  # names in a bundle, which has one of them
SPACE = "\u2581"  # SentencePiece writes a space as this character
_SPACE_BYTES = [f"<0x{byte:02X}>" for byte in SPACE.encode()]
_LEAD = "\ue000"  # a character for private use, which no model has a piece for


class TextModel(ABC):
    """Strings <-> local piece ids.

    >>> model = TextModel.train(["one two", "two one"], size=280)
    >>> model.decode(model.encode("two \u2581 \U0001f600"))
    'two \u2581 \U0001f600'

    Attributes:
        file: its name in a bundle.
        model: its content.
    """

    file: ClassVar[str]
    model: bytes

    def __init__(self, model: bytes) -> None:
        self.model = model

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size:,} pieces, {len(self.model):,} bytes)"

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of pieces."""

    @abstractmethod
    def encode(self, text: str) -> Tensor:
        """A string -> int64 (n,).

        Raises:
            ValueError: the string holds half of a surrogate pair, which is no character.
        """

    @abstractmethod
    def decode(self, ids: Tensor) -> str:
        """int64 (n,) -> a string; bytes that are not UTF-8 become U+FFFD."""

    def save(self, path: str | Path) -> None:
        """Write the model's file atomically."""
        with replacing(path) as temporary:
            temporary.write_bytes(self.model)

    @staticmethod
    def load(path: str | Path) -> TextModel:
        """Read a file of `tokenizers` (`.json`) or of SentencePiece (any other name).

        Raises:
            ValueError: the file is missing or damaged; names it.
        """
        kind = HuggingFaceModel if Path(path).suffix == ".json" else SentencePieceModel
        try:
            return kind(Path(path).read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{path}: the file is missing") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @staticmethod
    def train(lines: Iterable[str], size: int = 512) -> SentencePieceModel:
        """Train on lines of text; see `SentencePieceModel.fit`."""
        return SentencePieceModel.fit(lines, size)


class SentencePieceModel(TextModel):
    """A SentencePiece model.

    Args:
        model: its bytes; it must have byte fallback.

    Raises:
        ValueError: the bytes are no such model.
    """

    file = FILES[0]

    def __init__(self, model: bytes) -> None:
        super().__init__(model)
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError("the text model is damaged: SentencePiece can't read it") from None
        self._space = [self._pieces.piece_to_id(piece) for piece in _SPACE_BYTES]
        if any(self._pieces.is_unknown(piece) for piece in self._space):
            raise ValueError("the text model needs byte pieces: train it with byte_fallback")
        # A foreign model may put a space before all that it is given; a lead that is then taken
        # away keeps that space from the later parts of a string.
        prefixed = self._pieces.encode("a", out_type=str)[0].startswith(SPACE)
        self._lead = _LEAD if prefixed else ""
        self._skipped = len(self._pieces.encode(self._lead))
        # <unk>, <s> and </s> stand before all others in a foreign model, and are never text.
        count = self._pieces.get_piece_size()
        first = next(i for i in range(count) if not self._outside(i))
        self.first = first if any(self._pieces.is_control(i) for i in range(first)) else 0

    def _outside(self, piece: int) -> bool:
        return self._pieces.is_control(piece) or self._pieces.is_unknown(piece)

    @classmethod
    def fit(cls, lines: Iterable[str], size: int = 512) -> SentencePieceModel:
        """Train on lines of text.

        Args:
            lines: the text; blank lines are left out.
            size: upper bound of the number of pieces, of which 257 are bytes and unknown.

        Raises:
            ValueError: there is no text, or `size` has no room for its characters.
        """
        sentences = [line for line in lines if line.strip()]
        if not sentences:
            raise ValueError("there is no text to train the text model on")
        out = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=out,
                vocab_size=size,
                hard_vocab_limit=False,
                model_type="unigram",
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                character_coverage=1.0,
                split_by_whitespace=True,
                # Longer lines are dropped without a word; SentencePiece's own limit is 4,192 bytes.
                max_sentence_length=2**30,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=3,
            )
        except RuntimeError as error:
            reason = str(error).rpartition("] ")[2]  # what stands before is SentencePiece's code
            raise ValueError(f"the text model can't be trained: {reason}") from None
        return cls(out.getvalue())

    @property
    def size(self) -> int:
        """Number of pieces; leading control pieces of a foreign model are left out."""
        return self._pieces.get_piece_size() - self.first

    def encode(self, text: str) -> Tensor:
        """See `TextModel.encode`."""
        text.encode()  # SentencePiece's own error would not say what is wrong
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            # The model reads this one character as a space: spell it in bytes instead.
            if number == 0:
                ids += self._pieces.encode(part)
            else:
                ids += self._space
                ids += self._pieces.encode(self._lead + part)[self._skipped :]
        return torch.tensor(ids, dtype=torch.int64) - self.first

    def decode(self, ids: Tensor) -> str:
        """See `TextModel.decode`."""
        return self._pieces.decode((ids + self.first).tolist())


class HuggingFaceModel(TextModel):
    """A model of Hugging Face `tokenizers` (extra `hf`).

    Args:
        model: content of a `tokenizer.json`.

    Raises:
        ValueError: the bytes are no such model.
        ModuleNotFoundError: `tokenizers` is not installed.
    """

    file = FILES[1]

    def __init__(self, model: bytes) -> None:
        super().__init__(model)
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "a text model of Hugging Face needs tokenizers: pip install 'unimm[hf]'"
            ) from None
        try:
            self._tokenizer = Tokenizer.from_str(model.decode())
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"the text model is damaged: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # What a user types is text, even where it spells a control piece such as </s>.
        self._tokenizer.encode_special_tokens = True
        self._size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def size(self) -> int:
        """Number of pieces, those that no id has between others counted in."""
        return self._size

    def encode(self, text: str) -> Tensor:
        """See `TextModel.encode`."""
        text.encode()
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        """See `TextModel.decode`."""
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def text_file(folder: str | Path) -> Path:
    """The text model's file in a bundle; the usual one where there is none."""
    usual, foreign = (Path(folder) / name for name in FILES)
    return foreign if foreign.exists() else usual
