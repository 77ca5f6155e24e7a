"""How a raw sample becomes documents: templates with fields, as data.

    Template(["{txt}", "{png}"])                     a word, then its picture
    Template(["Draw {txt}.", "{image}"], weight=2)   text around a field; any picture file
    Template(["<user>", "What is it?", "{audio}", "<assistant>", "{json.word}"])
    Template(["{document}"])                         the order that the sample's own file gives

Fields: `{txt}` or `{text}`, the text file; `{json.a.b}`, a string or number of the JSON file; an
extension (`{png}`, `{left.jpg}`, `{wav}`, `{mp4}`); `{image}`, `{audio}`, `{video}`, whichever file
of that kind there is; `{semantic}`, the picture written as semantic tokens. `{document}` stands
alone: the sample's `document.json` is a list in which a member's extension stands for that member,
"<user>" and "<assistant>" for turns, and anything else for itself. `{{` and `}}` are braces.

Where a `{json...}` field is a list (several captions of a picture), one entry is drawn for each
document. `shuffle` draws the order of the parts, `drop_condition` leaves all but the last one out.
All draws are fixed by seed, shard name and key.
"""

from __future__ import annotations

import hashlib
import json
import string
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeAlias

import yaml
from PIL import Image

from unimm.checkpoint import did_you_mean
from unimm.data.manifest import digest
from unimm.data.media import (
    FILMS,
    PICTURES,
    SOUNDS,
    LongFile,
    MediaError,
    decode,
    open_media,
)
from unimm.data.shards import Sample
from unimm.signals import Audio, Item, Semantic, Turn, Video

KINDS = {"image": PICTURES, "audio": SOUNDS, "video": FILMS, "semantic": PICTURES}
TEXTS = ("txt", "text")
TURNS = ("<user>", "<assistant>")
DOCUMENT = "document"
DOCUMENT_FILE = "document.json"
RawItem: TypeAlias = "Item | LongFile"


class Piece(NamedTuple):
    """A literal text, a turn ("<user>") or a field; the other two are empty."""

    literal: str = ""
    turn: str = ""
    field: str = ""


@dataclass(frozen=True)
class Template:
    """One way to write a sample as a document.

    Args:
        parts: what stands after what; see the module.
        weight: how often it is drawn, relative to the other templates.
        name: what the token shard calls it; the parts themselves when None.
        drop_condition: how often only the last part is kept, so that the model also learns its
            probability without a condition, which guidance needs (Ho and Salimans, arXiv
            2207.12598, section 3.2).
        shuffle: draw the order of the parts anew for every document.

    Raises:
        ValueError: a part has an unknown field, or a number is out of range.
    """

    parts: list[str]
    weight: float = 1.0
    name: str | None = None
    drop_condition: float = 0.0
    shuffle: bool = False

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a template has no parts; give at least one, such as '{txt}'")
        if not self.weight > 0:
            raise ValueError(f"template {self.label}: weight must be above 0, got {self.weight}")
        if not 0 <= self.drop_condition < 1 or (self.drop_condition and len(self.parts) < 2):
            raise ValueError(
                f"template {self.label}: drop_condition must be in [0, 1), 0 for a single part; "
                f"got {self.drop_condition}"
            )
        if any(piece.field == DOCUMENT for piece in self.pieces) and len(self.pieces) > 1:
            raise ValueError(f"template {self.label}: {{document}} must stand alone")
        if self.shuffle and (len(self.parts) < 2 or any(piece.turn for piece in self.pieces)):
            raise ValueError(
                f"template {self.label}: shuffle needs two parts or more, and no turns among them"
            )

    @property
    def label(self) -> str:
        """The name, or the parts."""
        return self.name or " ".join(self.parts)

    @cached_property
    def pieces(self) -> list[Piece]:
        """All parts, cut at their fields."""
        return [piece for part in self._pieces_by_part for piece in part]

    @cached_property
    def _pieces_by_part(self) -> list[list[Piece]]:
        return [self._parse(part) for part in self.parts]

    def drawn(self, random: Random, *, drop_condition: bool) -> list[Piece]:
        """The pieces of one document."""
        parts = list(self._pieces_by_part)
        if self.shuffle:
            random.shuffle(parts)
        return [piece for part in (parts[-1:] if drop_condition else parts) for piece in part]

    def _parse(self, part: str) -> list[Piece]:
        if part in TURNS:
            return [Piece(turn=part)]
        pieces = []
        try:
            cut = list(string.Formatter().parse(part))
        except ValueError as error:
            raise ValueError(f"template part {part!r}: {error}") from None
        for literal, name, form, conversion in cut:
            if any(turn in literal for turn in TURNS):
                raise ValueError(f"template part {part!r}: a turn must be a part of its own")
            if literal:
                pieces.append(Piece(literal=literal))
            if name is None:
                continue
            if form or conversion or modality_of_field(name) is None:
                known = [*TEXTS, "json.<field>", *KINDS, DOCUMENT, *PICTURES, *SOUNDS, *FILMS]
                raise ValueError(
                    f"template part {part!r}: unknown field {name!r}{did_you_mean(name, known)}; "
                    f"fields are {', '.join(known)}"
                )
            pieces.append(Piece(field=name))
        return pieces


