"""The text model: SentencePiece pieces with byte fallback; every string comes back as it was.

Kudo and Richardson, arXiv 1808.06226. No normalisation, no dummy prefix, no merged whitespace.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from unimm.checkpoint import replacing

SPACE = "\u2581"  # SentencePiece writes a space as this character
_SPACE_BYTES = [f"<0x{byte:02X}>" for byte in SPACE.encode()]


class TextModel:
    """Strings <-> local piece ids.

    Args:
        model: bytes of a SentencePiece model with byte fallback.

    Raises:
        ValueError: the bytes are no such model.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError("the text model is damaged: SentencePiece can't read it") from None
        self._space = [self._pieces.piece_to_id(piece) for piece in _SPACE_BYTES]
        if any(self._pieces.is_unknown(piece) for piece in self._space):
            raise ValueError("the text model needs byte pieces: train it with byte_fallback")

    @classmethod
    def train(cls, lines: Iterable[str], size: int = 512) -> TextModel:
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

    @classmethod
    def load(cls, path: str | Path) -> TextModel:
        """Read `text.model`.

        Raises:
            ValueError: the file is missing or damaged; names it.
        """
        try:
            return cls(Path(path).read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{path}: the file is missing") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write `text.model` atomically."""
        with replacing(path) as temporary:
            temporary.write_bytes(self.model)

    @property
    def size(self) -> int:
        """Number of pieces."""
        return self._pieces.get_piece_size()

    def encode(self, text: str) -> Tensor:
        """A string -> int64 (n,).

        Raises:
            ValueError: the string holds half of a surrogate pair, which is no character.
        """
        text.encode()  # SentencePiece's own error would not say what is wrong
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            # The model reads this one character as a space: spell it in bytes instead.
            ids += self._space if number else []
            ids += self._pieces.encode(part)
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        """int64 (n,) -> a string; bytes that are not UTF-8 become U+FFFD."""
        return self._pieces.decode(ids.tolist())
