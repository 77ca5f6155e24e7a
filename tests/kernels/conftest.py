"""Kernels run in Triton's interpreter where there is no GPU.

Triton decides when a kernel is decorated, so the variable is set before unimm_kernels is imported.
"""

import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    if "unimm_kernels" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "unimm_kernels was imported before tests/kernels/conftest.py: "
            "set TRITON_INTERPRET=1 for this run"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    from unimm_kernels.testing import repair_interpreter

    repair_interpreter()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a device first what the interpreter cannot show; of that, warp specialisation first."""
    items.sort(key=lambda item: item.path.name != "test_gpu.py")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _quiet_interpreter() -> Iterator[None]:
    """exp2(-inf - x) and the like are meant; numpy would warn where a GPU says nothing."""
    with np.errstate(all="ignore"):
        yield
