"""What a benchmark measured: every sample, every failure, and a summary per codec and modality."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from unimm.evaluation.metrics import MEASURES
from unimm.evaluation.reconstruction.exactness import Exactness
from unimm.evaluation.reconstruction.plots import Plot, rate_plot
from unimm.evaluation.reconstruction.predictability import Predictability
from unimm.evaluation.reconstruction.protocol import Protocol
from unimm.evaluation.reconstruction.tables import tables
from unimm.evaluation.report_parts import markdown_table, render_table
from unimm.evaluation.statistics import Mean, paired_difference
from unimm.signals import Item
from unimm_tokenizers.storage import read_json, write_text

RESULTS_FILE, SAMPLES_FILE, TABLES_FILE = "results.json", "samples.csv", "results.md"


class Row(NamedTuple):
    """One sample through one codec. `values`: measure -> number, NaN where not defined.

    `amount` is what rates and speeds count: pixels, or seconds of sound. `values` holds the rate
    too, as "bits_per_pixel" or "kbps".
    """

    codec: str
    modality: str
    key: str
    tokens: int
    amount: float
    encode_seconds: float
    decode_seconds: float
    values: Mapping[str, float]


class Failure(NamedTuple):
    """A sample that could not be coded or measured, and why."""

    codec: str
    modality: str
    key: str
    reason: str


class Example(NamedTuple):
    """A sample to look at: codes are (K, *grid); regions (h, w) of a semantic codec, or None."""

    codec: str
    modality: str
    key: str
    original: Item
    reconstruction: Item
    codes: Tensor
    regions: Tensor | None
    note: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A codec on a modality, over all samples.

    means: measure -> mean with interval. undefined: measure -> samples whose value is NaN, which
    are left out of that mean. whole: measures of all samples together (rFID, rFVD).
    tokens: per sample. token_rate: per pixel, or per second of sound. usage (share of codes),
    perplexity and entropy (bits per code) are per level. coded_rate: bits per pixel or kbit/s at
    that entropy. Speeds: megapixels, or seconds of sound, per second; milliseconds: medians of a
    sample. latency_ms: of a stream, a frame and the time to code it; None of what does not stream.
    peak_mib: memory that coding one sample took beyond what was held; None where not known.
    reference: sha256 of all prepared references; weights: sha256 of the codec's weights.
    """

    codec: str
    modality: str
    samples: int
    failed: int
    means: Mapping[str, Mean]
    undefined: Mapping[str, int]
    whole: Mapping[str, float]
    tokens: float
    token_rate: float
    usage: Sequence[float]
    perplexity: Sequence[float]
    entropy: Sequence[float]
    coded_rate: float
    encode_speed: float
    decode_speed: float
    encode_ms: float
    decode_ms: float
    latency_ms: float | None
    peak_mib: float | None
    first_call_seconds: float | None
    classical: bool
    exactness: Exactness | None
    predictability: Predictability | None
    reference: str
    weights: str


