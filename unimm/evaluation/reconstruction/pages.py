"""The page of a benchmark: curves, tables, what codecs made of the same samples, protocol."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from PIL import Image

from unimm.evaluation.figures import error_map, region_overlay, token_grid
from unimm.evaluation.metrics import MEASURES
from unimm.evaluation.reconstruction.plots import rate_plot
from unimm.evaluation.reconstruction.results import Example, Failure, Results
from unimm.evaluation.reconstruction.tables import KEY_MEASURE, Table, tables
from unimm.evaluation.report import Card, Part, Report
from unimm.evaluation.report_parts import render_card
from unimm.signals import Audio, Item, Semantic

_SHOWN_SECONDS = 3.0  # of sounds
_BUDGET = 7_500_000  # characters of all examples together: the page keeps under 10 MB
_SECOND = {"image": "ms_ssim", "audio": "stft_distance", "video": "motion_psnr"}


def report(results: Results) -> Report:
    """Figures, examples, failures, protocol and machine, as a page that opens offline."""
    page = Report("Reconstruction benchmark", "What codecs keep of real signals, and at what rate.")
    page.section(
        "Rate and distortion",
        "Lines: classical codecs over their settings. Points: learned codecs. Rates are bits at "
        "fixed length; of classical codecs every byte of the file.",
    )
    for modality in results.modalities:
        for measure in (KEY_MEASURE[modality], _SECOND.get(modality)):
            measured = [s for s in results.summaries if s.modality == modality]
            if measure is not None and any(measure in s.means for s in measured):
                plot = rate_plot(results, modality, measure)
                page.chart(plot.title, plot.svg, plot.names)
    page.section("Figures", "Means over samples with 95% bootstrap intervals; heads sort.")
    for table in tables(results):
        page.table(
            table.title, table.columns, table.rows, _undefined(results, table), sortable=True
        )
    if results.skipped:
        rows = [[MEASURES[name].label, why] for name, why in results.skipped.items()]
        page.table("Skipped", ["measure", "why"], rows)
    _examples(page, results)
    if results.failures:
        page.section("Failures", "These samples count in no mean.")
        page.table("", list(Failure._fields), results.failures)
    page.section("Protocol")
    page.facts("Protocol", results.protocol.to_dict())
    page.facts("Machine", results.environment)
    hashes = {f"{s.codec}, {s.modality}": s.weights[:16] for s in results.summaries}
    page.facts("sha256 of weights", hashes)
    kinds = {s.modality: s.reference[:16] for s in results.summaries}
    page.facts("sha256 of references", kinds)
    return page


def _undefined(results: Results, table: Table) -> str:
    """Which measures of a table of quality leave samples out, and of which codecs."""
    left_out: dict[tuple[str, int], list[str]] = {}
    group = [s for s in results.summaries if table.title == f"{s.modality}: quality"]
    for summary in group:
        for measure, count in summary.undefined.items():
            left_out.setdefault((measure, count), []).append(summary.codec)
    return " ".join(
        f"{MEASURES[measure].label} is not defined for {count} samples"
        + (f" of {', '.join(names)}." if len(names) < len(group) else ".")
        for (measure, count), names in left_out.items()
    )


def _examples(page: Report, results: Results) -> None:
    """A card per sample; as many as the page has room for, of every modality in turn."""
    queues = [list(_cards(results, modality)) for modality in results.modalities]
    every = [pair for turn in zip_longest(*queues) for pair in turn if pair is not None]
    shown: dict[str, list[Card]] = {}
    room = _BUDGET
    for modality, card in every:
        size = len(render_card(card))
        if size <= room:
            room -= size
            shown.setdefault(modality, []).append(card)
    if not shown:
        return
    count = sum(map(len, shown.values()))
    left_out = "" if count == len(every) else f" {count} of {len(every)} samples have room here."
    page.section(
        "Examples",
        "The first samples: as given, and decoded from their codes alone. Errors are brightest "
        f"at 64 of 255 and above; among the codes, every colour is one code.{left_out}",
    )
    for modality, cards in shown.items():
        page.gallery(modality, cards)


def _cards(results: Results, modality: str) -> Iterator[tuple[str, Card]]:
    """One card for each sample: the original, and what every chosen codec made of it."""
    learned = {s.codec for s in results.summaries if not s.classical}
    samples: dict[str, list[Example]] = {}
    for example in results.examples:
        # Of classical codecs, those at the rate of a learned one; all if there is no learned one.
        chosen = example.codec in learned or "@" in example.codec or not learned
        if chosen and example.modality == modality:
            samples.setdefault(example.key, []).append(example)
    for key, group in samples.items():
        parts = [Part("original", _shown(group[0].original))]
        for example in group:
            parts += _parts(example)
        yield modality, Card(parts, key)


def _parts(example: Example) -> Iterator[Part]:
    original, made = _shown(example.original), _shown(example.reconstruction)
    yield Part(f"{example.codec}: {example.note}", made)
    if isinstance(original, Image.Image) and isinstance(made, Image.Image):
        yield Part("error", error_map(made, original))
        if example.regions is not None:
            yield Part("regions", region_overlay(original, example.regions))
    if example.modality == "image" and example.codes.ndim == 3:
        yield Part("codes", token_grid(example.codes[0], cell=8))
    elif example.modality == "audio" and example.codes.shape[0] > 1:
        yield Part("codes, by level", token_grid(example.codes[:, :96], cell=8))


def _shown(item: Item) -> Item:
    """What a card shows: the beginning of a sound, a semantic item's picture."""
    if isinstance(item, Audio):
        return Audio(item.samples[:, : round(_SHOWN_SECONDS * item.sample_rate)], item.sample_rate)
    return item.image if isinstance(item, Semantic) else item
