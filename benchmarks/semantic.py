"""A semantic codec against raster codes of the same number of bits, in one command.

    python benchmarks/semantic.py --codec runs/semantic/codec --raster runs/semantic/raster-codec \
        --data runs/semantic/raw
    python benchmarks/semantic.py --cost
    python benchmarks/semantic.py --companions 300 --data runs/semantic/raw

The first measures, on pictures that no training saw: tokens a picture; a linear probe (multinomial
logistic regression, its weight decay chosen on a fifth of the training pictures) on the mean code
vector; overlap of regions with the true masks of composed scenes; PSNR from the ids alone. Bits of
a semantic picture are those of its codes and of how many there are. The second measures what
clustering costs up to 4,096 cells, the third trains every kind of semantic codec for some steps and
puts them into one table. Times are processor times of one thread.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unimm import load_codec
from unimm.data.captioned import text_bytes
from unimm.data.composed import best_overlap, composed_scene
from unimm.data.signals_data import SignalConfig, SignalDataset
from unimm.evaluation.metrics import CODEC_RANGE, psnr
from unimm.evaluation.statistics import (
    bootstrap_mean,
    paired_difference,
    wilson_interval,
)
from unimm_tokenizers import Codec
from unimm_tokenizers.semantic import (
    CausalQueryCodec,
    CausalQueryConfig,
    KeepOrMergeCodec,
    KeepOrMergeConfig,
    SemanticCodec,
    SeTokCodec,
    SeTokConfig,
    SoftSeTokCodec,
    SoftSeTokConfig,
    WordsContrast,
)
from unimm_tokenizers.semantic.clustering import density_peaks
from unimm_tokenizers.storage import write_json, write_text

BATCH = 50
SCENES = 1000  # seed: regions were tuned on scenes of seed 0
DECAYS = (1e-4, 1e-3, 1e-2)


class Labelled(NamedTuple):
    """pictures (n, 3, 32, 32) in [-1, 1]; labels int64 (n,), places in `names`."""

    pictures: Tensor
    labels: Tensor
    names: list[str]


def load(shards: str, count: int, names: list[str] | None = None, start: int = 0) -> Labelled:
    """Pictures and words of shards; the words are labels."""
    dataset = SignalDataset(shards, SignalConfig(modality="image", size=32), "image")
    places = range(start, min(start + count, len(dataset)))
    words = [dataset.text(index).strip() for index in places]
    names = sorted(set(words)) if names is None else names
    labels = torch.tensor([names.index(word) for word in words])
    return Labelled(torch.stack([dataset[index] for index in places]), labels, names)


class Coded(NamedTuple):
    """codes (n, K, *grid); embedding (n, d), mean code vectors; made (n, 3, 32, 32)."""

    codes: Tensor
    embedding: Tensor
    made: Tensor


@torch.no_grad()
def code(codec: Codec, pictures: Tensor) -> Coded:
    """Every picture through a codec, by way of its ids alone."""
    codes, embeddings, made = [], [], []
    for x in pictures.split(BATCH):
        ids = codec.encode(x)
        codes.append(ids)
        if isinstance(codec, SemanticCodec):
            embeddings.append(codec.embed(ids))
        else:
            embeddings.append(codec.quantizer.lookup(ids).flatten(2).mean(2))
        made.append(codec.decode(ids))
    return Coded(torch.cat(codes), torch.cat(embeddings), torch.cat(made))


def bits(codec: Codec, codes: Tensor) -> Tensor:
    """Bits of each picture (n,)."""
    each = (codes >= 0).flatten(1).sum(1) * math.log2(codec.codebook_size)
    if isinstance(codec, SemanticCodec):
        each = each + math.log2(codec.config.max_tokens)  # how many there are
    return each


def probe(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Labels (m,) that a linear probe on embeddings (n, d) gives to embeddings (m, d)."""
    mean, scale = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = ((x - mean) / scale for x in (train, test))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(train) // 5], order[len(train) // 5 :]
    right = {}
    for decay in DECAYS:
        head = fitted(train[kept], labels[kept], classes, decay)
        right[decay] = float((head(train[held]).argmax(1) == labels[held]).double().mean())
    decay = max(DECAYS, key=lambda d: right[d])
    return fitted(train, labels, classes, decay)(test).argmax(1)


