"""What holds for every test: no network, no chance, no GPU unless asked for.

Two variables are set before anything of the project is imported, because they are read at import:
`TRITON_INTERPRET` (without a GPU the kernels run in Triton's interpreter) and `HF_HUB_OFFLINE`.
"""

import os
import random
import socket
from pathlib import Path

import pytest
import torch
from hypothesis import settings

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).parents[1]
LOCAL = {"127.0.0.1", "::1", "localhost", "0.0.0.0"}

# The same examples on every machine and in every run, and nothing written beside the sources.
settings.register_profile("unimm", derandomize=True, deadline=None, database=None)
settings.load_profile("unimm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests that draw numbers without a generator of their own draw the same ones every time."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for another machine fails, and names it."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX and isinstance(address, tuple) and address[0] not in LOCAL:
            pytest.fail(f"a test tried to reach {address[0]}:{address[1]}: tests run offline")
        connect(self, address)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(socket.socket, "connect", connect_locally)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: `$UNIMM_DATA`, else `../shared/data` beside the checkout."""
    folder = Path(os.environ.get("UNIMM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set UNIMM_DATA")
    return folder


@pytest.fixture(scope="session")
def lpips_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A narrow VGG16 of random weights and heads, in the files of their authors, packed.

    Gives the packed file, beside which the two lie, and its sha256.
    """
    from unimm_tokenizers.losses import pack_lpips  # late: see the top

    folder = tmp_path_factory.mktemp("lpips")
    generator = torch.Generator().manual_seed(0)
    vgg: dict[str, torch.Tensor] = {}
    heads: dict[str, torch.Tensor] = {}
    width = 3
    for depth, places in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))):
        for place in places:
            shape = (4 + depth, width, 3, 3)
            vgg[f"features.{place}.weight"] = torch.randn(shape, generator=generator) * 0.3
            vgg[f"features.{place}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
            width = shape[0]
        head = torch.rand(1, width, 1, 1, generator=generator)
        heads[f"lin{depth}.model.1.weight"] = head
    torch.save({**vgg, "classifier.0.weight": torch.zeros(1)}, folder / "vgg16.pth")
    torch.save(heads, folder / "vgg.pth")
    out = folder / "lpips.safetensors"
    return out, pack_lpips(folder / "vgg16.pth", folder / "vgg.pth", out)
