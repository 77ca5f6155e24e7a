from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from unimm.data.loader import Slice
from unimm.data.media import MediaError, decode
from unimm.data.shards import ShardReader
from unimm.data.signals_data import SignalConfig, SignalDataset, SignalPass, SignalStream
from unimm.tokenizer import UnifiedTokenizer, audio_signal, image_signal, video_signal

PICTURES = SignalConfig(modality="image", size=16)
SOUNDS = SignalConfig(modality="audio", num_channels=1, length=1600, sample_rate=8000)


@pytest.fixture
def films(make: Any) -> Path:
    """Pictures and films; the first sample has no film."""
    samples = [{"png": make.png(0)}]
    samples += [{"png": make.png(n), "gif": make.gif(n, frames=5)} for n in range(1, 6)]
    return make.shard(samples)


# What a codec sees is what the tokenizer shows it


def test_pictures_are_the_tokenizers(make: Any, tokenizer: UnifiedTokenizer) -> None:
    folder = make.raw(1, 3)
    dataset = SignalDataset(folder, PICTURES, "image")
    for index, sample in enumerate(ShardReader(folder / "raw-000.tar")):
        picture = decode("png", sample["png"], "")
        expected = image_signal(picture, tokenizer.codecs["image"])
        torch.testing.assert_close(dataset[index], expected, rtol=0, atol=1e-6)
        assert torch.equal(dataset[index], dataset[index])


