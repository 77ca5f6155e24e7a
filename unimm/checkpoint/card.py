# pyright: strict
# torch's own types are partly unknown, and what users give is checked whatever its annotation says.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnnecessaryIsInstance=false

"""The card of a bundle or a codec: Markdown with the metadata that the Hub reads.

Hugging Face's model card specification (hub docs, "Model Cards"): YAML between dashes, then text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from unimm_tokenizers.storage import read_json, sha256, write_text

CARD_FILE, RESULTS_FILE = "README.md", "results.json"
_HASHED = (".safetensors", ".model", ".json")


class Score(NamedTuple):
    """A figure of a codec's reconstruction: codec, data, what was measured, value."""

    codec: str
    data: str
    figure: str
    value: str


def scores_of(results: str | Path) -> list[Score]:
    """The rows of a card's table of reconstruction, from what `unimm bench` has measured.

    Args:
        results: its `results.json`, or the folder that holds it. Classical codecs are left out.

    Raises:
        ValueError: the file is missing, or no such results.
    """
    path = Path(results)
    path = path / RESULTS_FILE if path.is_dir() else path
    measured = read_json(path)
    try:
        data = measured["protocol"]["split"] or "see results.json"
        return [
            Score(part["codec"], f"{data}, {part['samples']} {part['modality']}s", name, f"{n:.4g}")
            for part in measured["summaries"]
            if not part["classical"]
            for name, n in (
                *((measure, mean["value"]) for measure, mean in part["means"].items()),
                *part["whole"].items(),
                ("codes per sample", part["tokens"]),
            )
            if n is not None
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: these are no results of `unimm bench` ({error!r})") from None


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says; what is not known is said to be unknown, never left to guess.

    title: its heading. licence: an SPDX name in small letters, or "other". data: what it was
    trained on. summary: a paragraph. base_model: Hub id or name of the model that it was made from.
    facts: rows of the table of parts, name -> what it is. scores: reconstruction figures. sections:
    heading -> lines of Markdown. task: the Hub's name of what it does (`pipeline_tag`), if any.
    """

    title: str
    licence: str = "unknown"
    data: str = "not stated"
    summary: str = ""
    base_model: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    scores: Sequence[Score] = ()
    sections: Mapping[str, Sequence[str]] = field(default_factory=dict)
    task: str | None = "any-to-any"

    def write(self, folder: str | Path) -> None:
        """Write `README.md`, with the sha256 of every file that stands in the folder."""
        folder = Path(folder)
        write_text(folder / CARD_FILE, self.text(_hashes(folder)))

    def text(self, hashes: Mapping[str, str]) -> str:
        """The card, with a table of file hashes."""
        known = {
            "library_name": "unimm",
            "license": self.licence,
            "pipeline_tag": self.task,
            "tags": ["unimm"],
            "base_model": self.base_model,
        }
        metadata = {name: value for name, value in known.items() if value is not None}
        lines = ["---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", ""]
        lines += [f"# {self.title}", ""]
        lines += [self.summary, ""] if self.summary else []
        lines += markdown_table(("part", "what it is"), self.facts.items())
        unmeasured = ["Not measured: `unimm bench` does."]
        sections = {
            "Training data": [self.data],
            **self.sections,
            "Reconstruction": markdown_table(Score._fields, self.scores) or unmeasured,
            "Licence": [self.licence],
            "Files": markdown_table(("file", "sha256"), hashes.items()),
        }
        for heading, body in sections.items():
            lines += [f"## {heading}", "", *body, *([""] if body and body[-1] else [])]
        return "\n".join(lines)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, with an empty one after them; nothing where there are no rows."""
    cells = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    made = [f"| {' | '.join(row)} |" for row in cells]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *made, ""] if made else []


def _hashes(folder: Path) -> dict[str, str]:
    paths = sorted(p for p in folder.rglob("*") if p.suffix in _HASHED and p.name != "index.json")
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}
