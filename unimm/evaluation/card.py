"""The card of a bundle: what it is, what made it, what it reached, how to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unimm.evaluation.accuracy import DirectionResult
from unimm.evaluation.recipe import Recipe
from unimm.evaluation.report import environment
from unimm.evaluation.worlds import Judged
from unimm.model import UnifiedLM
from unimm.tokenizer import UnifiedTokenizer

CARD_FILE = "README.md"


def bundle_card(
    recipe: Recipe,
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    results: Sequence[DirectionResult],
    judged: Judged,
    seconds: Mapping[str, float],
) -> str:
    """Markdown with the metadata that the Hub reads."""
    name = recipe.folder.name
    codecs = [
        f"| {modality} | `{codec.name}` | {codec.num_codebooks} x {codec.codebook_size:,} | "
        f"{sum(p.numel() for p in codec.parameters()) / 1e6:.2f} M |"
        for modality, codec in tok.codecs.items()
        if codec.modality == modality
    ]
    reached = [
        f"| {result.direction.name} | {result.share.value:.1%} | {result.share.low:.1%} to "
        f"{result.share.high:.1%} | {result.share.total} |"
        for result in results
    ]
    return "\n".join(
        [
            "---",
            "library_name: unimm",
            f"license: {recipe.licence}",
            "pipeline_tag: any-to-any",
            "---",
            f"# {recipe.title}",
            "",
            f"Modalities: {', '.join(tok.vocabulary.modalities)}. Decoder of "
            f"{lm.num_parameters / 1e6:.2f} M parameters over {len(tok.vocabulary):,} ids "
            f"(vocabulary {tok.vocabulary.fingerprint[:12]}). Weights in half precision.",
            "",
            f"Data: {recipe.data}",
            "",
            "| modality | codec | codes | parameters |",
            "|---|---|---|---|",
            *codecs,
            "",
            "## What it reaches",
            "",
            "Share of answers that a judge reads as what was asked for, on unseen prompts.",
            "",
            "| direction | accuracy | 95% interval | prompts |",
            "|---|---|---|---|",
            *reached,
            "",
            "The judges themselves, on real items that they have not seen: "
            + "; ".join(f"{modality} {value:.2%}" for modality, value in judged.accuracy.items())
            + ".",
            "",
            "Wall time: "
            + "; ".join(f"{step} {value:.0f} s" for step, value in seconds.items())
            + f". Machine: {'; '.join(f'{k} {v}' for k, v in environment().items())}.",
            "",
            "## Make it again",
            "",
            f"`unimm run {name} --out DIR"
            + (" --data FOLDER" if recipe.world == "digits" else "")
            + "`; the files are those of `recipes/"
            + name
            + "`.",
            "",
        ]
    )