def test_sounds_and_films_are_the_tokenizers(
    make: Any, films: Path, tokenizer: UnifiedTokenizer
) -> None:
    folder = make.raw(1, 2)
    sound = decode("wav", next(iter(ShardReader(folder / "raw-000.tar")))["wav"], "")
    expected = audio_signal(sound, tokenizer.codecs["audio"])
    torch.testing.assert_close(SignalDataset(folder, SOUNDS, "audio")[0], expected)
    film = decode("gif", ShardReader(films).samples[1]["gif"], "")
    config = SignalConfig(modality="video", size=16)
    expected = video_signal(film, tokenizer.codecs["video"])
    found = SignalDataset(films, config, "video")[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_grey_pictures(make: Any) -> None:
    dataset = SignalDataset(make.raw(1, 1), SignalConfig(modality="image", num_channels=1), "image")
    assert dataset[0].shape == (1, 16, 16)


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("size", [(40, 24), (24, 40), (16, 16), (10, 9), (1, 1)])
def test_pictures_of_any_size_come_at_one(make: Any, size: tuple[int, int], crop: Any) -> None:
    path = make.shard([{"png": make.png(0, *size)}])
    config = SignalConfig(modality="image", size=16, crop=crop)
    for training in (False, True):
        signal = SignalDataset(path, config, "image", training=training).signal(0, epoch=3)
        assert signal.shape == (3, 16, 16)
        assert signal.min() >= -1
        assert signal.max() <= 1


def test_the_middle_is_cut_out(make: Any) -> None:
    path = make.shard([{"png": make.png(0, 20, 16)}])
    whole = SignalDataset(path, SignalConfig(modality="image"), "image")[0]
    middle = SignalDataset(path, PICTURES, "image")[0]
    assert torch.equal(middle, whole[:, :, 2:18])


def test_random_windows_stand_where_the_epoch_says(make: Any) -> None:
    path = make.shard([{"png": make.png(0, 40, 30)}])
    config = SignalConfig(modality="image", size=16, crop="random")
    dataset = SignalDataset(path, config, "image", training=True, seed=5)
    whole = SignalDataset(path, SignalConfig(modality="image"), "image")[0]
    windows = {e: dataset.signal(0, e) for e in range(6)}
    assert len({w.numpy().tobytes() for w in windows.values()}) > 3
    places = whole.unfold(1, 16, 1).unfold(2, 16, 1)
    for epoch, window in windows.items():
        assert (places == window[:, None, None]).all(dim=(0, 3, 4)).any()  # type: ignore[call-overload]
        again = SignalDataset(path, config, "image", training=True, seed=5).signal(0, epoch)
        assert torch.equal(window, again)


def test_shifts_move_pictures_by_whole_pixels(make: Any) -> None:
    folder = make.raw(1, 1)
    plain = SignalDataset(folder, PICTURES, "image")[0]
    config = SignalConfig(modality="image", size=16, shift=2)
    assert torch.equal(SignalDataset(folder, config, "image")[0], plain)
    dataset = SignalDataset(folder, config, "image", training=True)
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2), mode="replicate")
    possible = [padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
    seen = set()
    for epoch in range(60):
        signal = dataset.signal(0, epoch)
        matches = [n for n, shifted in enumerate(possible) if torch.equal(signal, shifted)]
        assert matches
        seen.update(matches)
    assert len(seen) > 15


@pytest.mark.parametrize(("frames", "shown"), [(3, [1, 2, 3]), (5, [0, 1, 2, 3, 4])])
def test_films_are_cut(films: Path, frames: int, shown: list[int]) -> None:
    whole = SignalDataset(films, SignalConfig(modality="video"), "video")[0]
    config = SignalConfig(modality="video", size=16, frames=frames)
    cut = SignalDataset(films, config, "video")[0]
    assert torch.equal(cut, whole[:, shown])


def test_short_films_repeat_their_last_frame_and_short_sounds_end_in_silence(
    make: Any, films: Path
) -> None:
    config = SignalConfig(modality="video", size=16, frames=7)
    film = SignalDataset(films, config, "video")[0]
    assert torch.equal(film[:, 5], film[:, 4])
    assert torch.equal(film[:, 6], film[:, 4])
    config = SignalConfig(modality="audio", num_channels=1, length=2000, sample_rate=8000)
    sound = SignalDataset(make.raw(1, 1), config, "audio", training=True)[0]
    assert sound.shape == (1, 2000)
    assert not sound[:, 1600:].any()
    assert sound[:, :1600].any()


def test_long_sounds_are_cut_at_random_in_training(make: Any) -> None:
    config = SignalConfig(modality="audio", num_channels=1, length=400, sample_rate=8000)
    folder = make.raw(1, 1)
    whole = SignalDataset(folder, SOUNDS, "audio")[0][0]
    assert torch.equal(SignalDataset(folder, config, "audio")[0][0], whole[600:1000])
    dataset = SignalDataset(folder, config, "audio", training=True)
    windows = whole.unfold(0, 400, 1)
    starts = set()
    for epoch in range(5):
        matches = (windows == dataset.signal(0, epoch)[0]).all(dim=1).nonzero()
        assert len(matches) == 1
        starts.add(int(matches))
    assert len(starts) > 2


# Batches


def batches_of(
    paths: Path, config: SignalConfig, part: Slice, count: int, workers: int = 0
) -> list[dict[str, torch.Tensor]]:
    datasets = [SignalDataset(paths, config, kind, training=True) for kind in config.kinds]
    stream = SignalStream(datasets, part, config, seed=2)
    return list(islice(DataLoader(stream, None, num_workers=workers), count))


def test_pictures_and_films_take_turns(films: Path) -> None:
    config = SignalConfig(
        modality="image+video", size=16, frames=5, video_share=0.25, video_batch_size=2
    )
    batches = batches_of(films, config, Slice(4), 8)
    assert [list(batch) for batch in batches] == [["image"]] * 3 + [["video"]] + [["image"]] * 3 + [
        ["video"]
    ]
    assert batches[0]["image"].shape == (4, 3, 16, 16)
    assert batches[3]["video"].shape == (2, 3, 5, 16, 16)


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (1, 2), (2, 2)])
def test_order_depends_on_neither_ranks_nor_workers(films: Path, world: int, workers: int) -> None:
    config = SignalConfig(modality="image+video", size=16, frames=5, shift=1, video_share=0.4)
    whole = batches_of(films, config, Slice(4), 7)
    parts = [
        batches_of(films, config, Slice(4 // world, r, world), 7, workers) for r in range(world)
    ]
    for number, batch in enumerate(whole):
        for kind, signals in batch.items():
            joined = torch.cat([part[number][kind] for part in parts])
            assert torch.equal(joined, signals)


def test_a_stream_goes_on_where_it_was(films: Path) -> None:
    config = SignalConfig(modality="image+video", size=16, frames=5, shift=1)
    whole = batches_of(films, config, Slice(3), 9)
    rest = batches_of(films, config, Slice(3, start=5), 4)
    for one, two in zip(whole[5:], rest, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[kind], two[kind]) for kind in one)


@pytest.mark.parametrize("world", [1, 2])
def test_validation_shows_every_signal_once(films: Path, world: int) -> None:
    config = SignalConfig(modality="image+video", size=16, frames=5, shift=2, video_batch_size=2)
    datasets = [SignalDataset(films, config, kind) for kind in config.kinds]
    counts = {"image": 0, "video": 0}
    for rank in range(world):
        part = SignalPass(datasets, Slice(4, rank, world), config)
        for batch in DataLoader(part, None):
            for kind, signals in batch.items():
                counts[kind] += len(signals)
    assert counts == {"image": 6, "video": 5}


# What can't be


def test_shards_without_the_kind_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"none of 2 samples in 1 shards has .*'video' \(gif"):
        SignalDataset(make.raw(1, 2), SignalConfig(modality="video"), "video")


