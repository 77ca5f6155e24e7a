"""Measure the variants and tiles of attention's kernels on this device, and write them down.

    python benchmarks/kernel_tuning.py [--out kernels/unimm_kernels/tuning.json]

For each kernel, head dimension and half-precision type every candidate runs at the goal's size.
One that does not compile or fit is left out with its reason; one whose numbers differ from the
default's is an error. The fastest is written for this device's name, the other devices' entries
stay. A win under `MARGIN` is noise: the default stays. Needs a CUDA device.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from kernel_cases import backward_of
from kernel_meter import Meter, write
from torch import Tensor

import unimm_kernels as ops
from unimm_kernels import tuning
from unimm_kernels.testing import relative_error
from unimm_kernels.tuning import Choice, Tiles

MARGIN = 0.03
TOLERANCE = 2e-2
HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)


def candidates(kernel: str) -> Iterator[Choice]:
    """What may run; tiles that no chip holds fail to launch and drop out."""
    if kernel == "attention.forward":
        for keys, stages in ((128, 2), (64, 2), (64, 3), (32, 2)):
            yield Choice("triton-ws", Tiles(128, keys, 4, stages))
            yield Choice("triton-tma", Tiles(128, keys, 8, stages))
    for queries in (32, 64, 128):
        for keys in (32, 64, 128):
            for warps, stages in ((4, 2), (4, 3), (8, 2), (8, 3)):
                yield Choice(tuning.PLAIN, Tiles(queries, keys, warps, stages))


def tuned(
    kernel: str, head_dim: int, dtype: torch.dtype, meter: Meter
) -> tuple[Choice, dict[Choice, float]]:
    """The choice for one kernel, and the milliseconds of every candidate that ran."""
    device = torch.cuda.get_device_name()
    heads = 2048 // head_dim
    leaves = tuple(
        torch.randn(4, 8192, heads, head_dim, device="cuda", dtype=dtype).requires_grad_()
        for _ in range(3)
    )
    grad = torch.randn_like(leaves[0])

    def results() -> list[Tensor]:
        out = ops.attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    default = Choice(tuning.PLAIN, tuning.DEFAULTS[kernel](head_dim, 2))
    with patch.object(tuning, "table", dict):
        want = results()
    times: dict[Choice, float] = {}
    for candidate in dict.fromkeys((default, *candidates(kernel))):
        entry = {"variant": candidate.variant, "tiles": list(candidate.tiles)}
        content = {device: {kernel: {tuning.shape_key(head_dim, dtype): entry}}}
        with patch.object(tuning, "table", lambda content=content: content):
            try:
                got = results()
            except (RuntimeError, torch.AcceleratorError) as error:
                print(f"  {candidate}: left out: {str(error).splitlines()[0][:100]}", flush=True)
                continue
            errors = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
            assert max(errors) < TOLERANCE, f"{kernel} {candidate}: {errors}"
            out = ops.attention(*leaves)
            forward = kernel == "attention.forward"
            run = (lambda: ops.attention(*leaves)) if forward else backward_of(out, leaves)
            times[candidate] = meter.milliseconds(run)
    best = min(times, key=lambda choice: times[choice])
    return (best if times[best] < (1 - MARGIN) * times[default] else default), times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=tuning.TABLE)
    parser.add_argument("--seconds", type=float, default=0.1, help="for each measurement")
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device: what runs fastest there cannot be measured elsewhere")
    torch.manual_seed(0)
    meter = Meter("cuda", arguments.seconds)
    content = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    own = content.setdefault(torch.cuda.get_device_name(), {})
    for kernel in tuning.DEFAULTS:
        for dtype in DTYPES:
            for head_dim in arguments.head_dims:
                best, times = tuned(kernel, head_dim, dtype, meter)
                key = tuning.shape_key(head_dim, dtype)
                print(f"{kernel} {key}: {best}, {times[best]:.3f} ms", flush=True)
                entry = {"variant": best.variant, "tiles": list(best.tiles)}
                own.setdefault(kernel, {})[key] = entry | {"milliseconds": round(times[best], 4)}
                write(arguments.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
