"""Every kernel that ships compiles for the GPUs that it is meant for, within their limits.

A process of its own, since this one has Triton interpret its kernels.
"""

import json
import os
import subprocess
import sys

import pytest

# What is compiled in every run; the whole matrix takes minutes and is marked slow.
PART = {
    "specialized-128-packed-window": {"tma_forward_kernel"},
    "attention-128-bf16-packed": {"forward_kernel", "query_gradient_kernel", "key_gradient_kernel"},
    "decode-128": {"split_kernel", "join_kernel"},
    "codes-8-fp32": {"search_kernel", "sums_kernel", "residual_kernel"},
    "loss-bf16": {"softmax_gradient_kernel"},
    "rotary": {"forward_kernel", "norm_backward_kernel"},
}


def reports(arch: int, *names: str) -> list[dict[str, object]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", "unimm_kernels.aot", str(arch), *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_hot_kernels_on_hopper() -> None:
    found = reports(90, *PART)
    for name, kernels in PART.items():
        assert {r["kernel"] for r in found if str(r["op"]).startswith(name)} == kernels
    assert [r for r in found if r["problems"]] == []
    for report in found:
        if str(report["op"]).startswith(("attention-128-bf16-packed", "specialized")):
            assert report["wgmma"], report
        assert report["specialized"] == str(report["op"]).startswith("specialized")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_everything(arch: int) -> None:
    found = reports(arch)
    assert len(found) >= 80
    assert [r for r in found if r["problems"]] == []


def test_the_limits_are_noticed() -> None:
    """A tile twice as large as what ships: more shared memory than any chip has, and spills."""
    code = """
import torch
from unimm_kernels import aot, tuning
tuning.DEFAULTS["attention.forward"] = lambda *_: tuning.Tiles(128, 128, 4, 3)
launch = aot.launches(aot._attention(256, torch.bfloat16))[0]
print(aot.compiled("attention-256", launch, 90).problems)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "bytes of shared memory, 232448 exist" in done.stdout, done.stderr
    assert "bytes of spills" in done.stdout