@dataclass(frozen=True, repr=False)
class Results:
    """What `run` measured. In a notebook it shows itself as tables and a plot."""

    protocol: Protocol
    rows: Sequence[Row]
    failures: Sequence[Failure]
    summaries: Sequence[Summary]
    skipped: Mapping[str, str]
    environment: Mapping[str, str]
    examples: Sequence[Example] = ()

    def __repr__(self) -> str:
        codecs = dict.fromkeys(summary.codec for summary in self.summaries)
        return f"Results({len(codecs)} codecs, {len(self.rows)} rows, {len(self.failures)} failed)"

    def check(self) -> None:
        """Refuse a codec that failed on too many samples.

        Raises:
            ValueError: the protocol's share is exceeded; names the first sample and its reason.
        """
        for summary in self.summaries:
            tried = summary.samples + summary.failed
            if summary.failed > self.protocol.max_failed * tried:
                first = next(
                    failure
                    for failure in self.failures
                    if failure[:2] == (summary.codec, summary.modality)
                )
                raise ValueError(
                    f"{summary.codec}: {summary.failed} of {tried} {summary.modality} samples "
                    f"failed, first {first.key}: {first.reason}"
                )

    @property
    def modalities(self) -> list[str]:
        """Those that were measured, in order."""
        return list(dict.fromkeys(summary.modality for summary in self.summaries))

    def compare(self, first: str, second: str, measure: str, modality: str | None = None) -> Mean:
        """Mean of `first - second` over the samples that both have, with its interval.

        Raises:
            ValueError: there are no such samples, or the codecs' samples lie in two modalities and
                none is named.
        """
        values: dict[str, dict[tuple[str, str], float]] = {first: {}, second: {}}
        for row in self.rows:
            value = row.values.get(measure, math.nan)
            if row.codec in values and modality in (None, row.modality) and not math.isnan(value):
                values[row.codec][row.modality, row.key] = value
        shared = [place for place in values[first] if place in values[second]]
        found = sorted({modality for modality, _ in shared})
        if len(found) != 1:
            raise ValueError(
                f"compare: {first} and {second} share {measure} on "
                f"{' and '.join(found) or 'no sample'}; name one modality that both have"
            )
        return paired_difference(
            [values[first][place] for place in shared],
            [values[second][place] for place in shared],
            seed=self.protocol.seed,
        )

    def table(self) -> str:
        """All tables as Markdown."""
        parts = [f"### {t.title}\n\n{markdown_table(t.columns, t.rows)}" for t in tables(self)]
        return "\n".join(parts) + self._skipped_note()

    def __str__(self) -> str:
        return self.table()

    def _skipped_note(self) -> str:
        lines = [f"- {MEASURES[name].label}: {why}\n" for name, why in self.skipped.items()]
        return "\n### Skipped\n\n" + "".join(lines) if lines else ""

    def plot(self, modality: str | None = None, measure: str | None = None) -> Plot:
        """Rate against a measure: a curve for each classical codec, a point for each learned one.

        Args:
            modality: None takes the first that was measured.
            measure: None takes PSNR, or the mel distance of sounds.

        Raises:
            ValueError: nothing of that was measured.
        """
        return rate_plot(self, modality or self.modalities[0], measure)

    def _repr_html_(self) -> str:
        shown = [f"<h4>{t.title}</h4>{render_table(t.columns, t.rows)}" for t in tables(self)]
        return self.plot()._repr_html_() + "".join(shown)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: protocol, versions, summaries, failures (the samples are in the CSV)."""
        summaries = []
        for summary in self.summaries:
            plain = dataclasses.asdict(summary)
            plain["means"] = {name: mean._asdict() for name, mean in summary.means.items()}
            summaries.append(plain)
        return {
            "protocol": self.protocol.to_dict(),
            "environment": dict(self.environment),
            "skipped": dict(self.skipped),
            "summaries": summaries,
            "failures": [failure._asdict() for failure in self.failures],
        }

    def to_csv(self) -> str:
        """One line per sample and codec; a cell is empty where a measure is not defined."""
        names = [m for m in MEASURES if any(m in row.values for row in self.rows)]
        fields = [name for name in Row._fields if name != "values"]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*fields, *names])
        for row in self.rows:
            values = [row.values.get(name, math.nan) for name in names]
            writer.writerow(
                [getattr(row, name) for name in fields]
                + ["" if math.isnan(value) else value for value in values]
            )
        return text.getvalue()

    def save(self, folder: str | Path) -> None:
        """Write `results.json`, `samples.csv` and `results.md`; `read_results` reads them."""
        folder = Path(folder)
        write_text(folder / SAMPLES_FILE, self.to_csv())
        write_text(folder / TABLES_FILE, self.table())
        try:
            text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"{folder}: results are not plain JSON: {error}") from None
        write_text(folder / RESULTS_FILE, text + "\n")


def read_results(folder: str | Path) -> Results:
    """What `Results.save` wrote, without examples.

    Raises:
        ValueError: a file is missing or damaged, or was measured under other rules.
    """
    folder = Path(folder)
    stored = read_json(folder / RESULTS_FILE)
    try:
        summaries = [_summary(data) for data in stored["summaries"]]
        with (folder / SAMPLES_FILE).open(newline="") as file:
            rows = [_row(line) for line in csv.DictReader(file)]
        return Results(
            Protocol.from_dict(stored["protocol"]),
            rows,
            [Failure(**failure) for failure in stored["failures"]],
            summaries,
            stored["skipped"],
            stored["environment"],
        )
    except (KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(f"{folder}: not the results of a benchmark ({error})") from None


def _summary(data: dict[str, Any]) -> Summary:
    parts = {"exactness": Exactness, "predictability": Predictability}
    made = {k: kind(**data[k]) if data[k] is not None else None for k, kind in parts.items()}
    means = {name: Mean(**mean) for name, mean in data["means"].items()}
    return Summary(**{**data, **made, "means": means})


def _row(line: dict[str, str]) -> Row:
    numbers = {name: float(line[name]) for name in ("amount", "encode_seconds", "decode_seconds")}
    place = (line["codec"], line["modality"], line["key"])
    values = {name: float(value) for name, value in line.items() if name in MEASURES and value}
    return Row(*place, int(line["tokens"]), **numbers, values=values)


def combined(*parts: Results) -> Results:
    """Results of one protocol on the same references, as one table.

    Raises:
        ValueError: protocols, references or versions differ, or a codec is there twice.
    """
    first = parts[0]
    references: dict[str, str] = {}
    places: set[tuple[str, str]] = set()
    for part in parts:
        reason = first.protocol.difference(part.protocol)
        for name in ("unimm", "torch"):
            if first.environment.get(name) != part.environment.get(name):
                reason = reason or (
                    f"{name} is {first.environment.get(name)} in one and "
                    f"{part.environment.get(name)} in the other"
                )
        for summary in part.summaries:
            kind = "image" if summary.modality == "semantic" else summary.modality
            if references.setdefault(kind, summary.reference) != summary.reference:
                reason = reason or f"the {kind} references are not the same signals"
            if (summary.codec, summary.modality) in places:
                reason = reason or f"{summary.codec} is in two of them"
            places.add((summary.codec, summary.modality))
        if reason is not None:
            raise ValueError(f"results cannot stand in one table: {reason}")
    return Results(
        first.protocol,
        [row for part in parts for row in part.rows],
        [failure for part in parts for failure in part.failures],
        [summary for part in parts for summary in part.summaries],
        {name: why for part in parts for name, why in part.skipped.items()},
        first.environment,
        [example for part in parts for example in part.examples],
    )