def fitted(x: Tensor, labels: Tensor, classes: int, decay: float) -> torch.nn.Linear:
    """Multinomial logistic regression."""
    head = torch.nn.Linear(x.shape[1], classes)
    torch.nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), labels) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head.requires_grad_(False)


def share(right: Tensor) -> dict[str, float]:
    """A share of right answers, with its 95% Wilson interval."""
    low, high = wilson_interval(int(right.sum()), len(right))
    return {"share": float(right.double().mean()), "low": low, "high": high, "n": len(right)}


def mean(values: Tensor | list[float]) -> dict[str, float]:
    """A mean, with its 95% bootstrap interval."""
    numbers = torch.as_tensor(values).double().tolist()
    found = bootstrap_mean(numbers, seed=0)
    return {"mean": found.value, "low": found.low, "high": found.high, "n": len(numbers)}


def overlaps(codec: SemanticCodec, count: int, grounds: Tensor) -> dict[str, Any]:
    """IoU of digits and grounds with the regions that fit them best."""
    out: dict[str, Any] = {}
    drawn = ((grounds.movedim(1, -1) + 1) * 127.5).round().byte().numpy()
    for name, digits in (("one digit", 1), ("two digits", 2), ("one digit on a photo", 1)):
        rng = np.random.default_rng(SCENES)
        on_photo = name.endswith("photo")
        scenes = [
            composed_scene(rng, 32, digits, drawn[n % len(drawn)] if on_photo else None)
            for n in range(count)
        ]
        pictures = torch.from_numpy(np.stack([scene.picture for scene in scenes]))
        x = pictures.movedim(-1, 1).float() / 127.5 - 1
        regions = torch.cat([codec.explain(part) for part in x.split(BATCH)]).numpy()
        found = [
            [best_overlap(region, mask) for mask in scene.masks]
            for region, scene in zip(regions, scenes, strict=True)
        ]
        out[name] = {
            "digits": mean([value for row in found for value in row[:-1]]),
            "ground": mean([row[-1] for row in found]),
            "tokens": float(np.median(regions.reshape(count, -1).max(1)) + 1),
        }
    return out


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of a semantic codec beside a raster codec's."""
    semantic, raster = load_codec(options.codec), load_codec(options.raster)
    assert isinstance(semantic, SemanticCodec)
    data = options.data
    names = load(f"{data}/cifar/cifar-val-000000.tar", 10**6).names
    sets = {
        "cifar": (
            load(f"{data}/cifar/cifar-train-000000.tar", options.train, names),
            load(f"{data}/cifar/cifar-val-000000.tar", options.test, names),
        ),
        "digits": (
            load(f"{data}/digits", options.train),
            load(f"{data}/digits-val", options.test),
        ),
    }
    photos = load(f"{data}/photos/photos-000008.tar", options.test)
    out: dict[str, Any] = {"tokens": {}, "probe": {}, "psnr": {}, "bits": {}}
    found: dict[str, dict[str, list[float]]] = {}
    for name, codec in (("semantic", semantic), ("raster", raster)):
        for kind, (train, test) in sets.items():
            seen, new = code(codec, train.pictures), code(codec, test.pictures)
            right = probe(seen.embedding, train.labels, new.embedding, len(train.names))
            right = right == test.labels
            out["probe"][f"{kind}, {name}"] = share(right)
            found.setdefault(f"{kind}, linear probe", {})[name] = right.double().tolist()
            decibels = note(out, name, kind, codec, new, test.pictures)
            found.setdefault(f"{kind}, PSNR", {})[name] = decibels.tolist()
        decibels = note(out, name, "photos", codec, code(codec, photos.pictures), photos.pictures)
        found.setdefault("photos, PSNR", {})[name] = decibels.tolist()
        print(name, json.dumps(out, indent=1), flush=True)
    out["difference"] = {
        name: paired_difference(by["semantic"], by["raster"])._asdict()
        for name, by in found.items()
    }
    out["overlap"] = overlaps(semantic, options.scenes, sets["cifar"][1].pictures)
    return out


