"""Cards of what stands in a folder: its parts, what they reached, how to make them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unimm.checkpoint import (
    CARD_FILE,
    INDEX_FILE,
    Card,
    markdown_table,
    reopen,
    scores_of,
    seal,
    verify,
)
from unimm.evaluation.accuracy import DirectionResult
from unimm.evaluation.inspection import inspect
from unimm.evaluation.recipe import Recipe
from unimm.evaluation.report import environment
from unimm.evaluation.worlds import Judged

# What the Hub calls the task of a codec by itself.
_TASKS = {"image": "image-to-image", "audio": "audio-to-audio", "video": "video-to-video"}


def folder_card(folder: str | Path) -> Card:
    """The card of a bundle or a codec, with what its files say and nothing else.

    Raises:
        ValueError: it is neither, or damaged.
    """
    found = inspect(folder)
    if found.kind not in ("bundle", "codec"):
        raise ValueError(f"{folder}: holds a {found.kind}: only bundles and codecs have cards")
    data, facts = found.data(), {}
    codecs = data["codecs"] if found.kind == "bundle" else [data]
    lm = data.get("language_model")
    if data.get("vocabulary"):
        vocabulary = data["vocabulary"]
        facts["modalities"] = ", ".join(vocabulary["modalities"])
        facts["vocabulary"] = f"{vocabulary['ids']:,} ids, {vocabulary['fingerprint'][:12]}"
    if lm:
        facts["decoder"] = f"{lm['layers']} layers of width {lm['width']}, {_weights(lm)}"
    for codec in codecs:
        facts[f"{codec['modalities'][0]} codec"] = _codec(codec)
    alone = codecs[0]["modalities"][0] if len(codecs) == 1 else ""
    task = "any-to-any" if lm else _TASKS.get(alone)
    return Card(title=Path(folder).resolve().name, facts=facts, task=task)


def write_card(
    folder: str | Path,
    *,
    title: str | None = None,
    licence: str | None = None,
    data: str | None = None,
    results: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """`unimm card`: write the card of a bundle or a codec; a sealed folder is sealed again.

    Args:
        folder: a bundle or a codec on this machine.
        title: heading; None: the folder's name.
        licence: an SPDX name in small letters, or "other"; None is said to be unknown.
        data: what it was trained on; None is said not to be stated.
        results: `results.json` of `unimm bench`, or its folder: the table of reconstruction.
        overwrite: replace a card that is there.

    Returns:
        The card's path.

    Raises:
        ValueError: there is no such folder, a file of it was changed since it was sealed, a card is
            there already, or the results are none of the benchmark's.
    """
    folder = Path(folder)
    path = folder / CARD_FILE
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name a bundle or a codec on this machine")
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: a card is there already; --overwrite replaces it")
    verify(folder)
    known: dict[str, Any] = {"title": title, "licence": licence, "data": data}
    card = replace(folder_card(folder), **{k: v for k, v in known.items() if v is not None})
    if results is not None:
        card = replace(card, scores=scores_of(results))
    sealed = (folder / INDEX_FILE).exists()
    reopen(folder)
    card.write(folder)
    if sealed:
        seal(folder)
    return path


def bundle_card(
    bundle: Path,
    recipe: Recipe,
    results: Sequence[DirectionResult],
    judged: Judged,
    seconds: Mapping[str, float],
) -> Card:
    """The card of a bundle that a recipe has made, with what it reaches."""
    name = recipe.folder.name
    reached = [
        (
            result.direction.name,
            f"{result.share.value:.1%}",
            f"{result.share.low:.1%} to {result.share.high:.1%}",
            str(result.share.total),
        )
        for result in results
    ]
    judges = "; ".join(f"{modality} {value:.2%}" for modality, value in judged.accuracy.items())
    times = "; ".join(f"{step} {value:.0f} s" for step, value in seconds.items())
    machine = "; ".join(f"{key} {value}" for key, value in environment().items())
    folder = " --data FOLDER" if recipe.world == "digits" else ""
    sections = {
        "What it reaches": [
            "Share of answers that a judge reads as what was asked for, on unseen prompts.",
            "",
            *markdown_table(("direction", "accuracy", "95% interval", "prompts"), reached),
            f"The judges themselves, on real items that they have not seen: {judges}.",
            "",
            f"Wall time: {times}. Machine: {machine}.",
        ],
        "Make it again": [
            f"`unimm run {name} --out DIR{folder}`; the files are those of `recipes/{name}`."
        ],
    }
    return replace(
        folder_card(bundle),
        title=recipe.title or name,
        licence=recipe.licence,
        data=recipe.data or "not stated",
        sections=sections,
    )


def _codec(data: Mapping[str, Any]) -> str:
    rates = [
        f"{data[name]:.3g} {name.replace('_', ' ')}"
        for name in ("bits_per_code", "bits_per_pixel", "bits_per_pixel_of_film")
        if name in data
    ]
    if "bit_rate" in data:
        rates.append(f"{data['bit_rate'] / 1000:.3g} kbit/s")
    codes = f"{data['codebooks']} x {data['codebook_size']:,} codes"
    return ", ".join([f"`{data['class']}`", codes, *rates, _weights(data)])


def _weights(data: Mapping[str, Any]) -> str:
    floating = [name for name in data["weights"]["types"] if "F" in name]  # not masks
    return f"{data['parameters'] / 1e6:.2f} M parameters, {', '.join(floating)}"
