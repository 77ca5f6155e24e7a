"""The reconstruction benchmark: what codecs keep of real signals, under one recorded protocol.

    results = run({"mine": codec}, "photos/", Protocol(max_side=256))
    results.table()                    Markdown, or HTML by itself in a notebook
    results.plot()                     rate against distortion
    results.compare("mine", "other", "psnr")
    bench(["shipped", "classical"], ["photos/", "recordings/"], out)

Every sample is coded alone and measured alone: averages are taken once, over samples, with
bootstrap intervals, and a sample that fails is counted and named, never averaged away. Measures are
taken in [-1, 1] (data range 2) against one reference for all codecs. The first call of a codec is
timed apart from the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from unimm.evaluation.reconstruction.names import open_codecs
from unimm.evaluation.reconstruction.pages import report
from unimm.evaluation.reconstruction.protocol import Protocol, given, reference, taken
from unimm.evaluation.reconstruction.results import (
    Example,
    Failure,
    Results,
    Row,
    Summary,
    combined,
    read_results,
)
from unimm.evaluation.reconstruction.runner import run
from unimm.evaluation.reconstruction.samples import (
    Data,
    Sample,
    gather,
    make_sample,
    read_samples,
)
from unimm.evaluation.reconstruction.weights import WeightFile, read_weights

__all__ = [
    "Example",
    "Failure",
    "Protocol",
    "Results",
    "Row",
    "Sample",
    "Summary",
    "WeightFile",
    "bench",
    "combined",
    "given",
    "make_sample",
    "read_results",
    "read_samples",
    "read_weights",
    "reference",
    "report",
    "run",
    "taken",
]


def bench(
    codecs: Sequence[str],
    data: Data,
    out: str | Path,
    protocol: Protocol | None = None,
    *,
    weights: Mapping[str, WeightFile] | None = None,
    progress: bool = False,
) -> Results:
    """Measure codecs by name; write `results.json`, `results.md`, `samples.csv`, `report.html`.

    Args:
        codecs: names; see `names.open_codecs`.
        data: shards or folders; see `read_samples`.
        out: folder of the four files.
        protocol: None takes the defaults.
        weights: name -> local file, for measures by a network.
        progress: draw a bar on the terminal.

    Raises:
        ValueError: a codec or the data is not found, or too many samples failed (after writing).
    """
    protocol = protocol or Protocol()
    samples = gather(data)
    opened = open_codecs(codecs, (sample.modality for sample in samples), protocol)
    results = run(opened, samples, protocol, weights=weights, progress=progress)
    results.save(out)
    report(results).write(Path(out) / "report.html")
    results.check()
    return results
