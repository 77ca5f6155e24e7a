# pyright: strict
# torch's own types are partly unknown, and what users give is checked whatever its annotation says.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnnecessaryIsInstance=false

"""The one vocabulary: named blocks of contiguous ids, as plain data.

Blocks stand in this order: `special` (markers), `digit` (256 tokens that write sizes), `text`,
then one block per codec level (`image.0`, `audio.0` ... `audio.7`, `semantic.0`). An id never
changes once it exists: new modalities append blocks at the end. The sha256 fingerprint goes into
every token shard and every checkpoint. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from unimm.display import html

Modality = Literal["text", "image", "video", "audio", "semantic"]
AudioLayout = Literal["frame", "level"]

MODALITIES: tuple[Modality, ...] = get_args(Modality)
MARKERS = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<image>",
    "</image>",
    "<video>",
    "</video>",
    "<audio>",
    "</audio>",
    "<semantic>",
    "</semantic>",
    "<user>",
    "<assistant>",
)
SPECIAL_SIZE = 32  # room for markers of modalities to come, so that no later id moves
DIGIT_SIZE = 256
PADDING_MULTIPLE = 128  # the matrix units' tile: embedding and head rows come in whole tiles
GRID_AXES = {"image": 2, "video": 3}  # sides of the grids that may be fixed
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Block:
    """A contiguous range of ids: `start` (first id), `size`, `end` (one past the last)."""

    name: str
    start: int
    size: int

    @property
    def end(self) -> int:
        """One past the last id."""
        return self.start + self.size


class Vocabulary:
    """Id ranges of the one vocabulary.

    >>> vocabulary = Vocabulary(300, {"image": [512]})
    >>> vocabulary["image.0"]
    Block(name='image.0', start=588, size=512)
    >>> vocabulary.padded_size
    1152

    Args:
        text_size: number of text pieces.
        codecs: modality -> sizes of its codec levels, for example `{"image": [1024],
            "audio": [256, 256]}`; blocks are appended in the mapping's order.
        share: modality -> modality whose blocks it writes with; `{"video": "image"}` when one
            codec serves both.
        audio_layout: "frame" (open-ended, streams) or "level" (coarse to fine).
        grids: modality -> code grid that never varies, `{"image": [32, 32]}`; sequences then do not
            write its sizes (Chameleon, arXiv 2405.09818, section 2.1).

    Raises:
        ValueError: a size is not positive, or a modality is unknown, missing or given twice.
    """

    def __init__(
        self,
        text_size: int,
        codecs: Mapping[str, list[int]] | None = None,
        *,
        share: Mapping[str, str] | None = None,
        audio_layout: AudioLayout = "frame",
        grids: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        codecs, share = dict(codecs or {}), dict(share or {})
        if audio_layout not in get_args(AudioLayout):
            raise ValueError(f"audio_layout: expected 'frame' or 'level', got {audio_layout!r}")
        for modality in (*codecs, *share):
            if modality not in MODALITIES or modality == "text":
                raise ValueError(f"modality {modality!r} is unknown; known are {MODALITIES[1:]}")
        for modality, sizes in codecs.items():
            if not sizes:
                raise ValueError(f"modality {modality!r} has no codec level: give one size each")
        for modality, owner in share.items():
            if owner not in codecs or modality in codecs:
                raise ValueError(f"{modality!r} can't share the blocks of {owner!r}: see codecs")
        self.audio_layout: AudioLayout = audio_layout
        self.share = share
        self.grids = {modality: list(grid) for modality, grid in (grids or {}).items()}
        for modality, grid in self.grids.items():
            if modality not in (*codecs, *share) or len(grid) != GRID_AXES.get(modality):
                raise ValueError(f"{modality!r} can't have the fixed grid {grid}: images have two")
            if not all(isinstance(n, int) and n > 0 for n in grid):
                raise ValueError(f"grid of {modality!r}: sizes must be above 0, got {grid}")
        self._blocks: dict[str, Block] = {}
        self._end = 0
        self._append("special", SPECIAL_SIZE)
        self._append("digit", DIGIT_SIZE)
        self._append("text", text_size)
        self._levels: dict[str, list[Block]] = {}
        for modality, sizes in codecs.items():
            self._levels[modality] = [
                self._append(f"{modality}.{level}", size) for level, size in enumerate(sizes)
            ]

    def _append(self, name: str, size: int) -> Block:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"block {name!r}: size must be a whole number above 0, got {size!r}")
        block = Block(name, self._end, size)
        self._blocks[name] = block
        self._end = block.end
        return block

    def __len__(self) -> int:
        """Number of ids in use."""
        return self._end

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks.values())

    def __getitem__(self, name: str) -> Block:
        if name not in self._blocks:
            raise KeyError(f"no block {name!r}; blocks are {', '.join(self._blocks)}")
        return self._blocks[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} ids, {self.fingerprint[:12]}: {', '.join(self._blocks)})"

    def _repr_html_(self) -> str:
        rows = [(b.name, b.start, b.end - 1, f"{b.size:,}") for b in self]
        title = f"Vocabulary: {len(self):,} ids, {self.fingerprint[:12]}"
        colours = [html.colour_of(b.name) for b in self]
        table = html.table(("block", "first id", "last id", "size"), rows, colours)
        return html.card(title, (), table)

    @property
    def padded_size(self) -> int:
        """Rows of embedding and head: `len(self)` rounded up to a multiple of 128."""
        return -(-len(self) // PADDING_MULTIPLE) * PADDING_MULTIPLE

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that this vocabulary can write, text first."""
        return tuple(m for m in MODALITIES if m == "text" or m in self._levels or m in self.share)

    def marker(self, name: str) -> int:
        """Id of a marker such as `"<image>"`."""
        return MARKERS.index(name)

    def levels(self, modality: str) -> list[Block]:
        """The blocks of a modality's codec levels, coarse first.

        Raises:
            ValueError: this vocabulary has no codec for the modality.
        """
        owner = self.share.get(modality, modality)
        if owner not in self._levels:
            raise ValueError(
                f"this vocabulary has no {modality!r} tokens; it has {', '.join(self.modalities)}"
            )
        return self._levels[owner]

    def block_of(self, token: int) -> Block:
        """The block that holds an id.

        Raises:
            ValueError: the id lies outside the vocabulary.
        """
        for block in self:
            if block.start <= token < block.end:
                return block
        raise ValueError(f"id {token} lies outside the vocabulary (0 to {len(self) - 1})")

    def extended(self, codecs: Mapping[str, list[int]]) -> Vocabulary:
        """A vocabulary with more modalities at the end; no existing id changes.

        Raises:
            ValueError: a modality is there already; its ids would change.
        """
        for modality in codecs:
            if modality in self._levels:
                raise ValueError(f"this vocabulary has {modality!r} already: its ids are fixed")
        return Vocabulary(
            self["text"].size,
            {**self._codec_sizes(), **codecs},
            share=self.share,
            audio_layout=self.audio_layout,
            grids=self.grids,
        )

    def _codec_sizes(self) -> dict[str, list[int]]:
        return {name: [block.size for block in blocks] for name, blocks in self._levels.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `vocabulary.json` holds it."""
        return {
            "format": FORMAT,
            "audio_layout": self.audio_layout,
            "share": self.share,
            # Left out where there are none: vocabularies without keep their fingerprint.
            **({"grids": self.grids} if self.grids else {}),
            "blocks": [{"name": b.name, "start": b.start, "size": b.size} for b in self],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Vocabulary:
        """The inverse of `to_dict`.

        Raises:
            ValueError: the format is unknown, a part is missing, or the blocks are not the ones
                that the sizes give.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f"this is no vocabulary of format {FORMAT}")
        try:
            blocks = [(block["name"], block["size"]) for block in data["blocks"]]
            share, audio_layout = data["share"], data["audio_layout"]
            grids = dict(data.get("grids", {}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"the vocabulary is incomplete: {error!r}") from None
        codecs: dict[str, list[int]] = {}
        text_size = 0
        for name, size in blocks:
            modality, _, level = name.partition(".")
            if level:
                codecs.setdefault(modality, []).append(size)
            elif modality == "text":
                text_size = size
        vocabulary = cls(text_size, codecs, share=share, audio_layout=audio_layout, grids=grids)
        if vocabulary.to_dict()["blocks"] != list(data["blocks"]):
            raise ValueError("vocabulary blocks are not contiguous in their fixed order")
        return vocabulary

    def to_json(self) -> str:
        """The text of `vocabulary.json`."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read `vocabulary.json`.

        Raises:
            ValueError: the file is missing, not JSON, or no vocabulary; names it.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the canonical form; equal exactly when all ids mean the same."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def require(self, fingerprint: str, owner: str) -> None:
        """Refuse what was made with another vocabulary.

        Args:
            fingerprint: that it carries.
            owner: what it is, for the message.

        Raises:
            ValueError: `fingerprint` is not this vocabulary's; the message names both.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{owner} was made with vocabulary {fingerprint[:12]}, not with this one "
                f"({self.fingerprint[:12]}): use the tokenizer that made it, or make it again"
            )
