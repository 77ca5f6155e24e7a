"""Raw shards -> batches of signals, for training codecs.

Pictures, films and sounds are read by offset, brought to one size, and kept decoded (8 bits a
value; sounds as they are) up to a bound. What a codec sees is made by the functions that the
tokenizer uses. Crops and shifts are decided by (seed, epoch, number), so that a run that is resumed
sees what it would have seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset

from unimm.data.damage import MediaError
from unimm.data.loader import EpochOrder, Slice, worker_turns
from unimm.data.media import decode
from unimm.data.preparing import SignalForm
from unimm.data.shards import Sample, ShardReader, expand
from unimm.data.templates import KINDS
from unimm.signals import Audio, Video
from unimm.tokenizer import audio_signal, image_signal, video_signal
from unimm_tokenizers.codec import Codec

Kind = Literal["image", "video", "audio"]
CACHE_BYTES = 2**30
_log = logging.getLogger("unimm")


@dataclass(frozen=True, kw_only=True)
class SignalConfig:
    """What a codec is trained on.

    Args:
        modality: "image", "video", "audio", or "image+video" (pictures and films by turns).
        num_channels: colours (1 or 3), or channels of sound.
        size: height and width in pixels; None takes pictures as they are, all of one size.
        crop: "center" scales a picture's shorter side to `size` and cuts its middle out; "random"
            cuts a window out of the unscaled picture, anywhere in training, the middle otherwise.
        shift: in training, move pictures by up to so many pixels, the edge repeated.
        frames: frames of a film; longer ones are cut, shorter ones repeat their last frame; None
            takes films as they are, all of one length.
        fps: frames per second that films are brought to; None leaves them.
        length: samples of a sound; longer ones are cut, shorter ones end in silence.
        sample_rate: samples per second that sounds are brought to.
        video_share: share of the batches that hold films, for "image+video".
        video_batch_size: films in a batch; the batch size of pictures when None.
        max_damaged: share of the files asked for that may be damaged before a run stops.

    Raises:
        ValueError: a number is out of range, or one that the modality needs is missing.
    """

    modality: Literal["image", "video", "image+video", "audio"]
    num_channels: int = 3
    size: int | None = None
    crop: Literal["center", "random"] = "center"
    shift: int = 0
    frames: int | None = None
    fps: float | None = None
    length: int | None = None
    sample_rate: int | None = None
    video_share: float = 0.5
    video_batch_size: int | None = None
    max_damaged: float = 0.01

    def __post_init__(self) -> None:
        if self.modality == "audio" and (self.length is None or self.sample_rate is None):
            raise ValueError("modality audio: give length (samples) and sample_rate (Hz)")
        allowed = (1, 2) if self.modality == "audio" else (1, 3)
        if self.num_channels not in allowed:
            raise ValueError(
                f"modality {self.modality}: num_channels must be {allowed[0]} or {allowed[1]}, "
                f"got {self.num_channels}"
            )
        if self.crop == "random" and self.size is None:
            raise ValueError("crop 'random' needs a size")
        for name in ("size", "frames", "fps", "length", "sample_rate", "video_batch_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: must be above 0, got {value}")
        if self.shift < 0 or not 0 < self.video_share < 1:
            raise ValueError("shift must be 0 or more, and video_share between 0 and 1")
        if not 0 <= self.max_damaged <= 1:
            raise ValueError(f"max_damaged: a share between 0 and 1, got {self.max_damaged}")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of signal in the batches."""
        return cast("tuple[Kind, ...]", tuple(self.modality.split("+")))


