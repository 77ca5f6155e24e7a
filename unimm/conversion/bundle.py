"""Hugging Face folder <-> bundle: which row of embedding and head becomes which.

A converted model computes what its source computes: logits differ by at most 1e-5 in float32, of
text, and of pictures where it has some. Rows that its source did not have (markers, size digits,
new codecs) begin as the mean of its text rows, which bounds how far they move the distribution of
the old ones (Hewitt, "Initializing new word embeddings for pretrained language models", 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unimm.checkpoint import (
    Card,
    adopt,
    find_bundle,
    save_weights,
    seal,
    write_json,
    write_text,
)
from unimm.conversion.chameleon import (
    BEGIN,
    END,
    SPECIAL_NAMES,
    TURN,
    code_name,
    codec_from,
    codec_to,
    grid_of,
    pieces_of,
)
from unimm.conversion.decoder import (
    config_from,
    config_to,
    kind_of,
    rows_from,
    rows_to,
    weights_from,
    weights_to,
)
from unimm.conversion.folder import CONFIG, GENERATION, HuggingFaceFolder
from unimm.conversion.text import TOKENIZER, foreign_ids, names_of, text_from, tokenizer_to
from unimm.model import UnifiedLM
from unimm.text import HuggingFaceModel
from unimm.tokenizer import UnifiedTokenizer
from unimm.vocabulary import Vocabulary
from unimm_tokenizers.codec import Codec
from unimm_tokenizers.vision import VQGANCodec

SPECIAL = {"<bos>": "bos_token_id", "<eos>": "eos_token_id", "<pad>": "pad_token_id"}
CONTEXT = 4096  # ids, where a config does not say
OURS = "unimm"  # folder of the tokenizer bundle beside what `transformers` reads


class Converted(NamedTuple):
    """A model that can be used, saved and trained like any other."""

    tokenizer: UnifiedTokenizer
    lm: UnifiedLM


class Places(NamedTuple):
    """Which of the source's rows each of our ids takes; both int64 (n,). `text`: rows of text."""

    ours: Tensor
    theirs: Tensor
    text: Tensor

    def grown(self, rows: Tensor, size: int) -> Tensor:
        """The source's rows (n, D) -> ours (size, D)."""
        mean = rows[self.text].float().mean(0).to(rows.dtype)
        grown = mean.expand(size, -1).clone()
        grown[self.ours] = rows[self.theirs]
        return grown


def convert(
    source: str | Path,
    out: str | Path,
    codecs: Sequence[Codec] = (),
    vqgan: str | Path | None = None,
) -> Path:
    """Hugging Face folder -> bundle, or bundle -> Hugging Face folder, by what the source is.

    Args:
        source: a folder, a shipped bundle's name, or a Hub id.
        out: the folder to write.
        codecs: blocks to grow a text model by; see `from_hugging_face`.
        vqgan: see `from_hugging_face`.

    Returns:
        `out`.

    Raises:
        ValueError: the source can't be converted; says why.
    """
    found, out = find_bundle(source), Path(out)
    if out.resolve() == found.resolve():
        raise ValueError(f"{out}: is the source itself: name another folder to write")
    if not (found / CONFIG).exists():
        tokenizer, lm = (
            UnifiedTokenizer.from_pretrained(found),
            UnifiedLM.from_pretrained(found, dtype=None),
        )
        to_hugging_face(tokenizer, lm, out)
        return out
    made = from_hugging_face(found, codecs, vqgan)
    made.tokenizer.save_pretrained(out)
    made.lm.save_pretrained(out)
    name = str(source)
    Card(
        title=f"{Path(name).name}, converted",
        summary="Converted with `unimm convert`: the same numbers, in one vocabulary with its "
        "codecs. New rows of embedding and head are untrained.",
        base_model=name if name.count("/") == 1 and not Path(name).exists() else None,
        data="that of the model that it was converted from, and of its codecs",
        facts={
            "decoder": f"{made.lm.num_parameters:,} parameters",
            "vocabulary": f"{len(made.tokenizer.vocabulary):,} ids, "
            f"{made.tokenizer.vocabulary.fingerprint[:12]}",
            **{modality: codec.name for modality, codec in made.tokenizer.codecs.items()},
        },
    ).write(out)
    seal(out)
    return out


