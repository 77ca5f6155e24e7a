"""The tables of a benchmark: quality, tokens and speed, exactness, predictability, comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from unimm.evaluation.metrics import MEASURES
from unimm.evaluation.report_parts import Cell

if TYPE_CHECKING:
    from unimm.evaluation.reconstruction.results import Results, Summary

KEY_MEASURE = {"image": "psnr", "semantic": "psnr", "video": "psnr", "audio": "mel_distance"}


class Table(NamedTuple):
    """Columns and rows with a title."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]


def rate_of(modality: str) -> str:
    """The measure that is a modality's rate."""
    return "kbps" if modality == "audio" else "bits_per_pixel"


def tables(results: Results) -> Iterator[Table]:
    """Every table, modality by modality."""
    for modality in results.modalities:
        group = [s for s in results.summaries if s.modality == modality]
        learned = [s for s in group if not s.classical]
        yield _quality(modality, group)
        yield _cost(modality, group)
        if any(s.exactness for s in group):
            yield _exactness(modality, group)
        if any(s.predictability for s in learned):
            yield _predictability(modality, learned)
        against = _comparisons(results, modality, group)
        if against.rows:
            yield against


def _quality(modality: str, group: Sequence[Summary]) -> Table:
    rate = rate_of(modality)
    found = {name for s in group for name in (*s.means, *s.whole)}
    measures = [name for name in MEASURES if name in found and name != rate]
    columns = ["codec", "samples", "failed", MEASURES[rate].label]
    rows: list[list[Cell]] = [
        [s.codec, s.samples, s.failed, s.means.get(rate)]
        + [s.means.get(name) or s.whole.get(name) for name in measures]
        for s in group
    ]
    return Table(
        f"{modality}: quality", columns + [MEASURES[name].label for name in measures], rows
    )


def _cost(modality: str, group: Sequence[Summary]) -> Table:
    sound = modality == "audio"
    unit, speed = ("second", "x real time") if sound else ("pixel", "Mpixel/s")
    columns = [
        "codec",
        f"tokens per {unit}",
        "codes used, %",
        "perplexity",
        "bits per code",
        f"{MEASURES[rate_of(modality)].label} after entropy coding",
        f"encode, {speed}",
        f"decode, {speed}",
        "encode, ms",
        "decode, ms",
        "latency, ms",
        "peak memory, MiB",
        "first call, s",
    ]
    rows: list[list[Cell]] = []
    for s in group:
        row: list[Cell] = [s.codec, s.token_rate, 100 * _mean(s.usage), _mean(s.perplexity)]
        row += [_mean(s.entropy), s.coded_rate, s.encode_speed, s.decode_speed, s.encode_ms]
        rows.append([*row, s.decode_ms, s.latency_ms, s.peak_mib, s.first_call_seconds])
    return Table(f"{modality}: tokens, speed and memory", columns, rows)


def _exactness(modality: str, group: Sequence[Summary]) -> Table:
    names = ("deterministic", "batch", "stream", "tiled", "idempotent", "bfloat16")
    labels = (
        "same twice, %",
        "batch = single, %",
        "stream = whole, %",
        "tiled = whole, %",
        "coded again, %",
        "bfloat16 = float32, %",
    )
    columns = ["codec", *labels, "largest difference of signals", "seams", "failed"]
    rows: list[list[Cell]] = []
    for s in group:
        if s.exactness is None:
            continue
        shares = [getattr(s.exactness, name) for name in names]
        kinds = ("deterministic", "batch", "stream", "tiled")
        errors = [getattr(s.exactness, f"{kind}_signal") for kind in kinds]
        known = [error for error in errors if error is not None]
        percent: list[Cell] = [None if share is None else 100 * share for share in shares]
        largest = max(known) if known else None
        rows.append([s.codec, *percent, largest, s.exactness.seams, s.exactness.wrong])
    used = [i for i in range(len(columns)) if any(row[i] not in (None, "") for row in rows)]
    return Table(
        f"{modality}: exactness, share of equal codes",
        [columns[i] for i in used],
        [[row[i] for i in used] for row in rows],
    )


def _predictability(modality: str, group: Sequence[Summary]) -> Table:
    unit = "kbit/s" if modality == "audio" else "bits per pixel"
    scale = 1000 if modality == "audio" else 1
    columns = [
        "codec",
        "entropy, bits per code",
        "told by the code before, bits",
        "told by the level below, bits",
        "n-gram, bits per code",
        f"n-gram, {unit}",
        "transformer, bits per code",
        f"transformer, {unit}",
    ]
    rows: list[list[Cell]] = []
    for s in group:
        p = s.predictability
        if p is None:
            continue
        below = _mean(p.mutual_below[1:]) if len(p.mutual_below) > 1 else None
        row: list[Cell] = [s.codec, _mean(p.entropy), _mean(p.mutual_before), below]
        for bits in (p.ngram, p.transformer):
            row += [bits, None if bits is None else bits * s.token_rate / scale]
        rows.append(row)
    return Table(f"{modality}: how predictable the codes are", columns, rows)


def _comparisons(results: Results, modality: str, group: Sequence[Summary]) -> Table:
    """Learned codecs against the classical ones that were set to a rate."""
    measures = [m for m in (KEY_MEASURE[modality], "ms_ssim", "stft_distance") if m in MEASURES]
    columns = ["codec", "against", "rate", "rate against"]
    measures = [m for m in measures if all(m in s.means for s in group if s.samples)]
    columns += [f"difference of {MEASURES[m].label}" for m in measures]
    rows: list[list[Cell]] = []
    rate = rate_of(modality)
    matched = [s for s in group if s.classical and "@" in s.codec and s.samples]
    for mine in (s for s in group if not s.classical and s.samples):
        for other in matched:
            if not math.isclose(
                mine.means[rate].value, float(other.codec.split("@")[1]), rel_tol=0.02
            ):
                continue
            row: list[Cell] = [mine.codec, other.codec]
            row += [mine.means[rate].value, other.means[rate].value]
            row += [results.compare(mine.codec, other.codec, m, modality) for m in measures]
            rows.append(row)
    return Table(f"{modality}: against classical codecs at the same rate", columns, rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
