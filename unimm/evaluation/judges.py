"""Judges read digits from pictures, sounds and films, to measure what a model made.

A judge is called with a list and answers with a list: `ImageJudge` (pictures), `ToneJudge`
(telephone tones, by rule), `SpeechJudge` (spoken digits) give digits, `FilmJudge` gives (digit,
direction). None means that nothing can be read. The learned ones are small convolutional networks,
augmented with blur, noise and small warps, so that what a codec loses does not by itself confuse
them. Training is deterministic under its seed (and a fixed number of threads).

Measured with the defaults on one core, held-out: dial-pad pictures and films 100% after 7 to 11 s
each (2,700 examples), MNIST 99.6% after 24 s (8,000), spoken digits 99.7% after 41 s (2,400).

A saved judge is a folder with `config.json` and `model.safetensors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from PIL import Image
from torch import Tensor, nn

from unimm.evaluation.goertzel import ToneJudge, goertzel_power, read_dtmf
from unimm.signals import Audio, Video
from unimm_tokenizers.codec import config_from_dict
from unimm_tokenizers.storage import CONFIG_FILE, load_tensors, read_json, save_model

__all__ = [
    "FilmJudge",
    "ImageJudge",
    "SpeechJudge",
    "ToneJudge",
    "TrainedJudge",
    "goertzel_power",
    "read_direction",
    "read_dtmf",
    "train_film_judge",
    "train_image_judge",
    "train_speech_judge",
]

SIZE = 32
_SPEECH_RATE, _MELS, _SPEECH_FRAMES = 8000, 40, 100
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Shape of a `DigitNetwork`: input channels, width of its layers, cells left at its head."""

    channels: int
    width: int = 24
    grid: tuple[int, int] = (4, 4)