def from_hugging_face(
    source: str | Path, codecs: Sequence[Codec] = (), vqgan: str | Path | None = None
) -> Converted:
    """A Hugging Face folder -> tokenizer and language model, in the stored dtype.

    Args:
        source: a folder with `config.json`, safetensors and a tokenizer: Llama 2 and 3, SmolLM,
            Mistral, Qwen 2 and 3, Chameleon, or what `to_hugging_face` wrote.
        codecs: blocks to grow a text model by.
        vqgan: Chameleon's picture tokenizer with its decoder, where the folder has none.

    Raises:
        ValueError: a part is missing or has no counterpart; names it.
    """
    folder = HuggingFaceFolder(source)
    kind = folder.config["model_type"]
    if (folder.path / OURS).is_dir():
        tokenizer, places = _returned(folder)
    elif kind == "chameleon":
        tokenizer, places = _chameleon(folder, vqgan)
    else:
        tokenizer, places = _text_model(folder, codecs)
    config = config_from(folder, tokenizer.vocabulary.padded_size)
    last = int(places.theirs.max())
    if last >= folder.config["vocab_size"]:
        raise ValueError(
            f"{folder.path}: the tokenizer has id {last}, the model {folder.config['vocab_size']} "
            "rows: they do not belong together"
        )

    def rows(tensor: Tensor) -> Tensor:
        return places.grown(tensor, config.vocab_size)

    state = {**rows_from(folder, config, rows), **weights_from(folder, config)}
    if kind != "chameleon" and (left := next(folder.left(), None)) is not None:
        raise ValueError(f"{folder.path}: the weights hold {left!r}, which has no counterpart here")
    with torch.device("meta"):
        lm = UnifiedLM(config)
    adopt(lm, state, str(folder.path))
    return Converted(tokenizer, lm.eval())


def _text_model(
    folder: HuggingFaceFolder, codecs: Sequence[Codec]
) -> tuple[UnifiedTokenizer, Places]:
    return _tokenizer(folder, _special(folder), codecs)


def _chameleon(
    folder: HuggingFaceFolder, vqgan: str | Path | None
) -> tuple[UnifiedTokenizer, Places]:
    pieces = pieces_of(folder)
    markers = {**_special(folder), **pieces.markers}
    codec = codec_from(folder, vqgan)
    if len(pieces.codes) != codec.codebook_size:
        raise ValueError(
            f"{folder.path}: vocabulary_map names {len(pieces.codes)} codes, the VQ-GAN has "
            f"{codec.codebook_size}"
        )
    return _tokenizer(folder, markers, [codec], pieces.codes, {"image": grid_of(folder)})


def _special(folder: HuggingFaceFolder) -> dict[str, int]:
    found = {marker: folder.special(key) for marker, key in SPECIAL.items()}
    known = {marker: number for marker, number in found.items() if number is not None}
    if "<eos>" in known:  # Qwen begins a document with what ends one
        known.setdefault("<bos>", known["<eos>"])
    return known


def _tokenizer(
    folder: HuggingFaceFolder,
    markers: Mapping[str, int],
    codecs: Sequence[Codec],
    codes: Tensor | None = None,
    grids: Mapping[str, list[int]] | None = None,
) -> tuple[UnifiedTokenizer, Places]:
    moved = {*markers.values(), *([] if codes is None else codes.tolist())}
    text, source = text_from(folder.path, moved)
    context = int(folder.config.get("max_position_embeddings", CONTEXT))
    defaults = {"any": {"context": context}}
    tokenizer = UnifiedTokenizer(text, codecs, grids=grids, defaults=defaults)
    vocabulary = tokenizer.vocabulary
    ours = [vocabulary["text"].start + torch.arange(text.size)]
    ours += [torch.tensor([vocabulary.marker(name) for name in markers], dtype=torch.int64)]
    theirs = [source, torch.tensor(list(markers.values()), dtype=torch.int64)]
    if codes is not None:
        ours.append(vocabulary["image.0"].start + torch.arange(len(codes)))
        theirs.append(codes)
    return tokenizer, Places(torch.cat(ours), torch.cat(theirs), source)


