"""Presets: built by name, decided by the seed alone."""

import pytest
import torch

from unimm_tokenizers import build_codec, presets
from unimm_tokenizers.audio import StreamingCodec


@pytest.mark.parametrize("name", presets())
def test_every_preset_codes_a_signal(name: str) -> None:
    codec = build_codec(name)
    assert not codec.training
    if codec.modality == "audio":
        assert codec.sample_rate is not None
        size: tuple[int, ...] = (codec.sample_rate // 10,)
    else:
        size = (32, 32)
    with torch.no_grad():
        x = torch.rand(1, codec.num_channels, *size) * 2 - 1
        codes = codec.encode(x)
        assert codec.decode(codes, size).shape == x.shape
    assert codes.max() < codec.codebook_size


def test_the_seed_alone_decides() -> None:
    torch.manual_seed(1)
    one = build_codec("soundstream-8khz", seed=3).state_dict()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    other = build_codec("soundstream-8khz", seed=3).state_dict()
    third = build_codec("soundstream-8khz", seed=4).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], third[name]) for name in one)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's stream is left alone


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match="'encodec' is unknown; presets are vision-tiny-f8, "):
        build_codec("encodec")


@pytest.mark.parametrize("name", [name for name in presets() if "m-f" in name])
def test_names_say_size_and_reduction(name: str) -> None:
    """`vision-20m-f16`: about 20 million parameters, 16 pixels per code."""
    _, millions, reduction, *video = name.split("-")
    with torch.device("meta"):
        codec = build_codec(name)
    count = sum(p.numel() for p in codec.parameters()) / 1e6
    assert 0.8 < count / float(millions[:-1]) < 1.25
    assert codec.downsample[-2:] == (int(reduction[1:]),) * 2
    assert ("video" in codec.modalities) == (video == ["video"])
    assert codec.codebook_size == 16384


@pytest.mark.parametrize(
    ("name", "rate", "kbps"),
    [
        ("soundstream-8khz", 25, 0.8),
        ("soundstream-16khz", 50, 4.0),
        ("soundstream-24khz", 75, 6.0),
        ("encodec-24khz", 75, 6.0),
        ("soundstream-24khz-12hz", 12.5, 1.0),
        ("soundstream-44khz", 86.13, 7.75),
        ("soundstream-24khz-single", 75, 0.9),
        ("spectral-8khz", 25, 0.8),
        ("spectral-16khz", 50, 6.0),
        ("spectral-16khz-fsq", 50, 0.8),
    ],
)
def test_sound_presets_have_their_rates(name: str, rate: float, kbps: float) -> None:
    codec = build_codec(name)
    assert isinstance(codec, StreamingCodec)
    assert codec.frame_rate == pytest.approx(rate, abs=0.01)
    assert codec.bitrate / 1000 == pytest.approx(kbps, abs=0.01)


def test_every_sound_preset_has_its_rates_above() -> None:
    (mark,) = test_sound_presets_have_their_rates.pytestmark  # type: ignore[attr-defined]
    sounds = {name for name in presets() if "khz" in name}
    assert sounds == {case[0] for case in mark.args[1]}
