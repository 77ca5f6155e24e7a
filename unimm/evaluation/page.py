"""The page of a judged bundle: what it reached, what it wrote, how its codecs see the world."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from unimm.data.dialpad import Scene
from unimm.evaluation.accuracy import DirectionResult
from unimm.evaluation.figures import (
    contact_sheet,
    error_map,
    film_strip,
    png_bytes,
    spectrogram,
    token_grid,
)
from unimm.evaluation.report import Report, environment
from unimm.evaluation.report_parts import Card, Part, Tile, duration
from unimm.evaluation.worlds import Judged
from unimm.signals import Audio, Item, Semantic, Video
from unimm.tokenizer import UnifiedTokenizer
from unimm_tokenizers.storage import replacing

REPORT_FILE = "report.html"
ANSWERS_FILE = "answers.png"
SHOWN = 6
Curve: TypeAlias = "list[tuple[float, float]]"


def write_page(
    out: Path,
    tok: UnifiedTokenizer,
    results: Sequence[DirectionResult],
    judged: Judged,
    scenes: Sequence[Scene],
    seconds: Mapping[str, float],
) -> Path:
    """Write `report.html` into `out`; the runs beside it, if any, give its curves."""
    page = Report(
        f"unimm: {', '.join(tok.vocabulary.modalities)} in one sequence",
        "Words, pictures, sounds and films become ids of one vocabulary; one decoder continues "
        "them in any direction. Every answer below was read by a judge.",
    )
    page.tiles(_tiles(results, seconds))
    page.section("Any to any", "Share of answers that a judge read as what was asked for.")
    page.accuracies(results)
    page.table(
        "The judges themselves",
        ["judge of", "accuracy on real items it has not seen"],
        [[modality, f"{value:.2%}"] for modality, value in judged.accuracy.items()],
    )
    page.section("What it wrote", "Prompts and answers, chosen before anything was judged.")
    for result in results:
        page.direction(result)
    page.section("Codecs", "Original, reconstruction from the codes alone, and the codes.")
    for modality, cards in _reconstructions(tok, scenes[:SHOWN]):
        page.gallery(modality, cards)
    curves = list(_curves(out))
    if curves:
        page.section("Training")
        for name, series in curves:
            page.curve(name, series, y_label="loss", log_y=True)
    page.section("How it was made")
    if seconds:
        page.seconds("Wall time", seconds)
    blocks = {block.name: f"{block.start} to {block.end - 1}" for block in tok.vocabulary}
    page.facts("Vocabulary", blocks)
    page.facts("Environment", environment())
    return page.write(out / REPORT_FILE)


def _tiles(results: Sequence[DirectionResult], seconds: Mapping[str, float]) -> list[Tile]:
    judged = [result for result in results if result.reached is not None]
    met = sum(bool(result.reached) for result in judged)
    tiles = [Tile("answers judged", f"{sum(result.share.total for result in results):,}")]
    if judged:
        goals = Tile("goals met", f"{met} of {len(judged)}", good=met == len(judged))
        tiles.insert(0, goals)
    if seconds:
        tiles.append(Tile("wall time", duration(sum(seconds.values()))))
    return tiles


def _reconstructions(
    tok: UnifiedTokenizer, scenes: Sequence[Scene]
) -> Iterator[tuple[str, list[Card]]]:
    """A row of cards for each modality that has a codec."""
    for modality in tok.vocabulary.modalities[1:]:
        items = [_item(modality, scene) for scene in scenes]
        segments = tok.encode_items(items)
        made = map(_shown, tok.decode_segments(segments))
        cards = []
        for original, segment, again in zip(map(_shown, items), segments, made, strict=True):
            codes = segment.codes if segment.codes.ndim > 1 else segment.codes[None]
            grid = codes[0] if codes.ndim == 3 else codes.flatten(0, -2)
            pair = [Part("original", original), Part("from codes", again)]
            parts = [*pair, *_compared(original, again), Part("codes", token_grid(grid))]
            cards.append(Card(parts, f"{codes.numel()} ids"))
        yield modality, cards


def _item(modality: str, scene: Scene) -> Item:
    return {
        "image": scene.image,
        "audio": scene.audio,
        "video": scene.video,
        "semantic": Semantic(scene.image),
    }[modality]


def _shown(item: Item) -> Item:
    return item.image if isinstance(item, Semantic) else item


def _compared(original: Item, made: Item) -> list[Part]:
    """What shows the difference of two items of one kind."""
    if isinstance(original, Audio) and isinstance(made, Audio):
        pair = (("spectrogram", original), ("of the codes", made))
        return [Part(name, spectrogram(sound)) for name, sound in pair]
    if isinstance(original, Video) and isinstance(made, Video):
        return [Part("frames", film_strip(original)), Part("from codes", film_strip(made))]
    assert isinstance(original, Image.Image)
    assert isinstance(made, Image.Image)
    same = made.crop((0, 0, *original.size))  # codes are whole blocks of pixels
    return [Part("error", error_map(same, original))]


def _curves(out: Path) -> Iterator[tuple[str, dict[str, Curve]]]:
    """Loss curves of the runs in `out`, from their CSV logs."""
    for log in sorted(out.glob("*/logs/metrics.csv")):
        series: dict[str, Curve] = {}
        with log.open(newline="") as file:
            for row in csv.DictReader(file):
                for key in ("train/loss", "val/loss"):
                    if row.get(key):
                        series.setdefault(key, []).append((float(row["step"]), float(row[key])))
        if series:
            yield log.parent.parent.name, series


def write_answers(out: Path, results: Sequence[DirectionResult]) -> Path | None:
    """Write `answers.png` into `out`: a row of answers for every direction that has pictures.

    Pictures as they are, films as their frames, sounds as spectrograms.
    """
    rows = []
    for result in results:
        items = [example.item for example in result.examples if example.item is not None]
        drawn = [picture for item in items if (picture := _drawn(item)) is not None]
        if drawn:
            per_row = SHOWN // 3 if result.direction.target == "video" else 2 * SHOWN
            rows.append(contact_sheet(drawn[:per_row], columns=per_row))
    if not rows:
        return None
    path = out / ANSWERS_FILE
    with replacing(path) as temporary:
        temporary.write_bytes(png_bytes(contact_sheet(rows, columns=1, scale=2)))
    return path


def _drawn(item: Item) -> Image.Image | None:
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, Semantic):
        return item.image
    if isinstance(item, Video):
        return film_strip(item)
    return spectrogram(item, bands=32, columns=32) if isinstance(item, Audio) else None