def _returned(folder: HuggingFaceFolder) -> tuple[UnifiedTokenizer, Places]:
    """What `to_hugging_face` wrote: the vocabulary says where everything stands."""
    tokenizer = UnifiedTokenizer.from_pretrained(folder.path / OURS)
    theirs = foreign_ids(tokenizer.vocabulary)
    text = torch.arange(tokenizer.text.size)
    return tokenizer, Places(torch.arange(len(theirs)), theirs, text)


def to_hugging_face(tokenizer: UnifiedTokenizer, lm: UnifiedLM, out: str | Path) -> None:
    """Write a folder that `transformers` loads; text pieces come first in its vocabulary.

    The tokenizer's own bundle goes along in the folder `unimm`, which `transformers` does not read,
    so that `from_hugging_face` gives back the same model. A SentencePiece text model stays there:
    `transformers` then has no tokenizer for the folder.

    Raises:
        ValueError: the model has a part that Hugging Face's model families have not; names it.
    """
    out, vocabulary, config = Path(out), tokenizer.vocabulary, lm.config
    kind = kind_of(config)
    ids = foreign_ids(vocabulary)
    names = names_of(vocabulary)
    context = int(tokenizer.defaults.get("any", {}).get("context", CONTEXT))
    made = config_to(config, context)
    state: dict[str, Tensor] = {}
    if kind == "chameleon":
        names |= _chameleon_names(vocabulary, ids)
        vq_config, state = _vq(tokenizer)
        made |= {"vq_config": vq_config, "vocabulary_map": _map(names, vocabulary)}
    made |= {key: int(ids[vocabulary.marker(name)]) for name, key in SPECIAL.items()}
    made["dtype"] = str(lm.embedding.weight.dtype).removeprefix("torch.")

    def rows(tensor: Tensor) -> Tensor:
        moved = torch.empty_like(tensor)
        moved[ids] = tensor
        return moved

    stored = lm.state_dict()
    state |= {**rows_to(stored, config, rows), **weights_to(stored, config)}
    tokenizer.save_pretrained(out / OURS)
    seal(out / OURS)
    save_weights(out, made, state)
    if isinstance(tokenizer.text, HuggingFaceModel):
        write_text(out / TOKENIZER, tokenizer_to(tokenizer.text, names))
        write_json(out / "tokenizer_config.json", _tokenizer_config(names, ids, vocabulary))
    write_json(out / GENERATION, {key: made[key] for key in SPECIAL.values()})


def _chameleon_names(vocabulary: Vocabulary, ids: Tensor) -> dict[int, str]:
    """Chameleon's own names of what it has."""
    block = vocabulary["image.0"]
    names = {int(ids[block.start + code]): code_name(code) for code in range(block.size)}
    for marker, name in {
        **SPECIAL_NAMES,
        "<image>": BEGIN,
        "</image>": END,
        "<user>": TURN,
    }.items():
        names[int(ids[vocabulary.marker(marker)])] = name
    return names


def _map(names: Mapping[int, str], vocabulary: Vocabulary) -> dict[str, int]:
    """`vocabulary_map`; `<image>` is the placeholder that `transformers` puts codes in place of."""
    spare = int(foreign_ids(vocabulary)[vocabulary["special"].end - 1])
    return {**{name: number for number, name in names.items()}, "<image>": spare}


def _vq(tokenizer: UnifiedTokenizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    codec, grid = tokenizer.codecs.get("image"), tokenizer.vocabulary.grids.get("image")
    if not isinstance(codec, VQGANCodec) or grid is None:
        raise ValueError("a Chameleon needs a VQ-GAN for its pictures, at one size")
    return codec_to(codec, grid)


def _tokenizer_config(
    names: Mapping[int, str], ids: Tensor, vocabulary: Vocabulary
) -> dict[str, str]:
    tokens = {
        key.removesuffix("_id"): names[int(ids[vocabulary.marker(marker)])]
        for marker, key in SPECIAL.items()
    }
    return {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
