"""The shipped photo codec: what its card says of unseen photographs holds."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unimm import load_codec
from unimm.checkpoint import SHIPPED
from unimm.data.shards import ShardReader
from unimm_tokenizers.vision import VisionCodec

COUNT = 12  # of the hundred photographs


@pytest.fixture(scope="module")
def codec() -> VisionCodec:
    made = load_codec("photo-f8")
    assert isinstance(made, VisionCodec)
    return made


def psnr(made: Tensor, x: Tensor) -> float:
    return float(10 * (4 / (made - x).square().mean()).log10())


def test_it_is_small_and_has_its_rate(codec: VisionCodec) -> None:
    files = (SHIPPED / "photo-f8").rglob("*")
    assert sum(path.stat().st_size for path in files if path.is_file()) < 12e6
    assert (codec.downsample, codec.codebook_size, codec.num_codebooks) == ((8, 8), 16384, 1)


@torch.no_grad()
def test_unseen_photographs_are_nearer_than_jpeg_of_as_many_bytes(
    codec: VisionCodec, shared_data: Path
) -> None:
    ours, theirs = [], []
    for sample in list(ShardReader(shared_data / "photos/photos-000008.tar"))[:COUNT]:
        picture = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        x = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        codes = codec.encode(x)
        ours.append(psnr(codec.decode(codes), x))
        theirs.append(psnr(jpeg(picture, codes.numel() * 14 // 8), x))
    assert np.mean(ours) > 22.8  # these twelve are harder than the hundred
    assert np.mean(ours) > np.mean(theirs) + 1


def jpeg(picture: Image.Image, limit: int) -> Tensor:
    """The best JPEG of at most so many bytes, decoded: (1, 3, H, W) in [-1, 1]."""
    for quality in range(95, 0, -1):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= limit or quality == 1:
            found = np.asarray(Image.open(file).convert("RGB")).copy()
            return torch.from_numpy(found).permute(2, 0, 1)[None] / 127.5 - 1
    raise AssertionError("no quality was tried")