def load_templates(path: str | Path) -> list[Template]:
    """Read a YAML list of templates, such as `- {parts: ["{txt}", "{png}"], weight: 2}`.

    Raises:
        ValueError: the file is missing or no such list, or a template is not valid.
    """
    try:
        data = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: the file is missing") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, list) or not data:
        raise ValueError(f"{path}: expected a list of templates, such as - parts: ['{{txt}}']")
    return [_template(entry, f"{path}: template {number}") for number, entry in enumerate(data)]


def _template(entry: object, where: str) -> Template:
    known = [field.name for field in dataclass_fields(Template)]
    if not isinstance(entry, dict) or "parts" not in entry:
        raise ValueError(f"{where}: has no parts, such as parts: ['{{txt}}', '{{png}}']")
    unknown = [str(key) for key in entry if key not in known]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    parts = entry["parts"]
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{where}: parts must be a list of strings; quote fields: '{{txt}}'")
    try:
        return Template(**entry)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def default_templates(sample: Sample, modalities: Sequence[str]) -> list[Template]:
    """Templates for shards that look like `sample`: its own order, or text and media both ways.

    Args:
        sample: the first of the shards.
        modalities: those of the tokenizer's vocabulary.

    Raises:
        ValueError: it holds nothing that the tokenizer can write.
    """
    if DOCUMENT_FILE in sample:
        return [Template(["{document}"])]
    media = [
        f"{{{kind}}}"
        for kind, known in KINDS.items()
        if kind in modalities and any(extension in sample for extension in known)
    ]
    if "txt" not in sample:
        parts = [[field] for field in media]
    else:
        parts = [order for field in media for order in (["{txt}", field], [field, "{txt}"])]
        parts = parts or [["{txt}"]]
    if not parts:
        raise ValueError(
            f"{sample.where}: holds {sample.listed}, nothing that the tokenizer writes "
            f"({', '.join(modalities)}); give templates"
        )
    return [Template(order) for order in parts]


def modality_of_field(name: str) -> str | None:
    """What a field becomes; "" where only the sample can tell, None where it is unknown."""
    if name == DOCUMENT:
        return ""
    if name in KINDS:
        return name
    suffix = name.rpartition(".")[2]
    if name in TEXTS or suffix == "txt" or (name.startswith("json.") and len(name) > 5):
        return "text"
    return next((kind for kind, known in KINDS.items() if suffix in known), None)


