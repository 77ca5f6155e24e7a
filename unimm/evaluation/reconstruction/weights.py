"""Measures that need a trained network, from a local file whose sha256 is stated and checked.

    weights = {"inception": WeightFile("inception-2015-12-05.pt", SHA256)}
    run(codecs, data, weights=weights)

Nothing is ever downloaded. A measure whose files are not named is skipped, and the results say
which file it wants and where that comes from; a file that is missing or another one than stated
is an error before anything is measured.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torchaudio
from torch import Tensor

from unimm.evaluation.reconstruction.lpips import LPIPS
from unimm_tokenizers.storage import read_json, sha256


class WeightFile(NamedTuple):
    """A local file and the sha256 (hex) that it must have."""

    path: str | Path
    sha256: str

    def checked(self) -> Path:
        """The path, of a file that is what it should be.

        Raises:
            ValueError: it is missing, or another file.
        """
        path = Path(self.path)
        if not path.is_file():
            raise ValueError(f"{path}: the weights are missing")
        found = sha256(path)
        if found != self.sha256:
            raise ValueError(f"{path}: sha256 is {found}, not {self.sha256}: this is another file")
        return path


class Needed(NamedTuple):
    """A file by the name that the field knows it by, and where it comes from."""

    file: str
    source: str


_TORCH = "https://download.pytorch.org/models"
_NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics"
NEEDED: Mapping[str, Needed] = {
    "alexnet": Needed("alexnet-owt-7be5be79.pth", f"{_TORCH}/alexnet-owt-7be5be79.pth"),
    "vgg16": Needed("vgg16-397923af.pth", f"{_TORCH}/vgg16-397923af.pth"),
    "lpips_alex_heads": Needed("alex.pth", "package lpips 0.1.4, folder weights/v0.1"),
    "lpips_vgg_heads": Needed("vgg.pth", "package lpips 0.1.4, folder weights/v0.1"),
    "inception": Needed("inception-2015-12-05.pt", f"{_NVIDIA}/inception-2015-12-05.pt"),
    "i3d": Needed("i3d_torchscript.pt", "StyleGAN-V, github.com/universome/stylegan-v"),
    "asr": Needed(
        "TorchScript of torchaudio's WAV2VEC2_ASR_BASE_960H",
        "export of torchaudio.pipelines: (1, T) at 16 kHz -> logits (1, frames, 29)",
    ),
    "utmos": Needed(
        "TorchScript of utmos22_strong",
        "export of github.com/tarepan/SpeechMOS: ((1, T), 16000) -> (1,)",
    ),
}


class Judge(ABC):
    """A measure by a network. `modality`: of what; `speech`: of speech alone."""

    measure: ClassVar[str]
    modality: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    speech: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, paths: Mapping[str, Path]) -> None: ...


class SampleJudge(Judge):
    """One number per sample."""

    @abstractmethod
    def score(self, made: Tensor, real: Tensor, sample_rate: int) -> float:
        """Signals (1, C, *signal) in [-1, 1]."""


class SetJudge(Judge):
    """One number of all samples together: the Fréchet distance of features."""

    @abstractmethod
    def features(self, signal: Tensor) -> Tensor:
        """A signal (1, C, *signal) in [-1, 1] -> (n, D)."""


class _LpipsJudge(SampleJudge):
    modality = "image"
    network: ClassVar[str]

    def __init__(self, paths: Mapping[str, Path]) -> None:
        trunk, heads = (paths[name] for name in self.files)
        states = [torch.load(p, map_location="cpu", weights_only=True) for p in (trunk, heads)]
        self.lpips = LPIPS(self.network, states[0], states[1])

    def score(self, made: Tensor, real: Tensor, sample_rate: int) -> float:
        """LPIPS distance."""
        return float(self.lpips(made, real))


class LpipsAlex(_LpipsJudge):
    """LPIPS on AlexNet, version 0.1."""

    measure, network = "lpips_alex", "alex"
    files = ("alexnet", "lpips_alex_heads")


class LpipsVgg(_LpipsJudge):
    """LPIPS on VGG-16, version 0.1."""

    measure, network = "lpips_vgg", "vgg"
    files = ("vgg16", "lpips_vgg_heads")


class WordErrors(SampleJudge):
    """Word errors of what a recogniser hears, against what it hears in the original.

    Greedy CTC over torchaudio's labels (blank first, "|" between words).
    """

    measure, modality, files, speech = "wer", "audio", ("asr",), True
    _LABELS = "-|ETAONIHSRDLUMWCFGYPBVK'XJQZ"

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.model = _script(paths["asr"])

    def score(self, made: Tensor, real: Tensor, sample_rate: int) -> float:
        """Edits per word of the original; NaN where the recogniser hears no word in that."""
        heard, wanted = (self._words(sound, sample_rate) for sound in (made, real))
        return edit_distance(heard, wanted) / len(wanted) if wanted else math.nan

    @torch.no_grad()
    def _words(self, sound: Tensor, sample_rate: int) -> list[str]:
        best = self.model(_mono(sound, sample_rate))[0].argmax(dim=-1)
        letters = [self._LABELS[int(i)] for i in torch.unique_consecutive(best)]
        return "".join(letter for letter in letters if letter != "-").replace("|", " ").split()


class Utmos(SampleJudge):
    """Naturalness of speech, 1 to 5 (Saeki et al., arXiv 2204.02152), of the answer alone."""

    measure, modality, files, speech = "utmos", "audio", ("utmos",), True

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.model = _script(paths["utmos"])

    @torch.no_grad()
    def score(self, made: Tensor, real: Tensor, sample_rate: int) -> float:
        """Predicted opinion score."""
        return float(self.model(_mono(made, sample_rate), 16000))


class Rfid(SetJudge):
    """rFID: features of the Inception network of TensorFlow, 2015, in float32."""

    measure, modality, files = "rfid", "image", ("inception",)

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.model = _script(paths["inception"])

    @torch.no_grad()
    def features(self, signal: Tensor) -> Tensor:
        """(1, 3, H, W) -> (1, 2048)."""
        return self.model(_bytes(signal), return_features=True)


class Rfvd(SetJudge):
    """rFVD: features of I3D trained on Kinetics-400, in float32."""

    measure, modality, files = "rfvd", "video", ("i3d",)

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.model = _script(paths["i3d"])

    @torch.no_grad()
    def features(self, signal: Tensor) -> Tensor:
        """(1, 3, T, H, W) -> (1, 400)."""
        return self.model(_bytes(signal), rescale=True, resize=True, return_features=True)


JUDGES: tuple[type[Judge], ...] = (LpipsAlex, LpipsVgg, WordErrors, Utmos, Rfid, Rfvd)


def open_judges(weights: Mapping[str, WeightFile]) -> tuple[list[Judge], dict[str, str]]:
    """The measures whose files are named, and why each other one is skipped.

    Raises:
        ValueError: a name is unknown, or a file is missing or another one than stated.
    """
    unknown = sorted(set(weights) - set(NEEDED))
    if unknown:
        raise ValueError(f"weights: {unknown[0]!r} is none of {', '.join(NEEDED)}")
    paths = {name: file.checked() for name, file in weights.items()}
    judges: list[Judge] = []
    skipped: dict[str, str] = {}
    for kind in JUDGES:
        missing = [NEEDED[name] for name in kind.files if name not in paths]
        if missing:
            skipped[kind.measure] = "; ".join(f"{m.file} not named ({m.source})" for m in missing)
        else:
            judges.append(kind(paths))
    return judges, skipped


def read_weights(folder: str | Path) -> dict[str, WeightFile]:
    """Weights that a folder's `weights.json` names: {"inception": {"file": ..., "sha256": ...}}.

    Raises:
        ValueError: the file is missing or not of that form.
    """
    listed = read_json(Path(folder) / "weights.json")
    try:
        return {k: WeightFile(Path(folder) / v["file"], v["sha256"]) for k, v in listed.items()}
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            f'{folder}/weights.json: expected {{"name": {{"file": ..., "sha256": ...}}}}'
        ) from None


class Moments:
    """Mean and covariance of features, in float64, one batch after another."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0.0
        self.products: Any = 0.0

    def add(self, features: Tensor) -> None:
        """Take in (n, D)."""
        x = features.double()
        self.count += len(x)
        self.total = self.total + x.sum(dim=0)
        self.products = self.products + x.T @ x

    @property
    def mean(self) -> Tensor:
        """(D,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D), unbiased; zero of a single sample."""
        scatter = self.products - self.count * torch.outer(self.mean, self.mean)
        return scatter / max(1, self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared Fréchet distance of two normal distributions (Dowson and Landau 1982)."""
    a, b = first.covariance, second.covariance
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    shift = (first.mean - second.mean).square().sum()
    return max(0.0, float(shift + a.trace() + b.trace() - 2 * cross))


def edit_distance(first: list[str], second: list[str]) -> int:
    """Least number of words to insert, drop or change (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, word in enumerate(first, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def _script(path: Path) -> torch.jit.ScriptModule:
    return torch.jit.load(str(path), map_location="cpu").eval().float()


def _mono(sound: Tensor, sample_rate: int) -> Tensor:
    """(1, C, T) -> (1, T) at 16 kHz."""
    mono = sound.float().mean(dim=1)
    return torchaudio.functional.resample(mono, sample_rate, 16000)


def _bytes(signal: Tensor) -> Tensor:
    """Values 0 to 255 in float32, rounded as a file would hold them."""
    return ((signal + 1) * 127.5).round().clamp(0, 255).float()
