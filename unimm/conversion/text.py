"""The text block of a converted model: its own tokenizer, without what the grammar writes itself.

A model's `<s>`, `</s>` and picture codes become markers and code blocks. Left among the text pieces
too, each would stand twice, and share its probability with its double. So they are taken out, and
the pieces behind them close up.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unimm.checkpoint import read_json
from unimm.sequence import SIZE_BASE
from unimm.text import HuggingFaceModel, SentencePieceModel, TextModel
from unimm.vocabulary import MARKERS, Vocabulary

TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
_BY_NAME = ("BPE", "WordLevel")  # models whose vocabulary is a mapping from piece to id
_PROBES = (
    "Hello, world!",
    "  two  spaces\n\ttab",
    "na\u00efve \u4f60\u597d \U0001f600",
    "1 + 1 = 2",
)
_log = logging.getLogger("unimm")


class TextBlock(NamedTuple):
    """A text model and, int64 (size,), the id that each of its pieces has in its source."""

    text: TextModel
    source: Tensor


def text_from(folder: Path, moved: Collection[int]) -> TextBlock:
    """A model folder's text model without the pieces `moved`.

    Raises:
        ValueError: there is no tokenizer that can be read.
    """
    if (folder / TOKENIZER).exists():
        block = _renumbered(read_json(folder / TOKENIZER), moved, str(folder / TOKENIZER))
    elif (folder / SENTENCEPIECE).exists():
        text = TextModel.load(folder / SENTENCEPIECE)
        assert isinstance(text, SentencePieceModel)
        block = TextBlock(text, torch.arange(text.size) + text.first)
        if any(text.first <= piece for piece in moved):
            _log.warning("%s: some control pieces stay among the text pieces", folder)
    else:
        raise ValueError(f"{folder}: holds neither {TOKENIZER} nor {SENTENCEPIECE}")
    for probe in _PROBES:
        back = block.text.decode(block.text.encode(probe))
        if back != probe:
            _log.warning("%s: its text model changes text: %r becomes %r", folder, probe, back)
    return block


def _renumbered(data: dict[str, Any], moved: Collection[int], where: str) -> TextBlock:
    model = data["model"]
    if model.get("type") not in _BY_NAME:
        raise ValueError(f"{where}: a {model.get('type')} model can't be taken apart; BPE can")
    pieces: dict[str, int] = model["vocab"]
    added: list[dict[str, Any]] = data.get("added_tokens") or []
    ids = {*pieces.values(), *(token["id"] for token in added)}
    kept = sorted(ids - set(moved))
    new = {old: number for number, old in enumerate(kept)}
    gone = {piece for piece, old in pieces.items() if old not in new}
    model["vocab"] = {piece: new[old] for piece, old in pieces.items() if old in new}
    if model.get("unk_token") in gone:
        model["unk_token"] = None
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, gone)]
    data["added_tokens"] = [
        {**token, "id": new[token["id"]]} for token in added if token["id"] in new
    ]
    data["post_processor"] = None  # it adds <s> and the like, as the grammar does
    text = HuggingFaceModel(json.dumps(data, ensure_ascii=False).encode())
    return TextBlock(text, torch.tensor(kept))


def _touches(merge: str | list[str], gone: set[str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return bool(gone) and not gone.isdisjoint((left, right, left + right))


def foreign_ids(vocabulary: Vocabulary) -> Tensor:
    """The id that each of ours, padding included, has in an exported model: int64 (padded_size,).

    Text pieces come first, as `tokenizers` numbers them, then markers and digits, then the codes.
    """
    text = vocabulary["text"]
    ids = torch.arange(vocabulary.padded_size)
    ids[: text.start] += text.size
    ids[text.start : text.end] -= text.start
    return ids


def names_of(vocabulary: Vocabulary) -> dict[int, str]:
    """Names of the pieces behind the text ones in an exported model, by their id there."""
    ids = foreign_ids(vocabulary).tolist()
    special, digit = vocabulary["special"], vocabulary["digit"]
    names = {}
    for number in range(special.size):
        name = MARKERS[number] if number < len(MARKERS) else f"<spare {number}>"
        names[ids[special.start + number]] = f"<|unimm {name}|>"
    for number in range(SIZE_BASE):
        names[ids[digit.start + number]] = f"<|unimm digit {number}|>"
    for block in vocabulary:
        if "." in block.name:
            for code in range(block.size):
                names[ids[block.start + code]] = f"<|unimm {block.name} {code}|>"
    return names


def tokenizer_to(text: HuggingFaceModel, names: dict[int, str]) -> str:
    """`tokenizer.json` of an exported model: the text's own, and a special piece for each name.

    Raises:
        ValueError: the text model's ids have gaps, so that new pieces would fall into them.
    """
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(text.model.decode())
    ordered = [names[number] for number in sorted(names)]
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ordered]
    )
    if any(tokenizer.token_to_id(name) != number for number, name in names.items()):
        raise ValueError("the text model's ids have gaps: it can't be written with more pieces")
    return tokenizer.to_str()
