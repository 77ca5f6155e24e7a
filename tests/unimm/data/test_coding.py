from typing import Any

import pytest
import torch

from unimm.data.coding import AboutOneLength, Coder, Fitting, WholeCodes, fitting
from unimm.data.preparing import Signal
from unimm.sequence import Segment
from unimm.tokenizer import UnifiedTokenizer


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def alone(tokenizer: UnifiedTokenizer, signal: Signal) -> torch.Tensor:
    with torch.no_grad():
        return tokenizer.codecs[signal.kind].encode(signal.values[None])[0]


@pytest.mark.parametrize("size", [(16, 16), (13, 16), (1, 1), (17, 30)])
def test_pictures_filled_up_to_whole_codes_keep_their_codes(
    tokenizer: UnifiedTokenizer, size: tuple[int, int]
) -> None:
    fit = fitting(tokenizer.codecs["image"])
    assert isinstance(fit, WholeCodes)
    picture = noise(3, *size)
    shape = fit.shape(picture)
    assert all(n % 4 == 0 for n in shape[1:])
    filled = fit.fill(picture, shape)
    with torch.no_grad():
        codes = fit.codec.encode(torch.stack([picture, noise(3, *size, seed=1)]))
        assert torch.equal(fit.codec.encode(filled[None])[0], codes[0])


@pytest.mark.parametrize("frames", [1, 2, 5, 6])
def test_films_filled_up_to_whole_codes_keep_their_codes(
    tokenizer: UnifiedTokenizer, frames: int
) -> None:
    fit = fitting(tokenizer.codecs["video"])
    film = noise(3, frames, 14, 16)
    filled = fit.fill(film, fit.shape(film))
    assert (filled.shape[1] - 1) % 4 == 0
    with torch.no_grad():
        codes = fit.codec.encode(film[None])
        assert torch.equal(fit.codec.encode(filled[None]), codes)


@pytest.mark.parametrize("samples", [1, 319, 320, 321, 5000, 12345])
def test_sounds_filled_up_with_silence_keep_their_codes(
    tokenizer: UnifiedTokenizer, samples: int
) -> None:
    fit = fitting(tokenizer.codecs["audio"])
    assert isinstance(fit, AboutOneLength)
    sound = noise(1, samples)
    shape = fit.shape(sound)
    hop = fit.codec.downsample[0]
    assert samples <= shape[1] <= samples * 1.125 + 2 * hop
    with torch.no_grad():
        codes = fit.codec.encode(sound[None])[0]
        filled = fit.codec.encode(fit.fill(sound, shape)[None])[0]
    assert torch.equal(fit.crop(filled, sound), codes)


def test_a_codec_of_which_nothing_is_known_gets_signals_of_one_shape(
    tokenizer: UnifiedTokenizer,
) -> None:
    fit = fitting(tokenizer.codecs["semantic"])
    assert type(fit) is Fitting
    assert fit.shape(noise(3, 16, 17)) == (3, 16, 17)


def test_batches_fill_across_items_and_the_rest_is_flushed(
    tokenizer: UnifiedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    codec = tokenizer.codecs["image"]

    def encode(x: torch.Tensor, encode: Any = codec.encode) -> torch.Tensor:
        sizes.append(len(x))
        return encode(x)

    monkeypatch.setattr(codec, "encode", encode)
    coder = Coder(tokenizer, batch_size=4)
    signals = [Signal("image", noise(3, 16 - n % 2, 16, seed=n)) for n in range(6)]
    wide = [Signal("image", noise(3, 16, 32, seed=n)) for n in range(3)]
    text = coder.add(Segment("text", torch.tensor([1, 2])))
    assert text.done
    slots = [coder.add(signal) for pair in zip(signals[:3], wide, strict=True) for signal in pair]
    slots += [coder.add(signal) for signal in signals[3:]]
    assert sizes == [4]  # of one shape: 15 and 16 rows have the same codes' grid
    coder.flush()
    assert sorted(sizes) == [2, 3, 4]
    order = [s for pair in zip(signals[:3], wide, strict=True) for s in pair] + signals[3:]
    for signal, slot in zip(order, slots, strict=True):
        assert slot.segment is not None
        assert torch.equal(slot.segment.codes, alone(tokenizer, signal))


def test_what_waits_is_bounded(
    tokenizer: UnifiedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimm.data.coding.BATCH_VALUES", 3 * 16 * 16)
    coder = Coder(tokenizer, batch_size=100)
    slots = [coder.add(Signal("image", noise(3, 4, 4 * (1 + n % 40), seed=n))) for n in range(300)]
    waiting = sum(not slot.done for slot in slots)
    assert 0 < waiting <= 4 * 16  # four batches' values, in signals of 48 values or more
    coder.flush()
    assert all(slot.done for slot in slots)


def test_a_signal_that_its_codec_refuses_is_found(tokenizer: UnifiedTokenizer) -> None:
    coder = Coder(tokenizer, batch_size=8)
    good = [coder.add(Signal("semantic", noise(3, 16, 16, seed=n))) for n in range(2)]
    bad = coder.add(Signal("semantic", noise(3, 16, 20)))
    loud = coder.add(Signal("image", noise(3, 16, 16) * 9))
    fine = coder.add(Signal("image", noise(3, 16, 16)))
    coder.flush()
    assert all(slot.segment is not None for slot in [*good, fine])
    assert "16" in bad.error
    assert "[-1, 1]" in loud.error
    assert bad.segment is loud.segment is None