def check_templates(templates: Sequence[Template], modalities: Sequence[str]) -> None:
    """Refuse templates that a tokenizer can't write.

    Args:
        templates: at least one, with different names.
        modalities: those of the tokenizer's vocabulary.

    Raises:
        ValueError: names the template and the field.
    """
    if not templates:
        raise ValueError("no templates: give at least one, such as parts: ['{txt}', '{image}']")
    labels = [template.label for template in templates]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ValueError(f"two templates are called {twice[0]!r}: give one another name")
    for template in templates:
        for piece in template.pieces:
            modality = modality_of_field(piece.field) if piece.field else None
            if modality and modality not in modalities:
                raise ValueError(
                    f"template {template.label}: field {{{piece.field}}} needs {modality!r} "
                    f"tokens; the tokenizer has {', '.join(modalities)}"
                )


class Fields:
    """The fields of one sample, each decoded once: equal fields are one and the same object.

    Args:
        sample: the raw sample.
        long: kind -> number of values above which a sound or film is not decoded but handed on as
            its file.
    """

    def __init__(self, sample: Sample, long: Mapping[str, int] | None = None) -> None:
        self.sample = sample
        self._long = long or {}
        self._items: dict[str, RawItem] = {}
        self._texts: dict[str, list[str]] = {}
        self._json: object = None

    def __getitem__(self, name: str) -> RawItem:
        if name not in self._items:
            self._items[name] = self._read(name)
        return self._items[name]

    def _read(self, name: str) -> RawItem:
        if name == "semantic":
            picture = self["image"]
            assert isinstance(picture, Image.Image)
            return Semantic(picture)
        if name in KINDS:
            return self[self._extension(name)]
        return self.member("txt" if name == "text" else name)

    def _extension(self, kind: str) -> str:
        found = next((known for known in KINDS[kind] if known in self.sample), None)
        if found is None:
            raise self._error(
                f"a template wants {{{kind}}}, but the sample has only {self.sample.listed}"
            )
        return found

    def member(self, extension: str) -> RawItem:
        """The text, picture, sound or film in a file."""
        if extension not in self.sample:
            raise self._error(
                f"a template wants {{{extension}}}, but the sample has only {self.sample.listed}"
            )
        kind = modality_of_field(extension) or ""
        if kind in self._long:
            data = self.sample[extension]
            media = open_media(extension, data, self.sample.where)
            if media.reader.values > self._long[kind]:
                return LongFile(extension, data, self.sample.where)
            return media.whole()
        item = decode(extension, self.sample[extension], self.sample.where)
        if not isinstance(item, str | Image.Image | Audio | Video):
            raise self._error(f".{extension} is no item of a document")
        if item == "":
            raise self._error(f".{extension} is empty")
        return item

    def text(self, name: str, random: Random) -> str:
        """What a field of the JSON file says; of a list, one entry is drawn."""
        if name not in self._texts:
            self._texts[name] = self._field(name)
        texts = self._texts[name]
        return texts[0] if len(texts) == 1 else random.choice(texts)

    def _field(self, name: str) -> list[str]:
        if self._json is None:
            if "json" not in self.sample:
                raise self._error(
                    f"a template wants {{{name}}}, but the sample has only {self.sample.listed}"
                )
            self._json = decode("json", self.sample["json"], self.sample.where)
        value = self._json
        for part in name.split(".")[1:]:
            if not isinstance(value, dict) or part not in value:
                known = list(value) if isinstance(value, dict) else []
                raise self._error(
                    f".json has no {part!r} for {{{name}}}{did_you_mean(part, known)}"
                )
            value = value[part]
        entries = value if isinstance(value, list) else [value]
        if not entries or not all(_is_text(entry) for entry in entries):
            raise self._error(f"{{{name}}} is no text and no number: {json.dumps(value)[:60]}")
        return [str(entry) for entry in entries]

    def order(self) -> list[str]:
        """The entries of `document.json`."""
        if DOCUMENT_FILE not in self.sample:
            raise self._error(
                f"a template wants {{document}}, but the sample has only {self.sample.listed}"
            )
        entries = decode("json", self.sample[DOCUMENT_FILE], self.sample.where)
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise self._error(f"{DOCUMENT_FILE} must be a list of strings")
        return entries

    def _error(self, reason: str) -> MediaError:
        return MediaError(self.sample.where, reason)


