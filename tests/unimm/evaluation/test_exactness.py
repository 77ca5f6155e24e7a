"""Exactness figures of codecs whose faults are known."""

import math

import pytest
import torch
from torch import Tensor

from unimm.evaluation.reconstruction.exactness import Exactness, measure_exactness, seam_energy
from unimm_tokenizers import build_codec
from unimm_tokenizers.adapters import FunctionCodec, FunctionConfig, classical


def blocks(x: Tensor) -> Tensor:
    return ((torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4) + 1) * 7.5).round()


def grey(codes: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(codes / 7.5 - 1, scale_factor=4.0).expand(-1, 3, -1, -1)


CONFIG = FunctionConfig(modality="image", codebook_size=16, downsample=(4, 4))
COARSE = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
PICTURE = torch.nn.functional.interpolate(COARSE, scale_factor=4.0).expand(-1, 3, -1, -1)


def test_a_codec_of_blocks_is_exact_in_every_way_and_has_seams() -> None:
    found = measure_exactness(FunctionCodec(CONFIG, blocks, grey), [PICTURE])
    assert found.keeps_its_word
    assert (found.deterministic, found.batch, found.idempotent) == (1.0, 1.0, 1.0)
    assert (found.deterministic_signal, found.batch_signal) == (0.0, 0.0)
    assert found.stream is None
    assert found.tiled is None
    assert found.bfloat16 is not None
    assert found.bfloat16 > 0.9
    assert found.wrong == ""


def test_chance_and_batches_that_look_at_each_other_are_found_out() -> None:
    def drawn(x: Tensor) -> Tensor:
        return torch.randint(0, 16, blocks(x).shape)

    found = measure_exactness(FunctionCodec(CONFIG, drawn, grey), [PICTURE])
    assert found.deterministic is not None
    assert found.deterministic < 0.5
    assert not found.keeps_its_word

    def levelled(x: Tensor) -> Tensor:  # normalized over the batch
        return blocks((x - x.mean()) / (3 * x.std(correction=0)) * x.shape[0] / 2)

    found = measure_exactness(FunctionCodec(CONFIG, levelled, grey), [PICTURE])
    assert found.deterministic == 1.0
    assert found.batch is not None
    assert found.batch < 1.0
    assert not found.keeps_its_word


def test_a_way_that_fails_is_named() -> None:
    def single(x: Tensor) -> Tensor:
        if len(x) > 1:
            raise RuntimeError("one at a time\nplease")
        return blocks(x)

    found = measure_exactness(FunctionCodec(CONFIG, single, grey), [PICTURE, PICTURE])
    assert found.wrong == "batch: one at a time"
    assert found.batch is None


@pytest.mark.parametrize("name", ["soundstream-8khz", "vision-tiny-f8"])
def test_our_own_codecs_keep_their_word(name: str) -> None:
    codec = build_codec(name)
    shape = (1, 1, 5003) if codec.modality == "audio" else (1, 3, 70, 75)
    found = measure_exactness(codec, [torch.rand(shape) - 0.5])
    assert found.keeps_its_word, found
    assert (found.stream if codec.modality == "audio" else found.tiled) == 1.0


def test_of_a_classical_codec_only_repetition_is_asked() -> None:
    assert measure_exactness(classical("jpeg:75"), [PICTURE]) == Exactness(
        deterministic=1.0, deterministic_signal=0.0
    )


def test_seams_are_steps_over_borders() -> None:
    flat = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert seam_energy(flat, (8, 8)) == pytest.approx(1, abs=0.15)
    ramp = torch.arange(8.0).repeat(8)
    wave = torch.where(torch.arange(64) // 8 % 2 == 0, ramp, ramp - 4).expand(1, 1, 64, 64)
    assert seam_energy(wave, (8, 8)) > 10
    assert math.isnan(seam_energy(torch.zeros(1, 1, 64, 64), (8, 8)))
    assert math.isnan(seam_energy(flat, (1, 1)))
