"""The reconstruction benchmark: what codecs keep of real signals, under one recorded protocol.

    results = run({"mine": codec}, "photos/", Protocol(max_side=256))
    results.table()                    Markdown, or HTML by itself in a notebook
    results.compare("mine", "other", "psnr")
    bench(["dialpad/image"], "photos/", out)     results.json, samples.csv and report.html

Every sample is coded alone and measured alone: averages are taken once, over samples, with
bootstrap intervals, and a sample that fails is counted and named, never averaged away. Measures are
taken in [-1, 1] (data range 2) against the very signal that the codec was given. The first call of
a codec is timed apart from the others.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from torch import Tensor

from unimm.data.media import FILMS, PICTURES, SOUNDS, decode
from unimm.data.shards import Sample as ShardSample
from unimm.data.shards import ShardReader, expand
from unimm.evaluation import metrics
from unimm.evaluation.figures import error_map, token_grid
from unimm.evaluation.report import Card, Part, Report, environment, write_results
from unimm.evaluation.report_parts import Cell, markdown_table, render_table
from unimm.evaluation.statistics import Mean, bootstrap_mean, paired_difference
from unimm.signals import Audio, Item, Semantic, Video
from unimm.tokenizer import (
    audio_signal,
    image_signal,
    load_codec,
    modality_of,
    signal_item,
    video_signal,
)
from unimm_tokenizers.codec import Codec
from unimm_tokenizers.presets import build_codec, presets
from unimm_tokenizers.storage import write_text

_SHOWN_SECONDS = 3.0  # of sounds in the report


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How signals are prepared and what is kept; stored with the results.

    Args:
        max_side: pictures and films whose shorter side is longer are reduced to it (bicubic,
            antialiased) and cropped to the central square; None leaves them as they are.
        max_seconds: only the beginning of longer sounds is coded; None takes all.
        max_frames: only the first frames of longer films are coded; None takes all.
        limit: samples per modality, the first ones; None takes all.
        max_failed: share of failed samples above which `Results.check` refuses.
        examples: samples per codec and modality that are kept for the report.
        seed: of the bootstrap.
    """

    max_side: int | None = 256
    max_seconds: float | None = 10.0
    max_frames: int | None = 33
    limit: int | None = None
    max_failed: float = 0.01
    examples: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_side", "max_seconds", "max_frames", "limit"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"protocol: {name} must be positive or None, got {value}")


class Sample(NamedTuple):
    """A signal that is read when it is needed; `load` raises ValueError where it is damaged."""

    key: str
    modality: str
    load: Callable[[], Item]


class Row(NamedTuple):
    """One sample through one codec. `values`: measure -> number, NaN where not defined.

    `amount` is what speed counts: pixels, or seconds of sound.
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
    """A sample to look at: codes are (K, *grid)."""

    codec: str
    modality: str
    key: str
    original: Item
    reconstruction: Item
    codes: Tensor


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A codec on a modality, over all samples.

    `undefined` counts samples by measure whose value is NaN; they are left out of that mean.
    usage (share of codes), perplexity and entropy (bits per code) are per level. Speeds are in
    megapixels, or seconds of sound, per second.
    """

    codec: str
    modality: str
    samples: int
    failed: int
    means: Mapping[str, Mean]
    undefined: Mapping[str, int]
    tokens: float
    usage: Sequence[float]
    perplexity: Sequence[float]
    entropy: Sequence[float]
    encode_speed: float
    decode_speed: float
    first_call_seconds: float | None