def note(
    out: dict[str, Any], name: str, kind: str, codec: Codec, coded: Coded, real: Tensor
) -> Tensor:
    """Put tokens, bits and PSNR of a set into the results; the PSNR of each picture."""
    tokens = (coded.codes >= 0).flatten(1).sum(1).double()
    key = f"{kind}, {name}"
    out["tokens"][key] = {"median": float(tokens.median()), **mean(tokens)}
    out["bits"][key] = float(bits(codec, coded.codes).mean())
    each = psnr(coded.made, real, data_range=CODEC_RANGE)
    out["psnr"][key] = mean(each)
    return each


def cost() -> list[dict[str, float]]:
    """Processor seconds of clustering pictures of 64 to 4,096 cells, each with 99 channels."""
    rows = []
    for side in (8, 16, 32, 64):
        torch.manual_seed(0)
        features = torch.randn(1, side**2, 99)
        axis = torch.arange(side, dtype=torch.float64)
        place = torch.cartesian_prod(axis, axis)
        apart = (place[:, None] - place).square().sum(-1) * (0.25 / side**2)
        times = []
        for _ in range(3):
            start = time.process_time()
            density_peaks(
                features, apart, neighbours=5, threshold=0.3, min_regions=1, max_regions=24
            )
            times.append(time.process_time() - start)
        rows.append({"cells": side**2, "ms": 1000 * min(times)})
    return rows


def kinds() -> dict[str, SemanticCodec]:
    """Every kind of semantic codec, of one width, with 1,024 codes."""
    common: dict[str, Any] = {
        "dim": 64, "codebook_size": 1024, "codebook_dim": 32, "warmup_steps": 50
    }  # fmt: skip
    return {
        "SeTok, regions": SeTokCodec(SeTokConfig(**common, learned_weight=0.0)),
        "SeTok, soft regions": SoftSeTokCodec(SoftSeTokConfig(**common, learned_weight=0.0)),
        "LaVIT, kept patches": KeepOrMergeCodec(KeepOrMergeConfig(**common, keep_rate=0.15)),
        "SEED, causal queries": CausalQueryCodec(CausalQueryConfig(**common, queries=9)),
    }


