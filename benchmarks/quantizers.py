"""Quantizers in one harness: same data, network, steps and seed; one run each.

    python benchmarks/quantizers.py --data 'photos-{000000..000007}.tar' --val photos-000008.tar
    python benchmarks/quantizers.py --speed

The first trains one small f8 auto-encoder with each quantizer of K codes and reports PSNR, usage
and perplexity on unseen pictures, time per step, and time and peak memory of the quantizer alone.
The second measures a training step of quantizers alone, beside vector-quantize-pytorch's. Times are
processor times of this process on a CPU, which other programs do not lengthen much, and wall times
on a GPU; peaks are growth of the process on a CPU, 0 where memory freed before was enough. `taming`
and `LlamaGen` are the quantizers of those repositories, written again after their papers: codes
moved by gradient, of 64 free channels (taming has 256) or 8 unit ones.
"""

import argparse
import gc
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

from unimm.data.signals_data import SignalConfig, SignalDataset
from unimm_kernels import nearest_code
from unimm_tokenizers.quantize import (
    BinaryQuantizer,
    FiniteScalarQuantizer,
    IndexBackpropagationQuantizer,
    Quantized,
    Quantizer,
    ResidualVectorQuantizer,
    SimVectorQuantizer,
    UsageCounter,
)
from unimm_tokenizers.storage import write_json, write_text
from unimm_tokenizers.vision import VisionCodec, VisionConfig

BITS = 12
FSQ_LEVELS = {10: (8, 5, 5, 5), 12: (7, 5, 5, 5, 5), 14: (8, 8, 8, 6, 5), 16: (8, 8, 8, 5, 5, 5)}


class GradientQuantizer(Quantizer):
    """Codes that gradients move: of VQGAN (arXiv 2012.09841), or, of unit length, of LlamaGen."""

    def __init__(self, dim: int, size: int, width: int, cosine: bool) -> None:
        super().__init__()
        self.num_codebooks, self.codebook_size, self.cosine = 1, size, cosine
        self.project_in, self.project_out = nn.Linear(dim, width), nn.Linear(width, dim)
        self.book = nn.Parameter(torch.empty(size, width).uniform_(-1 / size, 1 / size))

    def quantize(self, latents: Tensor) -> Quantized:
        """See `Quantizer.quantize`."""
        rows = self.project_in(latents.float().flatten(2).transpose(1, 2))
        book = self.book
        if self.cosine:
            rows, book = F.normalize(rows, dim=-1), F.normalize(book, dim=-1)
        codes = nearest_code(rows.detach().flatten(0, 1), book.detach()).view(rows.shape[:2])
        vectors = book[codes]
        loss = F.mse_loss(vectors, rows.detach()) + 0.25 * F.mse_loss(rows, vectors.detach())
        quantized = self.project_out(rows + (vectors - rows).detach()).transpose(1, 2)
        grid = latents.shape[2:]
        return Quantized(quantized.unflatten(2, grid), codes[:, None].unflatten(2, grid), loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`."""
        book = F.normalize(self.book, dim=-1) if self.cosine else self.book
        vectors = self.project_out(book[codes.flatten(1)]).transpose(1, 2)
        return vectors.unflatten(2, codes.shape[2:])


class LibraryQuantizer(Quantizer):
    """vector-quantize-pytorch's VectorQuantize with the settings of ours."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.num_codebooks, self.codebook_size = 1, size
        self.vq = VectorQuantize(
            dim,
            size,
            codebook_dim=8,
            use_cosine_sim=True,
            decay=0.97,
            kmeans_init=True,
            threshold_ema_dead_code=0.5,  # pyright: ignore[reportArgumentType]
            commitment_weight=0.25,
            rotation_trick=False,
        )

    def quantize(self, latents: Tensor) -> Quantized:
        """See `Quantizer.quantize`."""
        grid = latents.shape[2:]
        quantized, codes, loss = self.vq(latents.float().flatten(2).transpose(1, 2))
        quantized = quantized.transpose(1, 2).unflatten(2, grid)
        return Quantized(quantized, codes[:, None].unflatten(2, grid), loss.sum())

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`."""
        vectors = self.vq.get_output_from_indices(codes.flatten(1)).transpose(1, 2)
        return vectors.unflatten(2, codes.shape[2:])


def quantizers(dim: int, bits: int) -> dict[str, Callable[[], Quantizer]]:
    """Name -> maker of a quantizer of about 2^bits codes for latents of `dim` channels."""
    size = 2**bits
    return {
        "VQ (taming)": lambda: GradientQuantizer(dim, size, 64, cosine=False),
        "VQ (LlamaGen)": lambda: GradientQuantizer(dim, size, 8, cosine=True),
        "VQ (vector-quantize-pytorch)": lambda: LibraryQuantizer(dim, size),
        "FSQ": lambda: FiniteScalarQuantizer(dim, FSQ_LEVELS[bits]),
        "LFQ": lambda: BinaryQuantizer(dim, bits),
        "BSQ": lambda: BinaryQuantizer(dim, bits, spherical=True),
        "SimVQ": lambda: SimVectorQuantizer(dim, size, 32),
        "IBQ": lambda: IndexBackpropagationQuantizer(dim, size, 32),
        "unimm, unit codes": lambda: ResidualVectorQuantizer(
            dim, size, codebook_dim=8, cosine=True
        ),
        "unimm, free codes": lambda: ResidualVectorQuantizer(dim, size, codebook_dim=8),
    }


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one quantizer reached; None where it was not measured."""

    quantizer: str
    codes: int
    psnr: float | None = None
    usage: float | None = None
    perplexity: float | None = None
    step_ms: float | None = None
    quantizer_ms: float | None = None
    peak_mib: float | None = None


def clock(device: str) -> float:
    """Seconds: of the processor on a CPU, of the wall on a GPU, all work done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak_mib(run: Callable[[], object], device: str) -> float:
    """Memory that a call takes beyond what was held before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Linux: 5 resets the high-water mark of the process's memory.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return max(0.0, _status("VmHWM") - before)


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}: the CPU part needs Linux")