class DigitNetwork(nn.Module):
    """Three convolutions and a linear head: (B, C, H, W) float -> logits (B, 10)."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build with random weights."""
        super().__init__()
        width = config.width
        self.config = config
        self.layers = nn.Sequential(
            nn.Conv2d(config.channels, width, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 3 * width, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(3 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(config.grid),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(3 * width * config.grid[0] * config.grid[1], 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of inputs (B, C, H, W)."""
        return self.layers(x)

    @torch.no_grad()
    def log_probabilities(self, x: Tensor) -> Tensor:
        """Log-probabilities (N, 10) in evaluation mode, in batches."""
        self.eval()
        parts = [F.log_softmax(self(batch), dim=-1) for batch in x.split(_BATCH)]
        return torch.cat(parts) if parts else torch.zeros(0, 10)


class NetworkJudge:
    """What the learned judges share: a network, and a folder that holds it."""

    kind: ClassVar[str]

    def __init__(self, network: DigitNetwork) -> None:
        """Wrap a trained network."""
        self.network = network

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`, each moved into place whole."""
        facts = {"judge": self.kind, **asdict(self.network.config)}
        save_model(folder, facts, self.network.state_dict(), torch.float16)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: a file is missing or damaged, or it holds a judge of another kind.
        """
        where = folder / CONFIG_FILE
        facts = read_json(where)
        kind = facts.pop("judge", None) if isinstance(facts, dict) else None
        if kind != cls.kind:
            raise ValueError(f"{where}: holds a judge of {kind!r}; expected {cls.kind!r}")
        network = DigitNetwork(config_from_dict(NetworkConfig, facts, str(where)))
        try:
            network.load_state_dict(load_tensors(folder))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder}: weights do not fit config.json ({reason})") from error
        return cls(network)


class ImageJudge(NetworkJudge):
    """Reads the digit in a picture; pictures of another size are resized to 32x32."""

    kind = "image"

    def __call__(self, items: Sequence[Image.Image]) -> list[int | None]:
        """The digit in each picture."""
        images = image_tensor(items, self.network.config.channels)
        return list(self.log_probabilities(images).argmax(dim=-1).tolist())

    def log_probabilities(self, images: Tensor) -> Tensor:
        """Log-probabilities (N, 10) of images (N, C, 32, 32), float in [-1, 1]."""
        return self.network.log_probabilities(images)


class SpeechJudge(NetworkJudge):
    """Reads the digit in a recording from its log-mel spectrogram, up to one second of it."""

    kind = "speech"

    def __call__(self, items: Sequence[Audio]) -> list[int | None]:
        """The digit that each sound says; None for an empty or silent one."""
        audible = [i for i, audio in enumerate(items) if _audible(audio)]
        answers: list[int | None] = [None] * len(items)
        if audible:
            features = speech_features([items[i] for i in audible])
            digits = self.network.log_probabilities(features).argmax(dim=-1).tolist()
            for i, digit in zip(audible, digits, strict=True):
                answers[i] = digit
        return answers


class FilmJudge(NetworkJudge):
    """Reads (digit, direction) from a film: the digit from its centred frames, the rest by rule."""

    kind = "film"

    def __call__(self, items: Sequence[Video]) -> list[tuple[int | None, str | None]]:
        """Digit and direction of each film; (None, None) for one without a foreground."""
        answers: list[tuple[int | None, str | None]] = []
        for video in items:
            frames = centered_frames(video)
            digit = None
            if len(frames):
                digit = int(self.network.log_probabilities(frames).mean(dim=0).argmax())
            answers.append((digit, read_direction(video)))
        return answers


def image_tensor(items: Sequence[Image.Image], channels: int) -> Tensor:
    """Pictures as float (N, channels, 32, 32) in [-1, 1]."""
    arrays = []
    for item in items:
        picture = item.convert("L" if channels == 1 else "RGB")
        if picture.size != (SIZE, SIZE):
            picture = picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        arrays.append(np.asarray(picture).reshape(SIZE, SIZE, channels))
    if not arrays:
        return torch.zeros(0, channels, SIZE, SIZE)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def speech_features(items: Sequence[Audio]) -> Tensor:
    """Log-mel spectrograms (N, 1, 40, 100) in [-1, 1]: one second at 8 kHz, 10 ms a column.

    Levels are relative to the loudest cell and reach 60 dB down, so gain does not matter.
    """
    mel = torchaudio.transforms.MelSpectrogram(
        _SPEECH_RATE, n_fft=256, hop_length=80, f_min=60.0, n_mels=_MELS
    )
    features = torch.full((len(items), 1, _MELS, _SPEECH_FRAMES), -1.0)
    for row, audio in zip(features, items, strict=True):
        sound = audio.samples.detach().float().cpu().mean(dim=0)
        if audio.sample_rate != _SPEECH_RATE:
            sound = torchaudio.functional.resample(sound, audio.sample_rate, _SPEECH_RATE)
        # A spectrogram by reflection needs more than half a window.
        sound = F.pad(sound[:_SPEECH_RATE], (0, max(0, 256 - sound.shape[0])))
        level = 10 * torch.log10(mel(sound).clamp_min(1e-10))[:, :_SPEECH_FRAMES]
        row[0, :, : level.shape[1]] = (level - level.max()).clamp_min(-60) / 30 + 1
    return features


def read_direction(video: Video) -> str | None:
    """Direction in which the foreground's centre of mass moves: "left", "right", "up", "down".

    The centres of the first and the last third are compared. None: no foreground, a way shorter
    than a tenth of the frame, or one axis not at least 1.5 times the other.
    """
    weight = _foreground(video)
    third = max(1, len(weight) // 3)
    if len(weight) < 2 or float(weight.sum(dim=(1, 2)).min()) == 0:
        return None
    center = _center_of_mass(weight)
    x, y = (center[-third:].mean(dim=0) - center[:third].mean(dim=0)).tolist()
    long, short = max(abs(x), abs(y)), min(abs(x), abs(y))
    if long < 0.1 * min(weight.shape[1:]) or long < 1.5 * short:
        return None
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "up" if y < 0 else "down"


def centered_frames(video: Video) -> Tensor:
    """Frames with a foreground, moved so that it is central: float (N, 3, 32, 32) in [-1, 1]."""
    weight = _foreground(video)
    seen = weight.sum(dim=(1, 2)) > 0
    frames = video.frames[seen].permute(0, 3, 1, 2).float() / 127.5 - 1
    if not len(frames):
        return torch.zeros(0, 3, SIZE, SIZE)
    middle = torch.tensor([frames.shape[3] / 2, frames.shape[2] / 2])
    shifts = (middle - _center_of_mass(weight[seen])).round().int().tolist()
    # The background is plain, so what leaves on one side may come in on the other.
    moved = [torch.roll(f, (y, x), dims=(1, 2)) for f, (x, y) in zip(frames, shifts, strict=True)]
    return F.interpolate(torch.stack(moved), (SIZE, SIZE), mode="bilinear", align_corners=False)


Judge = TypeVar("Judge")


class TrainedJudge(NamedTuple, Generic[Judge]):
    """A judge, and the share of `examples` held-out items that it reads right."""

    judge: Judge
    accuracy: float
    examples: int


def train_image_judge(
    images: Tensor,
    labels: Tensor,
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    epochs: int = 6,
) -> TrainedJudge[ImageJudge]:
    """Train a reader of pictures.

    Args:
        images: float (N, C, 32, 32) in [-1, 1], C 1 or 3.
        labels: int64 (N,), digits.
        validation: held-out images and labels; None holds out a random tenth.
        seed: fixes weights, order and augmentation.
        epochs: passes over the images.

    Raises:
        ValueError: shapes do not fit together.
    """
    if images.ndim != 4 or images.shape[2:] != (SIZE, SIZE):
        raise ValueError(f"train_image_judge: images {tuple(images.shape)}, not (N, C, 32, 32)")
    config = NetworkConfig(channels=images.shape[1])
    network, accuracy, examples = _train_and_validate(
        config, (images, labels), validation, _PICTURE_WARP, seed=seed, epochs=epochs
    )
    return TrainedJudge(ImageJudge(network), accuracy, examples)


def train_speech_judge(
    sounds: Sequence[Audio],
    labels: Tensor,
    *,
    validation: tuple[Sequence[Audio], Tensor] | None = None,
    seed: int = 0,
    epochs: int = 12,
) -> TrainedJudge[SpeechJudge]:
    """Train a reader of spoken digits; arguments as in `train_image_judge`."""
    held_out = None
    if validation is not None:
        held_out = (speech_features(validation[0]), validation[1])
    network, accuracy, examples = _train_and_validate(
        NetworkConfig(channels=1, grid=(5, 4)),
        (speech_features(sounds), labels),
        held_out,
        _SPEECH_WARP,
        seed=seed,
        epochs=epochs,
    )
    return TrainedJudge(SpeechJudge(network), accuracy, examples)


def train_film_judge(
    films: Sequence[Video],
    labels: Tensor,
    *,
    validation: tuple[Sequence[Video], Tensor] | None = None,
    seed: int = 0,
    epochs: int = 6,
) -> TrainedJudge[FilmJudge]:
    """Train a reader of films on their middle frames; arguments as in `train_image_judge`.

    The accuracy is that of the digits of whole held-out films; the direction is read by rule.
    """
    if labels.shape != (len(films),):
        raise ValueError(f"judge: {len(films)} films, but labels of shape {tuple(labels.shape)}")
    kept = list(range(len(films)))
    if validation is None:
        kept, held = (rows.tolist() for rows in _hold_out(len(films), seed))
        validation = ([films[i] for i in held], labels[held])
    frames = []
    for i in kept:
        middle = len(films[i].frames) // 2
        frame = centered_frames(Video(films[i].frames[middle : middle + 1], films[i].fps))
        if not len(frame):
            raise ValueError(f"train_film_judge: film {i} has an empty middle frame; remove it")
        frames.append(frame)
    config = NetworkConfig(channels=3)
    judge = FilmJudge(
        _train(config, torch.cat(frames), labels[kept], _PICTURE_WARP, seed=seed, epochs=epochs)
    )
    right = [
        answer == label
        for (answer, _), label in zip(judge(validation[0]), validation[1].tolist(), strict=True)
    ]
    return TrainedJudge(judge, sum(right) / len(right), len(right))


@dataclass(frozen=True, kw_only=True)
class _Warp:
    """Ranges of a random warp: degrees, relative scale and shift (pixels) in x and y, noise."""

    degrees: float
    scale: tuple[float, float]
    shift: tuple[float, float]
    noise: float

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A warped, blurred and noisy copy of x (B, C, H, W)."""
        batch, _, height, width = x.shape

        def uniform(limit: float) -> Tensor:
            return (torch.rand(batch, generator=generator) * 2 - 1) * limit

        angle = torch.deg2rad(uniform(self.degrees))
        scale_x, scale_y = 1 + uniform(self.scale[0]), 1 + uniform(self.scale[1])
        shift_x = uniform(2 * self.shift[0] / width)
        shift_y = uniform(2 * self.shift[1] / height)
        rows = (
            torch.stack([angle.cos() / scale_x, -angle.sin(), shift_x], dim=-1),
            torch.stack([angle.sin(), angle.cos() / scale_y, shift_y], dim=-1),
        )
        grid = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
        warped = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        blurred = F.avg_pool2d(warped, 3, stride=1, padding=1, count_include_pad=False)
        mixed = torch.lerp(warped, blurred, torch.rand(batch, 1, 1, 1, generator=generator))
        level = self.noise * torch.rand(batch, 1, 1, 1, generator=generator)
        return mixed + level * torch.randn(x.shape, generator=generator)


_PICTURE_WARP = _Warp(degrees=10, scale=(0.1, 0.1), shift=(2, 2), noise=0.2)
# On a spectrogram x is time (10 ms a pixel) and y is mel frequency.
_SPEECH_WARP = _Warp(degrees=0, scale=(0.15, 0.06), shift=(6, 1.5), noise=0.2)


def _hold_out(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and a random tenth to hold out."""
    if count < 20:
        raise ValueError(f"judge: {count} items are too few to hold out a tenth; give 20 or more")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[count // 10 :], order[: count // 10]


def _train_and_validate(
    config: NetworkConfig,
    data: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor] | None,
    warp: _Warp,
    *,
    seed: int,
    epochs: int,
) -> tuple[DigitNetwork, float, int]:
    """Train on `data` (inputs, labels); returns the network, held-out accuracy and examples."""
    inputs, labels = data
    if labels.shape != inputs.shape[:1]:
        raise ValueError(f"judge: {len(inputs)} items, but labels of shape {tuple(labels.shape)}")
    if validation is None:
        kept, held = _hold_out(len(inputs), seed)
        validation = (inputs[held], labels[held])
        inputs, labels = inputs[kept], labels[kept]
    network = _train(config, inputs, labels, warp, seed=seed, epochs=epochs)
    answers = network.log_probabilities(validation[0]).argmax(dim=-1)
    return network, float((answers == validation[1]).float().mean()), len(answers)


def _train(
    config: NetworkConfig, inputs: Tensor, labels: Tensor, warp: _Warp, *, seed: int, epochs: int
) -> DigitNetwork:
    """Train with AdamW and a one-cycle schedule."""
    batch_size = 64
    generator = torch.Generator().manual_seed(seed + 1)
    # Dropout and initial weights draw from the global stream, which is put back afterwards.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = DigitNetwork(config)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.02)
        steps = epochs * -(-len(inputs) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
        network.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(inputs), generator=generator).split(batch_size):
                logits = network(warp(inputs[rows], generator))
                loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    # Judges are kept in half precision: what is measured is what a reader loads.
    return network.half().float().eval()


def _foreground(video: Video) -> Tensor:
    """Weight (T, H, W) of what differs from the background, the median colour of the rim."""
    frames = video.frames.float()
    rim = torch.cat(
        [frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], dim=1
    ).reshape(-1, 3)
    distance = (frames - rim.median(dim=0).values).abs().amax(dim=-1)
    # Below 16 of 255 is noise or a codec's shimmer; below 0.4 of the ink is its smooth edge.
    return (distance - max(16.0, 0.4 * float(distance.max()))).clamp_min(0)


def _center_of_mass(weight: Tensor) -> Tensor:
    """Centres (T, 2) as (x, y) in pixels of weights (T, H, W) that are not all zero."""
    _, height, width = weight.shape
    total = weight.sum(dim=(1, 2))
    x = (weight.sum(dim=1) @ (torch.arange(width) + 0.5)) / total
    y = (weight.sum(dim=2) @ (torch.arange(height) + 0.5)) / total
    return torch.stack([x, y], dim=1)


def _audible(audio: Audio) -> bool:
    return audio.samples.numel() > 0 and float(audio.samples.abs().max()) > 1e-4
