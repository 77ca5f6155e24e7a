"""Rate-distortion curves: a line for each classical codec, a point for each learned one."""

from __future__ import annotations

from collections import defaultdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from unimm.evaluation.figures import SERIES_COLOURS, line_chart
from unimm.evaluation.metrics import MEASURES
from unimm.evaluation.reconstruction.tables import KEY_MEASURE, rate_of
from unimm.evaluation.report_parts import CHART_STYLE
from unimm_tokenizers.storage import write_text

if TYPE_CHECKING:
    from unimm.evaluation.reconstruction.results import Results


_STYLE = CHART_STYLE.replace(":root", ".unimm-plot")  # a notebook keeps its own colours


class Plot(NamedTuple):
    """A chart as SVG text, with what its curves are called."""

    title: str
    svg: str
    names: tuple[str, ...]

    def _repr_html_(self) -> str:
        keys = "".join(
            f'<li><i style="background:var(--s{number})"></i>{escape(name)}</li>'
            for number, name in enumerate(self.names, start=1)
        )
        return (
            f'<div class="unimm-plot"><style>{_STYLE}</style><h4>{escape(self.title)}</h4>'
            f'<ul class="legend">{keys}</ul>{self.svg}</div>'
        )

    def save(self, path: str | Path) -> None:
        """Write an HTML page that holds the plot alone."""
        write_text(
            path,
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            f"<title>{escape(self.title)}</title></head><body>{self._repr_html_()}</body></html>\n",
        )


def rate_plot(results: Results, modality: str, measure: str | None = None) -> Plot:
    """Mean of a measure over the mean rate, logarithmic; at most ten curves, learned codecs first.

    Raises:
        ValueError: nothing of that was measured.
    """
    measure = measure or KEY_MEASURE.get(modality, "psnr")
    rate = rate_of(modality)
    learned: dict[str, list[tuple[float, float]]] = defaultdict(list)
    classical: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for summary in results.summaries:
        if (
            summary.modality != modality
            or measure not in summary.means
            or rate not in summary.means
        ):
            continue
        point = (summary.means[rate].value, summary.means[measure].value)
        if not summary.classical:
            learned[summary.codec].append(point)
        elif "@" not in summary.codec:  # those that match a rate would zigzag along the curve
            classical[summary.codec.partition(":")[0]].append(point)
    series = {name: sorted(points) for name, points in [*learned.items(), *classical.items()]}
    shown = dict(list(series.items())[:SERIES_COLOURS])
    if not shown:
        raise ValueError(f"plot: {measure} of {modality} was not measured")
    labels = (MEASURES[rate].label, MEASURES[measure].label)
    better = "higher" if MEASURES[measure].more_is_better else "lower"
    svg = line_chart(shown, x_label=labels[0], y_label=labels[1], log_x=True, markers=True)
    return Plot(f"{modality}: {labels[1]} over {labels[0]} ({better} is better)", svg, tuple(shown))
