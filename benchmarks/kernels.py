"""Speed and memory of the kernels beside what a user would pick otherwise, in one run.

    python benchmarks/kernels.py [--only attention] [--out benchmarks/results]

On a CUDA device every op runs at the sizes of its goal; without one, those with a CPU version of
their own. `share` is a part of the ceiling measured in the same run: a large matrix product for
the ops given in TFLOP/s, a large copy for those given in GB/s. `x` is the time over unimm's for the
same op and size. Peak memory is what the call took beyond its inputs. On a CPU a time is the
processor time of all threads over their number, which other programs on the machine do not
lengthen. A rival that is not installed, or runs out of memory, is said to be so.
"""

import argparse
import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from kernel_cases import HALF, Case, cases
from kernel_meter import Meter, write


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured; `note` says why a time is missing."""

    op: str
    size: str
    by: str
    milliseconds: float | None
    rate: float | None
    unit: str
    share: float | None
    peak_mib: float | None
    note: str = ""


def ceilings(meter: Meter) -> tuple[float, float]:
    """TFLOP/s of a large product and GB/s of a large copy (read and written)."""
    n, dtype = (8192, HALF) if meter.device == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, n, n, device=meter.device).to(dtype)
    product = 2 * n**3 / meter.milliseconds(lambda: a @ b) / 1e9
    source = torch.zeros(2**28 if meter.device == "cuda" else 2**25, device=meter.device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / meter.milliseconds(lambda: target.copy_(source)) / 1e6
    return product, copy


def measure(case: Case, meter: Meter, product: float, copy: float) -> Row:
    unit = "TFLOP/s" if case.flops else "GB/s"
    empty: dict[str, Any] = dict.fromkeys(("milliseconds", "rate", "share", "peak_mib"))
    if case.needs is not None and find_spec(case.needs) is None:
        note = f"{case.needs} is not installed"
        return Row(op=case.op, size=case.size, by=case.by, unit=unit, note=note, **empty)
    try:
        run = case.make()
        milliseconds = meter.milliseconds(run)
        peak = meter.peak_mib(run)
    except torch.OutOfMemoryError:
        return Row(op=case.op, size=case.size, by=case.by, unit=unit, note="out of memory", **empty)
    rate = (case.flops / 1e9 if case.flops else case.bytes / 1e6) / milliseconds
    return Row(
        op=case.op,
        size=case.size,
        by=case.by,
        milliseconds=milliseconds,
        rate=rate,
        unit=unit,
        share=rate / (product if case.flops else copy),
        peak_mib=peak,
    )


def table(rows: list[Row]) -> str:
    lines = ["| op | size | by | ms | x | rate | share | peak MiB |", "|" + "---|" * 8]
    own = {(row.op, row.size): row.milliseconds for row in rows if row.by == "unimm"}
    for row in rows:
        cells = [row.op, row.size, row.by]
        if row.milliseconds is None or row.rate is None or row.share is None:
            cells += [row.note, "", "", "", ""]
        else:
            base = own.get((row.op, row.size))
            cells += [f"{row.milliseconds:.3f}", f"{row.milliseconds / base:.2f}" if base else ""]
            cells += [f"{row.rate:.3g} {row.unit}", f"{row.share:.0%}"]
            cells.append(f"{row.peak_mib:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="ops whose name begins so")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    meter = Meter(device, arguments.seconds)
    product, copy = ceilings(meter)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu-{platform.machine()}"
    busy = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    threads = f", {torch.get_num_threads()} threads, {busy}" if device == "cpu" else ""
    head = (
        f"{name}{threads}, torch {torch.__version__}: product {product:.3g} TFLOP/s, "
        f"copy {copy:.3g} GB/s"
    )
    print(head, flush=True)
    rows: list[Row] = []
    for case in cases(device):
        if case.op.startswith(arguments.only):
            rows.append(measure(case, meter, product, copy))
            print(table(rows).splitlines()[-1], flush=True)
    stem = f"{datetime.now(UTC):%Y-%m-%d}-{name.replace(' ', '-').lower()}-kernels"
    content = {"head": head, "rows": [asdict(row) for row in rows]}
    write(arguments.out / f"{stem}.json", json.dumps(content, indent=1) + "\n")
    write(arguments.out / f"{stem}.md", f"{head}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
