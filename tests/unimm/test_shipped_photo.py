"""The shipped photo codec: what its card says of unseen photographs holds."""

from pathlib import Path

import numpy as np
import pytest
import torch

from unimm import load_codec
from unimm.checkpoint import SHIPPED
from unimm.data.signals_data import SignalConfig, SignalDataset
from unimm.evaluation.metrics import CODEC_RANGE, psnr
from unimm_tokenizers.adapters import classical
from unimm_tokenizers.vision import VisionCodec

COUNT = 12  # of the hundred photographs


@pytest.fixture(scope="module")
def codec() -> VisionCodec:
    made = load_codec("photo-f8")
    assert isinstance(made, VisionCodec)
    return made


def test_it_is_small_and_has_its_rate(codec: VisionCodec) -> None:
    files = (SHIPPED / "photo-f8").rglob("*")
    assert sum(path.stat().st_size for path in files if path.is_file()) < 12e6
    assert (codec.downsample, codec.codebook_size, codec.num_codebooks) == ((8, 8), 16384, 1)


@torch.no_grad()
def test_unseen_photographs_are_nearer_than_jpeg_of_as_many_bytes(
    codec: VisionCodec, shared_data: Path
) -> None:
    shards = shared_data / "photos/photos-000008.tar"
    photographs = SignalDataset(shards, SignalConfig(modality="image"), "image")
    jpeg = classical("jpeg@0.21875")  # the best that fits into 14 bits for 64 pixels
    ours, theirs = [], []
    for index in range(COUNT):
        x = photographs[index][None]
        for each, found in ((codec, ours), (jpeg, theirs)):
            found.append(float(psnr(each.decode(each.encode(x)), x, data_range=CODEC_RANGE)))
    assert np.mean(ours) > 23.3  # these twelve are harder than the hundred
    assert np.mean(ours) > np.mean(theirs) + 1.5