def step_of(quantizer: Quantizer, latents: Tensor) -> Callable[[], None]:
    """A training step of a quantizer alone."""

    def run() -> None:
        output = quantizer(latents)
        (output.quantized.square().sum() + output.loss).backward()
        quantizer.zero_grad(set_to_none=True)

    return run


def alone(name: str, make: Callable[[], Quantizer], vectors: int, dim: int, device: str) -> Row:
    """Time and memory of a training step of a quantizer alone."""
    torch.manual_seed(0)
    quantizer = make().to(device).train()
    latents = torch.randn(4, dim, vectors // 4, device=device, requires_grad=True)
    run = step_of(quantizer, latents)
    if isinstance(quantizer, ResidualVectorQuantizer):
        quantizer.started.fill_(True)  # k-means comes once in a training
    run()
    times = []
    for _ in range(5):
        start = clock(device)
        run()
        times.append(clock(device) - start)
    return Row(
        quantizer=name,
        codes=quantizer.codebook_size,
        quantizer_ms=1000 * min(times),
        peak_mib=peak_mib(run, device),
    )


def batches(dataset: SignalDataset, size: int, steps: int, device: str) -> Iterator[Tensor]:
    """The same pictures for every quantizer."""
    for step in range(steps):
        places = [(step * size + n) for n in range(size)]
        signals = [dataset.signal(p % len(dataset), p // len(dataset)) for p in places]
        yield torch.stack(signals).to(device)


def trained(
    name: str,
    make: Callable[[], Quantizer],
    train: SignalDataset,
    val: SignalDataset,
    options: argparse.Namespace,
    device: str,
) -> Row:
    """Train the network with one quantizer."""
    torch.manual_seed(0)
    config = VisionConfig(
        channels=options.channels,
        multipliers=(1, 2),
        patch=4,
        block="lean",
        latent_channels=32,
        codebook_size=2,  # replaced below
    )
    codec = VisionCodec(config).to(device).train()
    codec.quantizer = make().to(device)
    optimizer = torch.optim.AdamW(codec.parameters(), 1e-3, betas=(0.9, 0.95))
    start = clock(device)
    for step, x in enumerate(batches(train, options.batch, options.steps, device)):
        codec.quantizer.warming_up = step < options.steps // 10
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50, 2 * (1 - step / options.steps))
        with torch.autocast(device, torch.bfloat16):
            output = codec(x)
            loss = F.mse_loss(output.reconstruction.float(), output.target) + output.loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
    milliseconds = 1000 * (clock(device) - start) / options.steps
    codec.eval()
    counter = UsageCounter(1, codec.codebook_size).to(device)
    ratios = []
    with torch.no_grad():
        for index in range(len(val)):
            x = val.signal(index)[None].to(device)
            codes = codec.encode(x)
            counter.update(codes)
            error = (codec.decode(codes) - x).square().mean()
            ratios.append(10 * torch.log10(4 / error))
    usage = counter.finish()
    step = alone(name, make, options.batch * (options.size // 8) ** 2, 32, device)
    return Row(
        quantizer=name,
        codes=codec.codebook_size,
        psnr=float(torch.stack(ratios).mean()),
        usage=float(usage.usage),
        perplexity=float(usage.perplexity),
        step_ms=milliseconds,
        quantizer_ms=step.quantizer_ms,
        peak_mib=step.peak_mib,
    )


COLUMNS = {
    "codes": ("codes", "{:,}"),
    "psnr": ("PSNR, dB", "{:.2f}"),
    "usage": ("codes used", "{:.1%}"),
    "perplexity": ("perplexity", "{:,.0f}"),
    "step_ms": ("training step, ms", "{:,.0f}"),
    "quantizer_ms": ("quantizer alone, ms", "{:,.1f}"),
    "peak_mib": ("its peak, MiB", "{:,.0f}"),
}


def table(rows: list[Row]) -> str:
    """Markdown of the columns that were measured."""
    shown = [name for name in COLUMNS if any(getattr(row, name) is not None for row in rows)]
    lines = [["quantizer", *(COLUMNS[name][0] for name in shown)], ["---"] * (len(shown) + 1)]
    for row in rows:
        values = [(getattr(row, name), COLUMNS[name][1]) for name in shown]
        lines.append([row.quantizer, *("" if v is None else f.format(v) for v, f in values)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(rows: list[Row], path: Path) -> None:
    """PSNR over perplexity, a point for each quantizer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for row in rows:
        if row.psnr is not None and row.perplexity is not None:
            axes.scatter(row.perplexity, row.psnr)
            axes.annotate(row.quantizer, (row.perplexity, row.psnr), fontsize=7)
    axes.set(xscale="log", xlabel="perplexity on unseen pictures", ylabel="PSNR, dB")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", help="shards to train on")
    parser.add_argument("--val", help="shards to judge on")
    parser.add_argument("--speed", action="store_true", help="quantizers alone, K up to 65,536")
    parser.add_argument("--only", default="", help="a regular expression: names to run")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--channels", type=int, default=48)
    parser.add_argument("--bits", type=int, default=BITS, choices=sorted(FSQ_LEVELS))
    parser.add_argument("--note", default="", help="about the machine, for the head of the page")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    if options.speed:
        for bits in (14, 16):
            for name, make in quantizers(8, bits).items():
                if re.search(options.only, name):
                    rows.append(alone(name, make, 4096, 8, device))
                    print(rows[-1], flush=True)
    else:
        config = SignalConfig(modality="image", size=options.size, crop="random")
        train = SignalDataset(options.data, config, "image", training=True)
        val = SignalDataset(options.val, SignalConfig(modality="image"), "image")
        for name, make in quantizers(32, options.bits).items():
            if re.search(options.only, name):
                rows.append(trained(name, make, train, val, options, device))
                print(rows[-1], flush=True)
    kind = "speed" if options.speed else "quality"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"cpu-{platform.machine()}"
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    head = f"{machine}, {threads}, torch {torch.__version__}. {options.note}"
    settings = (
        "A training step of a quantizer alone, 4,096 vectors of 8 channels."
        if options.speed
        else f"{options.steps} steps of {options.batch} windows of {options.size} pixels, "
        f"{options.channels} channels; judged on {len(val)} pictures."
    )
    day = datetime.now(UTC).date()
    stem = f"{day}-{machine.replace(' ', '-').lower()}-quantizers-{kind}"
    page = f"# Quantizers: {kind}\n\n{head}\n\n{settings}\n\n{table(rows)}"
    write_json(options.out / f"{stem}.json", {"head": head, "rows": [asdict(r) for r in rows]})
    write_text(options.out / f"{stem}.md", page)
    if not options.speed:
        plot(rows, options.out / f"{stem}.png")
    print(json.dumps(head), table(rows), sep="\n")


if __name__ == "__main__":
    main()