class SignalDataset(Dataset[Tensor]):
    """Signals of one kind: float32 (C, H, W), (C, T, H, W) or (C, T), in [-1, 1].

    Args:
        shards: raw shards, as `unimm.data.shards.expand` understands them.
        config: sizes, rates and what is varied.
        kind: "image", "video" or "audio".
        training: vary what the config says; otherwise every signal is the same each time.
        seed: decides the variation.

    Raises:
        ValueError: no sample holds a file of that kind.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        config: SignalConfig,
        kind: Kind,
        *,
        training: bool = False,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.kind: Kind = kind
        self.training = training
        self.seed = seed
        self._sources: list[tuple[Sample, str]] = []
        paths = expand(shards)
        total = 0
        for path in paths:
            for sample in ShardReader(path):
                total += 1
                found = next((name for name in KINDS[kind] if name in sample), None)
                if found is not None:
                    self._sources.append((sample, found))
        if not self._sources:
            raise ValueError(
                f"{paths[0]}: none of {total} samples in {len(paths)} shards has a file of kind "
                f"{kind!r} ({', '.join(KINDS[kind])})"
            )
        if len(self._sources) < total:
            _log.info("%d of %d samples hold %s", len(self._sources), total, kind)
        self._cache: dict[int, Tensor] = {}
        self._cached = 0
        self.asked = 0
        self.damaged: set[str] = set()

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> Tensor:
        return self.signal(index)

    def signal(self, index: int, epoch: int = 0) -> Tensor:
        """One signal, as this epoch shows it.

        Raises:
            MediaError: its file is damaged; names shard and key.
        """
        stored = self._cache.get(index)
        if stored is None:
            stored = self._load(index)
            if self._cached + stored.nbytes <= CACHE_BYTES:
                self._cache[index] = stored
                self._cached += stored.nbytes
        random = np.random.default_rng([self.seed, epoch, index])
        if self.kind == "audio":
            assert self.config.length is not None
            return _window(stored, -1, self.config.length, self._choose(random), silence=True)
        signal = stored
        if self.kind == "video" and self.config.frames is not None:
            signal = _window(signal, 1, self.config.frames, self._choose(random))
        if self.config.size is not None:
            for axis in (-2, -1):
                signal = _window(signal, axis, self.config.size, self._choose(random))
        signal = signal.float() / 127.5 - 1
        if self.training and self.config.shift:
            signal = _shifted(signal, self.config.shift, random)
        return signal

    def intact(self, index: int, epoch: int = 0) -> tuple[int, Tensor]:
        """Number and signal of the first from `index` on whose file is not damaged.

        Damaged ones are counted in `damaged`, named in the log, and passed over.

        Raises:
            ValueError: more of the files asked for are damaged than the config allows, or all are.
        """
        for offset in range(len(self)):
            number = (index + offset) % len(self)
            self.asked += 1
            try:
                return number, self.signal(number, epoch)
            except MediaError as error:
                self._note(error)
        raise ValueError(f"{self._sources[0][0].shard}: every file is damaged")

    def _note(self, error: MediaError) -> None:
        self.damaged.add(error.where)
        if len(self.damaged) > max(1.0, self.config.max_damaged * self.asked):
            named = ", ".join(sorted(self.damaged)[:3])
            raise ValueError(
                f"{len(self.damaged)} damaged of {self.asked} signals are more than "
                f"{self.config.max_damaged:.1%}, such as {named}: {error.reason}"
            ) from error
        _log.warning("skipped: %s (%d so far)", error, len(self.damaged))

    def text(self, index: int) -> str:
        """The words that stand beside a signal as `.txt`; empty where there are none."""
        sample, _ = self._sources[index]
        return sample["txt"].decode(errors="replace") if "txt" in sample else ""

    def _choose(self, random: np.random.Generator) -> np.random.Generator | None:
        """Where a window stands: anywhere in training, in the middle otherwise."""
        return random if self.training else None

    def _load(self, index: int) -> Tensor:
        """uint8 (C, H, W) or (C, T, H, W), or float32 (C, T), before cutting."""
        sample, extension = self._sources[index]
        item = decode(extension, sample[extension], sample.where)
        rate = item.fps if isinstance(item, Video) else 0.0
        fps = self.config.fps or rate
        form = SignalForm(self.config.num_channels, self.config.sample_rate, (), fps)
        codec = cast(Codec, form)
        if isinstance(item, Audio):
            return audio_signal(item, codec)
        if isinstance(item, Video):
            return _to_bytes(self._sized_film(video_signal(item, codec)))
        assert isinstance(item, Image.Image)
        return _to_bytes(image_signal(self._sized(item), codec))

    def _sized(self, picture: Image.Image) -> Image.Image:
        size = self._scaled(picture.height, picture.width)
        if size is None:
            return picture
        # Palettes can't be scaled smoothly; RGB can.
        plain = picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
        return plain.resize((size[1], size[0]), Image.Resampling.BICUBIC)

    def _sized_film(self, film: Tensor) -> Tensor:
        size = self._scaled(*film.shape[-2:])
        if size is None:
            return film
        frames = F.interpolate(film.movedim(1, 0), size, mode="bicubic", antialias=True)
        return frames.movedim(0, 1).clamp(-1, 1)

    def _scaled(self, height: int, width: int) -> tuple[int, int] | None:
        """Height and width to scale to before cutting; None leaves them."""
        size = self.config.size
        if size is None or (self.config.crop == "random" and min(height, width) >= size):
            return None
        if min(height, width) == size:
            return None
        scale = size / min(height, width)
        return max(size, round(height * scale)), max(size, round(width * scale))


def _to_bytes(signal: Tensor) -> Tensor:
    return ((signal + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _window(
    signal: Tensor,
    axis: int,
    length: int,
    random: np.random.Generator | None,
    *,
    silence: bool = False,
) -> Tensor:
    """Cut an axis to a length; a shorter one is filled with silence, or with its last entry."""
    spare = signal.shape[axis] - length
    if spare > 0:
        start = spare // 2 if random is None else int(random.integers(spare + 1))
        return signal.narrow(axis, start, length)
    if spare == 0:
        return signal
    shape = list(signal.shape)
    shape[axis] = -spare
    if silence:
        return torch.cat([signal, signal.new_zeros(shape)], axis)
    return torch.cat([signal, signal.narrow(axis, signal.shape[axis] - 1, 1).expand(shape)], axis)


def _shifted(signal: Tensor, most: int, random: np.random.Generator) -> Tensor:
    """Move a picture or film, its edge repeated."""
    height, width = signal.shape[-2:]
    down, right = (int(n) for n in random.integers(0, 2 * most + 1, 2))
    padded = F.pad(signal, (most,) * 4, mode="replicate")
    return padded[..., down : down + height, right : right + width]


class SignalStream(IterableDataset[dict[str, Tensor]]):
    """Batches for training, without end: `{"image": (B, C, H, W)}` and so on, one kind at a time.

    Args:
        datasets: one per kind; of two, the second has `config.video_share` of the batches.
        part: what this rank makes of them; its `start` counts global batches.
        config: how pictures and films take turns.
        seed: decides the order of each epoch.
    """

    def __init__(
        self, datasets: Sequence[SignalDataset], part: Slice, config: SignalConfig, seed: int
    ) -> None:
        self.datasets = list(datasets)
        self.part = part
        self.config = config
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        orders = [EpochOrder(len(dataset), self.seed) for dataset in self.datasets]
        for turn in worker_turns():
            which, before = self._turn(self.part.start + turn)
            dataset = self.datasets[which]
            size = self._size(dataset)
            first = (before * self.part.world + self.part.rank) * size
            places = [orders[which](first + i) for i in range(size)]
            yield _stack(dataset, [(index, epoch) for epoch, index in places])

    def _turn(self, batch: int) -> tuple[int, int]:
        """Which dataset makes a global batch, and how many of its batches came before."""
        if len(self.datasets) == 1:
            return 0, batch
        share = self.config.video_share
        films = int(batch * share)
        is_film = int((batch + 1) * share) > films
        return (1, films) if is_film else (0, batch - films)

    def _size(self, dataset: SignalDataset) -> int:
        return _batch_size(dataset, self.part, self.config)


class SignalPass(IterableDataset[dict[str, Tensor]]):
    """Batches for validation: every signal once, in order; last batches may be smaller.

    Args:
        datasets: one per kind, one after the other.
        part: what this rank makes of them; its `start` is not used.
        config: sizes of batches.
    """

    def __init__(
        self, datasets: Sequence[SignalDataset], part: Slice, config: SignalConfig
    ) -> None:
        self._batches: list[tuple[SignalDataset, range]] = []
        for dataset in datasets:
            mine = range(part.rank, len(dataset), part.world)
            size = _batch_size(dataset, part, config)
            self._batches += [
                (dataset, mine[start : start + size]) for start in range(0, len(mine), size)
            ]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for turn in worker_turns(len(self._batches)):
            dataset, indices = self._batches[turn]
            yield _stack(dataset, [(index, 0) for index in indices])


def _batch_size(dataset: SignalDataset, part: Slice, config: SignalConfig) -> int:
    if dataset.kind == "video" and config.video_batch_size is not None:
        return config.video_batch_size
    return part.batch_size


def _stack(dataset: SignalDataset, places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    signals = [dataset.intact(index, epoch)[1] for index, epoch in places]
    shapes = {tuple(signal.shape) for signal in signals}
    if len(shapes) > 1:
        need = "frames" if dataset.kind == "video" and dataset.config.size else "size"
        raise ValueError(
            f"{dataset.kind} signals of different shapes {sorted(shapes)[:2]} can't be one batch: "
            f"set {need}"
        )
    return {dataset.kind: torch.stack(signals)}