def batches(data: Labelled, size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures and their names, the same for every codec."""
    rng = torch.Generator().manual_seed(0)
    names = torch.stack([text_bytes(name) for name in data.names])
    for _ in range(steps):
        chosen = torch.randint(len(data.labels), (size,), generator=rng)
        yield data.pictures[chosen], names[data.labels[chosen]]


def companions(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train every kind for the same steps on CIFAR with class names; figures on unseen pictures."""
    val = load(f"{options.data}/cifar/cifar-val-000000.tar", options.test)
    train = load(f"{options.data}/cifar/cifar-train-000000.tar", options.train, val.names)
    rows = []
    torch.manual_seed(0)
    for name, codec in kinds().items():
        words = WordsContrast(codec.config.codebook_dim)
        parameters = [*codec.parameters(), *words.parameters()]
        optimizer = torch.optim.AdamW(parameters, 2e-3, betas=(0.9, 0.95))
        start = time.process_time()
        for step, (x, text) in enumerate(batches(train, 32, options.companions)):
            for group in optimizer.param_groups:
                done = step / options.companions
                group["lr"] = 2e-3 * min(1, (step + 1) / 30, 1.5 * (1 - done))
            with torch.autocast("cpu", torch.bfloat16):
                output, embedding = codec.train().describe(x)
            loss = 4 * F.mse_loss(output.reconstruction.float(), x) + output.loss
            loss = loss + 0.15 * words(embedding, text)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        seconds = time.process_time() - start
        codec.eval()
        seen, new = code(codec, train.pictures), code(codec, val.pictures)
        guess = probe(seen.embedding, train.labels, new.embedding, len(val.names))
        tokens = (new.codes >= 0).flatten(1).sum(1).double()
        rows.append(
            {
                "codec": name,
                "parameters": sum(p.numel() for p in codec.parameters()),
                "tokens": float(tokens.mean()),
                "bits": float(bits(codec, new.codes).mean()),
                "psnr": mean(psnr(new.made, val.pictures, data_range=CODEC_RANGE)),
                "probe": share(guess == val.labels),
                "step_ms": 1000 * seconds / options.companions,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def interval(figure: dict[str, float], style: str) -> str:
    """A figure and its 95% interval."""
    middle = figure.get("mean", figure.get("share", math.nan))
    middle, low, high = (format(x, style) for x in (middle, figure["low"], figure["high"]))
    return f"{middle} ({low} to {high})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def page(results: dict[str, Any]) -> str:
    """Markdown of what was measured."""
    parts = []
    if "probe" in results:
        rows = [
            [
                key,
                f"{results['tokens'][key]['median']:.0f}",
                f"{results['tokens'][key]['mean']:.1f}",
                f"{results['bits'][key]:.0f}",
                interval(results["psnr"][key], ".2f"),
                interval(results["probe"][key], ".1%") if key in results["probe"] else "",
            ]
            for key in results["psnr"]
        ]
        head = ["pictures, codec", "tokens, median", "mean", "bits", "PSNR, dB", "linear probe"]
        parts.append(table(head, rows))
        rows = [
            [name, f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"]
            for name, row in results["difference"].items()
        ]
        parts.append(table(["semantic less raster, the same pictures", "mean, 95% interval"], rows))
        rows = [
            [
                name,
                *(interval(row[key], ".3f") for key in ("digits", "ground")),
                f"{row['tokens']:.0f}",
            ]
            for name, row in results["overlap"].items()
        ]
        parts.append(
            table(["composed scenes", "IoU of digits", "IoU of the ground", "tokens"], rows)
        )
    if "cost" in results:
        rows = [[f"{row['cells']:,}", f"{row['ms']:.1f}"] for row in results["cost"]]
        parts.append(table(["cells", "clustering of one picture, ms"], rows))
    if "companions" in results:
        rows = [
            [
                row["codec"],
                f"{row['parameters']:,}",
                f"{row['tokens']:.1f}",
                f"{row['bits']:.0f}",
                interval(row["psnr"], ".2f"),
                interval(row["probe"], ".1%"),
                f"{row['step_ms']:.0f}",
            ]
            for row in results["companions"]
        ]
        head = ["codec", "parameters", "tokens", "bits", "PSNR, dB", "linear probe", "step, ms"]
        parts.append(table(head, rows))
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--codec", help="the semantic codec")
    parser.add_argument("--raster", help="the raster codec")
    parser.add_argument("--data", default="runs/semantic/raw", help="see recipes/semantic/data.md")
    parser.add_argument("--cost", action="store_true", help="clustering alone, up to 4,096 cells")
    parser.add_argument("--companions", type=int, default=0, help="steps; train every kind")
    parser.add_argument("--train", type=int, default=4000, help="pictures that a probe learns from")
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--note", default="", help="about the machine, for the head of the page")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if options.codec and options.raster:
        results |= compare(options)
    if options.cost:
        results["cost"] = cost()
    if options.companions:
        results["companions"] = companions(options)
    if not results:
        parser.error("nothing to measure: give --codec and --raster, --cost or --companions")
    machine = f"cpu-{platform.machine()}"
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    head = f"{machine}, {threads}, torch {torch.__version__}. {options.note}".strip()
    day = datetime.now(UTC).date()
    path = options.out / f"{day}-{machine}-semantic"
    stored = path.with_suffix(".json")
    if stored.exists():  # parts that were measured on the same day stand in one page
        results = json.loads(stored.read_text())["results"] | results
    write_json(stored, {"head": head, "results": results})
    write_text(path.with_suffix(".md"), f"# Semantic codecs\n\n{head}\n\n{page(results)}")
    print(page(results))


if __name__ == "__main__":
    main()