@dataclass(frozen=True)
class Results:
    """What `run` measured: every sample, every failure, and a summary per codec and modality."""

    protocol: Protocol
    rows: Sequence[Row]
    failures: Sequence[Failure]
    summaries: Sequence[Summary]
    examples: Sequence[Example] = field(repr=False)

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
        """The summaries as Markdown, one table per modality."""
        parts = []
        for modality, columns, rows in self._tables():
            parts.append(f"{modality}\n\n{markdown_table(columns, rows)}")
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        return "".join(
            f"<h4>{modality}</h4>{render_table(columns, rows)}"
            for modality, columns, rows in self._tables()
        )

    def _tables(self) -> Iterator[tuple[str, list[str], list[list[Cell]]]]:
        for modality in dict.fromkeys(summary.modality for summary in self.summaries):
            unit = "x real time" if modality == "audio" else "Mpixel/s"
            measures = metrics.OF_MODALITY[modality]
            columns = ["codec", "samples", "failed", *(metrics.MEASURES[m][0] for m in measures)]
            columns += ["tokens", "codes used, %", "bits per code"]
            columns += [f"encode, {unit}", f"decode, {unit}"]
            rows: list[list[Cell]] = [
                [s.codec, s.samples, s.failed]
                + [s.means.get(measure) for measure in measures]
                + [s.tokens, 100 * _mean(s.usage), _mean(s.entropy)]
                + [s.encode_speed, s.decode_speed]
                for s in self.summaries
                if s.modality == modality
            ]
            yield modality, columns, rows

    def _protocol(self) -> dict[str, Any]:
        return dataclasses.asdict(self.protocol) | {"data_range": metrics.CODEC_RANGE}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: protocol, versions, summaries, failures (the samples are in the CSV)."""
        return {
            "protocol": self._protocol(),
            "environment": environment(),
            "summaries": [
                dataclasses.asdict(s) | {"means": {k: v._asdict() for k, v in s.means.items()}}
                for s in self.summaries
            ],
            "failures": [failure._asdict() for failure in self.failures],
        }

    def to_csv(self) -> str:
        """One line per sample and codec; a cell is empty where a measure is not defined."""
        names = [m for m in metrics.MEASURES if any(m in row.values for row in self.rows)]
        fields = ["codec", "modality", "key", "tokens", "encode_seconds", "decode_seconds"]
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

    def report(self) -> Report:
        """The page: figures, examples, failures, protocol and machine."""
        page = Report("Reconstruction benchmark", "What codecs keep of real signals.")
        page.section("Figures", "Means over samples with 95% bootstrap intervals.")
        for modality, columns, rows in self._tables():
            notes = [
                f"{s.codec}: {metrics.MEASURES[measure][0]} is not defined for {count} samples."
                for s in self.summaries
                if s.modality == modality
                for measure, count in s.undefined.items()
            ]
            page.table(modality, columns, rows, " ".join(notes))
        page.section(
            "Examples",
            "The first samples: as given, and decoded from their codes alone. Errors are brightest "
            "at 64 of 255 and above; among the codes, every colour is one code.",
        )
        groups = defaultdict(list)
        for example in self.examples:
            groups[f"{example.modality}: {example.codec}"].append(_card(example))
        for title, cards in groups.items():
            page.gallery(title, cards)
        if self.failures:
            page.section("Failures", "These samples count in no mean.")
            page.table("", list(Failure._fields), self.failures)
        page.section("Protocol")
        page.facts(
            "Protocol", dataclasses.asdict(self.protocol) | {"data_range": metrics.CODEC_RANGE}
        )
        page.facts("Machine", environment())
        return page


def run(
    codecs: Mapping[str, Codec],
    data: str | Path | Iterable[Sample],
    protocol: Protocol | None = None,
    *,
    progress: bool = False,
) -> Results:
    """Send every sample through every codec that serves its modality, and measure.

    Args:
        codecs: name -> codec.
        data: shards, a folder of media files, or samples; see `read_samples`.
        protocol: None takes the defaults.
        progress: draw a bar on the terminal.

    Raises:
        ValueError: there is nothing to read, or no sample for one of the codecs.
    """
    protocol = protocol or Protocol()
    chosen = read_samples(data) if isinstance(data, str | Path) else list(data)
    samples = _limited(chosen, protocol.limit)
    rows: list[Row] = []
    failures: list[Failure] = []
    summaries: list[Summary] = []
    examples: list[Example] = []
    for name, codec in codecs.items():
        served = _served(name, codec, samples)
        for modality, group in served.items():
            bench_of_one = _Bench(name, codec, modality, protocol)
            for sample in track(group, f"{name}: {modality}", disable=not progress):
                bench_of_one.add(sample)
            rows += bench_of_one.rows
            failures += bench_of_one.failures
            examples += bench_of_one.examples
            summaries.append(bench_of_one.summary())
    return Results(protocol, rows, failures, summaries, examples)


def bench(
    codecs: Sequence[str],
    data: str | Path,
    out: str | Path,
    protocol: Protocol | None = None,
    *,
    progress: bool = False,
) -> Results:
    """Measure codecs by name, and write `results.json`, `samples.csv` and `report.html`.

    Args:
        codecs: codec folders, bundles ("dialpad/image"), or presets, which are untrained.
        data: shards or a folder; see `read_samples`.
        out: folder of the three files.
        protocol: None takes the defaults.
        progress: draw a bar on the terminal.

    Raises:
        ValueError: a codec or the data is not found, or too many samples failed (after writing).
    """
    loaded = {name: build_codec(name) if name in presets() else load_codec(name) for name in codecs}
    results = run(loaded, data, protocol, progress=progress)
    out = Path(out)
    write_text(out / "samples.csv", results.to_csv())
    results.report().write(out / "report.html")
    write_results(out / "results.json", **results.to_dict())
    results.check()
    return results


def make_sample(key: str, item: Item) -> Sample:
    """A sample of an item that is at hand."""
    return Sample(key, modality_of(item), lambda: item)


def read_samples(data: str | Path) -> list[Sample]:
    """Pictures, sounds and films of shards, or of a folder without shards, in order.

    Every media file of a shard's sample is a sample of its own, named "key.extension".

    Raises:
        ValueError: nothing is found, or a shard is damaged.
    """
    folder = Path(data)
    samples = []
    if folder.is_dir() and not any(folder.glob("*.tar")):
        for path in sorted(folder.rglob("*")):
            modality = _modality(path.suffix[1:].lower())
            if modality is not None and path.is_file():
                key = path.relative_to(folder).as_posix()
                samples.append(Sample(key, modality, _file_loader(path)))
    else:
        for shard in expand(data):
            for sample in ShardReader(shard):
                for extension in sample.members:
                    modality = _modality(extension.rpartition(".")[2])
                    if modality is not None:
                        load = _member_loader(sample, extension)
                        samples.append(Sample(f"{sample.key}.{extension}", modality, load))
    if not samples:
        raise ValueError(f"{data}: holds no picture, sound or film; give shards or a folder")
    return samples


def _file_loader(path: Path) -> Callable[[], Item]:
    return lambda: decode(path.suffix[1:].lower(), path.read_bytes(), str(path))


def _member_loader(sample: ShardSample, extension: str) -> Callable[[], Item]:
    return lambda: decode(extension, sample[extension], sample.where)


def _modality(extension: str) -> str | None:
    kinds = {"image": PICTURES, "audio": SOUNDS, "video": FILMS}
    return next((modality for modality, known in kinds.items() if extension in known), None)


def _limited(samples: Iterable[Sample], limit: int | None) -> list[Sample]:
    seen: Counter[str] = Counter()
    kept = []
    for sample in samples:
        seen[sample.modality] += 1
        if limit is None or seen[sample.modality] <= limit:
            kept.append(sample)
    return kept


def _served(name: str, codec: Codec, samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """The samples of each modality that a codec serves; pictures also serve semantic codecs."""
    served: dict[str, list[Sample]] = {}
    for modality in codec.modalities:
        wanted = ("image", "semantic") if modality == "semantic" else (modality,)
        group = [sample for sample in samples if sample.modality in wanted]
        if group:
            served[modality] = group
    if not served:
        there = ", ".join(sorted({sample.modality for sample in samples})) or "nothing"
        raise ValueError(
            f"{name}: serves {' and '.join(codec.modalities)}, but the data holds {there}"
        )
    return served


class _Bench:
    """One codec on one modality."""

    def __init__(self, name: str, codec: Codec, modality: str, protocol: Protocol) -> None:
        self.name, self.codec, self.modality, self.protocol = name, codec.eval(), modality, protocol
        self.rows: list[Row] = []
        self.failures: list[Failure] = []
        self.examples: list[Example] = []
        self.codes: list[Tensor] = []
        self.first_call_seconds: float | None = None

    def add(self, sample: Sample) -> None:
        """Code and measure one sample, or note why that failed."""
        try:
            signal = prepare(sample.load(), self.codec, self.protocol)[None]
            if self.first_call_seconds is None:
                _, _, *seconds = self._pass(signal)
                self.first_call_seconds = sum(seconds)
            codes, made, encoding, decoding = self._pass(signal)
            values = metrics.measure(self.modality, made, signal, codes, self.codec)
        except (ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.failures.append(Failure(self.name, self.modality, sample.key, reason))
            return
        amount = float(signal[0, 0].numel())
        if self.codec.sample_rate is not None:
            amount /= self.codec.sample_rate
        tokens = int((codes >= 0).sum())
        place = (self.name, self.modality, sample.key)
        self.rows.append(Row(*place, tokens, amount, encoding, decoding, values))
        self.codes.append(codes)
        if len(self.examples) < self.protocol.examples:
            shown = [signal_item(self.modality, x[0].cpu(), self.codec) for x in (signal, made)]
            self.examples.append(Example(*place, shown[0], shown[1], codes[0]))

    @torch.no_grad()
    def _pass(self, signal: Tensor) -> tuple[Tensor, Tensor, float, float]:
        """Codes, reconstruction, and the seconds that either took."""
        device = next((p.device for p in self.codec.parameters()), torch.device("cpu"))
        given = signal.to(device)
        begun = _now(device)
        codes = self.codec.encode(given)
        coded = _now(device)
        made = self.codec.decode(codes, size=tuple(signal.shape[2:]))
        done = _now(device)
        return codes.cpu(), made.float().cpu(), coded - begun, done - coded

    def summary(self) -> Summary:
        """Figures over all samples; no means where every sample failed."""
        measured: dict[str, list[float]] = {}
        undefined: dict[str, int] = {}
        for measure in metrics.OF_MODALITY[self.modality]:
            values = [row.values[measure] for row in self.rows]
            measured[measure] = [value for value in values if not math.isnan(value)]
            undefined[measure] = len(values) - len(measured[measure])
        seed, count = self.protocol.seed, len(self.rows)
        usage = metrics.usage(self.codes, self.codec.codebook_size) if count else None
        unit = 1.0 if self.modality == "audio" else 1e6
        amount = sum(row.amount for row in self.rows) / unit
        return Summary(
            codec=self.name,
            modality=self.modality,
            samples=count,
            failed=len(self.failures),
            means={m: bootstrap_mean(v, seed=seed) for m, v in measured.items() if v},
            undefined={m: n for m, n in undefined.items() if n},
            tokens=sum(row.tokens for row in self.rows) / max(1, count),
            usage=usage.usage.tolist() if usage else [],
            perplexity=usage.perplexity.tolist() if usage else [],
            entropy=usage.entropy.tolist() if usage else [],
            encode_speed=amount / max(1e-9, sum(row.encode_seconds for row in self.rows)),
            decode_speed=amount / max(1e-9, sum(row.decode_seconds for row in self.rows)),
            first_call_seconds=self.first_call_seconds,
        )


def prepare(item: Item, codec: Codec, protocol: Protocol) -> Tensor:
    """An item -> float (C, *signal) in [-1, 1], cut and resized as the protocol says.

    Raises:
        ValueError: the item is nothing that a codec takes.
    """
    if isinstance(item, Audio):
        if protocol.max_seconds is not None:
            kept = item.samples[:, : round(protocol.max_seconds * item.sample_rate)]
            item = Audio(kept, item.sample_rate)
        return audio_signal(item, codec)
    if isinstance(item, Video):
        if protocol.max_frames is not None:
            item = Video(item.frames[: protocol.max_frames], item.fps)
        return _square(video_signal(item, codec), protocol.max_side)
    picture = item.image if isinstance(item, Semantic) else item
    if modality_of(picture) != "image":
        raise ValueError(
            f"a benchmark takes pictures, sounds and films, not {modality_of(picture)}"
        )
    return _square(image_signal(picture, codec), protocol.max_side)  # type: ignore[arg-type]


def _square(signal: Tensor, side: int | None) -> Tensor:
    """Reduce (C, [T,] H, W) to a shorter side of `side` and crop the middle; smaller ones stay."""
    height, width = signal.shape[-2:]
    if side is None or min(height, width) <= side:
        return signal
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    frames = signal.reshape(1, -1, height, width)
    reduced = F.interpolate(frames, size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return reduced[0, :, top : top + side, left : left + side].reshape(
        *signal.shape[:-2], side, side
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _card(example: Example) -> Card:
    """Original, reconstruction, and for pictures the error and the codes of the first level."""
    original, made = _picture(example.original), _picture(example.reconstruction)
    parts = [Part("original", original), Part("reconstruction", made)]
    if isinstance(original, Image.Image) and isinstance(made, Image.Image):
        parts.append(Part("error", error_map(made, original)))
    if example.modality == "image":
        parts.append(Part("codes", token_grid(example.codes[0], cell=8)))
    elif example.modality == "audio":
        parts.append(Part("codes, by level", token_grid(example.codes[:, :96], cell=8)))
    return Card(parts, example.key)


def _picture(item: Item) -> Item:
    """What a card shows: a semantic item's picture, the beginning of a sound."""
    if isinstance(item, Audio):
        return Audio(item.samples[:, : round(_SHOWN_SECONDS * item.sample_rate)], item.sample_rate)
    return item.image if isinstance(item, Semantic) else item


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