def test_signals_of_several_shapes_need_a_size(make: Any) -> None:
    path = make.shard([{"png": make.png(0, 8, 8)}, {"png": make.png(0, 9, 8)}])
    config = SignalConfig(modality="image")
    dataset = SignalDataset(path, config, "image")
    part = SignalPass([dataset], Slice(2), config)
    with pytest.raises(ValueError, match=r"image signals of different shapes .*: set size"):
        list(part)


def test_a_damaged_file_is_named(make: Any) -> None:
    path = make.shard([{"png": make.png(0)[:50]}])
    with pytest.raises(MediaError, match=r"one\.tar: sample 0000: \.png: damaged"):
        SignalDataset(path, PICTURES, "image")[0]


def damaged(make: Any, bad: set[int], max_damaged: float) -> SignalDataset:
    """Ten pictures, some of them cut."""
    pictures = [{"png": make.png(n)[:60] if n in bad else make.png(n)} for n in range(10)]
    config = SignalConfig(modality="image", size=8, max_damaged=max_damaged)
    return SignalDataset(make.shard(pictures), config, "image", training=True)


def test_damaged_files_are_skipped_counted_and_named(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = damaged(make, {9}, 0.2)
    batches = list(islice(SignalStream([dataset], Slice(5), dataset.config, 0), 4))
    assert all(batch["image"].shape == (5, 3, 8, 8) for batch in batches)
    assert len(dataset.damaged) == 1
    assert dataset.asked == 22  # two epochs, and the one that took its place in each
    assert "skipped" in caplog.text
    assert "0009" in caplog.text
    shown = sum(len(batch["image"]) for batch in SignalPass([dataset], Slice(4), dataset.config))
    assert shown == 10


def test_too_many_damaged_files_stop_the_run(make: Any) -> None:
    dataset = damaged(make, {1, 3, 5, 7, 9}, 0.1)
    with pytest.raises(ValueError, match=r"damaged of \d+ signals are more than 10.0%, such as "):
        list(islice(SignalStream([dataset], Slice(5), dataset.config, 0), 4))
    with pytest.raises(ValueError, match="every file is damaged"):
        damaged(make, set(range(10)), 1.0).intact(0)


@pytest.mark.parametrize(
    "options",
    [
        {"modality": "audio", "num_channels": 1, "length": 100},
        {"modality": "audio", "length": 100, "sample_rate": 8000},
        {"modality": "image", "num_channels": 2},
        {"modality": "image", "crop": "random"},
        {"modality": "image", "size": 0},
        {"modality": "image", "shift": -1},
        {"modality": "image+video", "video_share": 1.0},
    ],
)
def test_configs_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give length|num_channels|needs a size|above 0|shift"):
        SignalConfig(**options)


def test_what_does_not_fit_is_read_again(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make.raw(1, 3)
    monkeypatch.setattr("unimm.data.signals_data.CACHE_BYTES", 16 * 16 * 3)
    dataset = SignalDataset(folder, PICTURES, "image")
    first = [dataset[index] for index in range(3)]
    assert all(torch.equal(dataset[index], first[index]) for index in range(3))
    assert np.array_equal(sorted(dataset._cache), [0])
