"""Batches of pictures and their words, put together from several sets of shards."""

from itertools import islice

import pytest
import torch

from unimm.data import dialpad
from unimm.data.captioned import CaptionedDataModule, CaptionedSource, text_bytes
from unimm.data.signals_data import SignalConfig

FORM = SignalConfig(modality="image", size=32)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("captioned")
    dialpad.write_raw_shards(folder, 12, seed=0)
    return str(folder)


def module(raw: str, **changes: bool) -> CaptionedDataModule:
    sources = [
        CaptionedSource(shards=raw, config=FORM, share=3, **changes),
        CaptionedSource(shards=raw, config=FORM, share=2, words=False),
    ]
    made = CaptionedDataModule(sources, val_shards=raw, batch_size=5)
    made.setup("fit")
    return made


def test_every_batch_holds_the_shares_of_its_sources(raw: str) -> None:
    words = {
        text_bytes(dialpad.make_scene(0, index).caption).numpy().tobytes() for index in range(12)
    }
    for batch in islice(module(raw).train_dataloader(), 4):
        assert batch["semantic"].shape == (5, 3, 32, 32)
        assert batch["text"].dtype == torch.uint8
        assert {row.numpy().tobytes() for row in batch["text"][:3]} <= words
        assert batch["text"][3:].eq(0).all()


def test_batches_are_the_same_twice_and_mirrored_ones_are_not(raw: str) -> None:
    once, again, turned = (
        [batch["semantic"] for batch in islice(made.train_dataloader(), 4)]
        for made in (module(raw), module(raw), module(raw, mirrored=True))
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    pairs = [(a, b) for x, y in zip(once, turned, strict=True) for a, b in zip(x, y, strict=True)]
    same = [torch.equal(a, b) for a, b in pairs]
    assert 0 < sum(same) < len(pairs)
    assert all(torch.equal(a, b) or torch.equal(a.flip(-1), b) for a, b in pairs)


def test_validation_shows_each_picture_once(raw: str) -> None:
    shown = [batch["semantic"] for batch in module(raw).val_dataloader()]
    assert [len(x) for x in shown] == [5, 5, 2]


def test_texts_are_cut_and_padded() -> None:
    assert text_bytes(" Frog\n").tolist() == [*b"frog", *(0,) * 60]
    assert len(text_bytes("x" * 99)) == 64


def test_refuses_what_makes_no_batch(raw: str) -> None:
    with pytest.raises(ValueError, match="share must be at least 1"):
        CaptionedSource(shards=raw, config=FORM, share=0)
    with pytest.raises(ValueError, match="semantic codecs take images, of a size"):
        CaptionedSource(shards=raw, config=SignalConfig(modality="image"), share=1)
    other = SignalConfig(modality="image", size=16)
    sources = [CaptionedSource(shards=raw, config=form, share=1) for form in (FORM, other)]
    with pytest.raises(ValueError, match="be of one size and colours"):
        CaptionedDataModule(sources)