def _is_text(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""


def make_document(
    fields: Fields | Sample, template: Template, *, drop_condition: bool = False, seed: int = 0
) -> list[RawItem]:
    """A sample, written as a template says; neighbouring texts are joined.

    Args:
        fields: the sample, or its fields, which share decoded media between templates.
        template: how to write it.
        drop_condition: keep only the last part.
        seed: decides the order of shuffled parts, and which of several captions is taken.

    Raises:
        MediaError: a file that the template wants is missing or damaged; names shard and key.
    """
    fields = Fields(fields) if isinstance(fields, Sample) else fields
    random = Random(seed)
    pieces = template.drawn(random, drop_condition=drop_condition)
    items: Iterable[RawItem]
    if pieces and pieces[0].field == DOCUMENT:
        items = [_entry(fields, entry) for entry in fields.order()]
    else:
        items = [_item(fields, piece, random) for piece in pieces]
    document: list[RawItem] = []
    for item in items:
        if isinstance(item, str) and document and isinstance(document[-1], str):
            document[-1] = document[-1] + item
        elif item != "":
            document.append(item)
    if not document:
        raise MediaError(fields.sample.where, f"template {template.label} gives an empty document")
    return document


def _item(fields: Fields, piece: Piece, random: Random) -> RawItem:
    if piece.field.startswith("json."):
        return fields.text(piece.field, random)
    if piece.field:
        return fields[piece.field]
    return _turn(piece.turn) if piece.turn else piece.literal


def _entry(fields: Fields, entry: str) -> RawItem:
    if entry in TURNS:
        return _turn(entry)
    return fields.member(entry) if entry in fields.sample else entry


def _turn(marker: str) -> Turn:
    return Turn("user" if marker == "<user>" else "assistant")


class Draw(NamedTuple):
    """A template for one document, whether its condition is left out, and a seed for the rest."""

    template: Template
    drop_condition: bool
    seed: int


class Drawing:
    """Which templates a sample is written with: fixed by seed, shard name and key.

    Args:
        templates: what to draw from.
        documents_per_sample: number of documents; None writes every template once.
        seed: another seed draws others.
    """

    def __init__(
        self,
        templates: Sequence[Template],
        documents_per_sample: int | None = 1,
        seed: int = 0,
    ) -> None:
        if documents_per_sample is not None and documents_per_sample < 1:
            raise ValueError(f"documents_per_sample: at least 1, got {documents_per_sample}")
        self.templates = list(templates)
        self.documents_per_sample = documents_per_sample
        self.seed = seed
        total = sum(template.weight for template in templates)
        self._ends = [end / total for end in accumulate(t.weight for t in templates)]

    def __call__(self, sample: Sample) -> list[Draw]:
        """The draws of one sample."""
        name = f"{self.seed}\0{sample.shard.name}\0{sample.key}"
        random = Random(_number(name))
        if self.documents_per_sample is None:
            chosen = self.templates
        else:
            # Systematic sampling: every template's expected number is its exact share, and none
            # comes twice before its share exceeds 1 / documents_per_sample.
            count, start = self.documents_per_sample, random.random()
            last = len(self.templates) - 1
            chosen = [
                self.templates[min(bisect(self._ends, (start + i) / count), last)]
                for i in range(count)
            ]
        return [
            Draw(template, random.random() < template.drop_condition, _number(f"{name}\0{number}"))
            for number, template in enumerate(chosen)
        ]

    @property
    def digest(self) -> str:
        """sha256 (hex) of everything that decides the draws."""
        return digest(
            {
                "templates": [_facts(template) for template in self.templates],
                "documents_per_sample": self.documents_per_sample,
                "seed": self.seed,
            }
        )


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _facts(template: Template) -> dict[str, object]:
    """What the digest of a template is made of; an option that is off leaves older ones alone."""
    return {k: v for k, v in asdict(template).items() if k != "shuffle" or v}
