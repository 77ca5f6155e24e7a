"""The reconstruction benchmark on real data, and what the harness itself costs.

    python benchmarks/reconstruction.py --data ../shared/data [--page bench] [--out FOLDER]
    python benchmarks/reconstruction.py --draw bench     only the picture, of results that are there

One command benchmarks every shipped codec and the classical ones on photographs 800 to 899, two
films and eight recordings, and draws docs/images/reconstruction.png. Then a trivial codec sees
1,000 photographs in the weight-free tier, and a shipped one sees 100, so that what the harness does
beside coding and measuring can be told. Every goal is printed with what was asked and reached, as
wall time and as the processor time of all threads: the second is what an idle core takes.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from unimm import load_codec
from unimm.evaluation import metrics
from unimm.evaluation.reconstruction import (
    Protocol,
    Results,
    bench,
    read_results,
    read_samples,
    run,
    runner,
)
from unimm.evaluation.reconstruction.plots import rate_curves
from unimm.signals import Item
from unimm_tokenizers.adapters import FunctionCodec, FunctionConfig
from unimm_tokenizers.storage import write_text

GOALS = {
    ("everything", "wall_seconds"): "< 600",
    ("1,000 photographs", "wall_seconds"): "< 120",
    ("harness", "harness_share_of_coding"): "< 0.05",
    ("page", "megabytes"): "<= 10",
}
QUICK = Protocol(exactness=0, probes=False, examples=0)


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call gives, its wall seconds and its processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    found = call()
    return found, time.perf_counter() - wall, time.process_time() - processor


def trivial() -> FunctionCodec:
    config = FunctionConfig(modality="image", codebook_size=256, num_codebooks=3)
    return FunctionCodec(config, lambda x: ((x + 1) * 127.5).round(), lambda c: c / 127.5 - 1)


def thousand(photos: Path) -> dict[str, float]:
    """The weight-free tier on 1,000 photographs, 900 different ones."""
    samples = read_samples(photos)
    samples += [s._replace(key=f"again-{s.key}") for s in samples[: 1000 - len(samples)]]
    codec = trivial()
    results, wall, processor = timed(lambda: run({"trivial": codec}, samples, QUICK))
    return {"photographs": len(results.rows), "wall_seconds": wall, "processor_seconds": processor}


@contextmanager
def watched(owner: Any, name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Adds up the processor time that a function of a module takes."""
    own = getattr(owner, name)
    seconds[name] = 0.0

    def call(*values: Any) -> Any:
        found, _, processor = timed(lambda: own(*values))
        seconds[name] += processor
        return found

    setattr(owner, name, call)
    yield
    setattr(owner, name, own)


def overhead(photos: Path) -> dict[str, float]:
    """Share of a codec's own time that the harness takes beside coding, reading and measuring.

    On one thread: the processor time of others, which spin while they have nothing to do, would
    count as the harness's.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    codec = load_codec("dialpad/image")
    seconds: dict[str, float] = {"read": 0.0}

    def reading(load: Callable[[], Item]) -> Callable[[], Item]:
        def read() -> Item:
            item, _, processor = timed(load)
            seconds["read"] += processor
            return item

        return read

    samples = [s._replace(load=reading(s.load)) for s in read_samples(photos / "photos-000008.tar")]
    with (
        watched(runner, "code", seconds),
        watched(runner, "reference", seconds),
        watched(metrics, "measure", seconds),
    ):
        _, wall, processor = timed(lambda: run({"dialpad/image": codec}, samples, QUICK))
    torch.set_num_threads(threads)
    rest = processor - sum(seconds.values())
    share = rest / seconds["code"]
    total = {"wall_seconds": wall, "processor_seconds": processor}
    return {**total, **seconds, "harness": rest, "harness_share_of_coding": share}


def everything(data: Path, page: Path, limit: int | None) -> tuple[Results, dict[str, float]]:
    """Every shipped codec and the classical ones on photographs, films and recordings."""
    places = [data / "photos" / "photos-000008.tar", data / "audio", data / "video"]
    split = "photographs 800 to 899, eight recordings, two films"
    protocol = Protocol(split=split, limit=limit)
    names = ["shipped", "classical"]
    results, wall, processor = timed(lambda: bench(names, places, page, protocol, progress=True))
    return results, {"wall_seconds": wall, "processor_seconds": processor}


def draw(results: Results, path: Path) -> None:
    """The key plot, a panel for each modality: lines are classical codecs, stars learned ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    learned = {summary.codec for summary in results.summaries if not summary.classical}
    figure, panels = pyplot.subplots(
        1, len(results.modalities), figsize=(4.2 * len(results.modalities), 3.6), squeeze=False
    )
    for panel, modality in zip(panels[0], results.modalities, strict=True):
        curves = rate_curves(results, modality)
        for name, points in curves.series.items():
            star = name in learned
            style = {"marker": "*" if star else "o", "markersize": 12 if star else 4}
            panel.plot(*zip(*points, strict=True), label=name, linewidth=1.2, **style)
        better = "higher" if metrics.MEASURES[curves.measure].more_is_better else "lower"
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.set_xlabel(metrics.MEASURES[curves.rate].label)
        panel.set_ylabel(f"{metrics.MEASURES[curves.measure].label} ({better} is better)")
        panel.set_title(modality)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--data", type=Path, help="folder with photos, audio and video")
    chosen.add_argument("--draw", type=Path, help="results to draw, and nothing else")
    parser.add_argument("--page", type=Path, default=Path("bench"))
    parser.add_argument("--limit", type=int, help="samples of a modality; all when not given")
    parser.add_argument("--image", type=Path, default=Path("docs/images/reconstruction.png"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    if arguments.draw is not None:
        draw(read_results(arguments.draw), arguments.image)
        return
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    results, whole = everything(arguments.data, arguments.page, arguments.limit)
    draw(results, arguments.image)
    megabytes = (arguments.page / "report.html").stat().st_size / 1e6
    costs = {
        "everything": whole,
        "page": {"examples": len(results.examples), "megabytes": megabytes},
        "1,000 photographs": thousand(arguments.data / "photos"),
        "harness": overhead(arguments.data / "photos"),
    }
    name = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{platform.machine()}"
    )
    head = f"{name}, {torch.get_num_threads()} threads of torch, {load} at the start"
    stem = f"{datetime.now(UTC):%Y-%m-%d}-{name.replace(' ', '-').lower()}-reconstruction"
    content = {"head": head, "costs": costs, **results.to_dict()}
    lines = "".join(
        f"| {what} | {figure} | {value:.4g} | {GOALS.get((what, figure), '')} |\n"
        for what, figures in costs.items()
        for figure, value in figures.items()
    )
    lines = f"| run | figure | reached | asked |\n| --- | --- | --- | --- |\n{lines}"
    text = f"{head}\n\n{lines}\n{results.table()}"
    write_text(arguments.out / f"{stem}.json", json.dumps(content, indent=1) + "\n")
    write_text(arguments.out / f"{stem}.md", text)
    print(lines)


if __name__ == "__main__":
    main()
