"""Rate-distortion curves: a line for each classical codec, a point for each learned one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
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

    def __repr__(self) -> str:
        return f"Plot({self.title!r}, {', '.join(self.names)})"

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


class RateCurves(NamedTuple):
    """Curves of mean rate and mean measure: name -> points (rate, value), learned codecs first."""

    rate: str
    measure: str
    series: Mapping[str, Sequence[tuple[float, float]]]


def rate_curves(results: Results, modality: str, measure: str | None = None) -> RateCurves:
    """A point for each learned codec, a line for each classical one, over their mean rates.

    Raises:
        ValueError: nothing of that was measured.
    """
    measure = measure or KEY_MEASURE.get(modality, "psnr")
    rate = rate_of(modality)
    learned: dict[str, list[tuple[float, float]]] = defaultdict(list)
    classical: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for summary in results.summaries:
        if summary.modality != modality or not {measure, rate} <= summary.means.keys():
            continue
        point = (summary.means[rate].value, summary.means[measure].value)
        if not summary.classical:
            learned[summary.codec].append(point)
        elif "@" not in summary.codec:  # those that match a rate would zigzag along the curve
            classical[summary.codec.partition(":")[0]].append(point)
    series = {name: sorted(points) for name, points in [*learned.items(), *classical.items()]}
    if not series:
        raise ValueError(f"plot: {measure} of {modality} was not measured")
    return RateCurves(rate, measure, series)


def rate_plot(results: Results, modality: str, measure: str | None = None) -> Plot:
    """Mean of a measure over the mean rate, logarithmic; at most ten curves, learned codecs first.

    Raises:
        ValueError: nothing of that was measured.
    """
    curves = rate_curves(results, modality, measure)
    shown = dict(list(curves.series.items())[:SERIES_COLOURS])
    x_label, y_label = MEASURES[curves.rate].label, MEASURES[curves.measure].label
    better = "higher" if MEASURES[curves.measure].more_is_better else "lower"
    svg = line_chart(shown, x_label=x_label, y_label=y_label, log_x=True, markers=True)
    return Plot(f"{modality}: {y_label} over {x_label} ({better} is better)", svg, tuple(shown))
