# pyright: strict
# torch's own types are partly unknown, and what users give is checked whatever its annotation says.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnnecessaryIsInstance=false

"""The codec interface: a signal to local codes (B, K, *grid) and back.

Every codec is a module with a frozen config dataclass, registered under a short name that its
`config.json` carries. Other packages add theirs through the entry point group `unimm.codecs`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from html import escape
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from unimm_tokenizers.quantize import Quantizer
from unimm_tokenizers.storage import (
    CONFIG_FILE,
    load_weights,
    read_json,
    save_model,
)

PADDING_CODE = -1  # fills grids that vary within a batch (semantic codecs)


class CodecOutput(NamedTuple):
    """What training needs of one pass.

    reconstruction: (B, C, *signal) or the codec's own training target space.
    target: what `reconstruction` is compared with, same shape.
    codes: int64 (B, K, *grid).
    loss: scalar, the quantizer's own loss.
    latents: (B, D, *grid), what was quantized; None from codecs that keep it to themselves.
    """

    reconstruction: Tensor
    target: Tensor
    codes: Tensor
    loss: Tensor
    latents: Tensor | None = None


class Codec(nn.Module, ABC):
    """Base of all codecs.

    Args:
        config: the codec's frozen config dataclass.
    """

    name: ClassVar[str]
    config_class: ClassVar[type]
    modalities: tuple[str, ...]  # what it serves; the first one is its own
    quantizer: Quantizer

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def modality(self) -> str:
        """The modality that names the codec's blocks in a vocabulary."""
        return self.modalities[0]

    @property
    def num_codebooks(self) -> int:
        """K, the number of code levels."""
        return self.quantizer.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Number of codes of each level."""
        return self.quantizer.codebook_size

    @property
    def num_channels(self) -> int:
        """C of the signal: 3 for colour pictures, 1 for mono sound."""
        return self.config.num_channels

    @property
    def sample_rate(self) -> int | None:
        """Samples per second of the sound that the codec takes; None for pictures."""
        return getattr(self.config, "sample_rate", None)

    def facts(self) -> dict[str, str]:
        """What the codec is, in words."""
        rate = "" if self.sample_rate is None else f", {self.sample_rate} Hz"
        return {
            "modalities": ", ".join(self.modalities) + rate,
            "codes": f"{self.num_codebooks} x {self.codebook_size:,}",
            "downsample": " x ".join(map(str, self.downsample)),
            "parameters": f"{sum(p.numel() for p in self.parameters()):,}",
        }

    def __repr__(self) -> str:
        facts = "; ".join(f"{name} {value}" for name, value in self.facts().items())
        return f"{type(self).__name__}({facts})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
            for name, value in self.facts().items()
        )
        return f"<b>{escape(self.name)}</b> codec<table>{rows}</table>"

    @property
    @abstractmethod
    def downsample(self) -> tuple[int, ...]:
        """Signal units per code on each grid axis."""

    @property
    @abstractmethod
    def receptive_field(self) -> tuple[int, ...]:
        """Signal units, per axis, that one code can depend on."""

    @property
    def frame_rate(self) -> float | None:
        """Code frames per second of a sound codec; None for pictures."""
        return None if self.sample_rate is None else self.sample_rate / self.downsample[0]

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Signal (B, C, *signal) float in [-1, 1] -> codes int64 (B, K, *grid)."""

    @abstractmethod
    def decode(self, codes: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """`codes` int64 (B, K, *grid) -> signal (B, C, *signal); `size` crops to the original."""

    @abstractmethod
    def forward(self, x: Tensor) -> CodecOutput:
        """One training pass over a batch (B, C, *signal)."""

    def check_signal(self, x: Tensor, axes: int) -> Tensor:
        """Refuse what is not a signal for this codec; the signal in the weights' dtype.

        Args:
            x: (B, C, *signal) float in [-1, 1].
            axes: number of signal axes.

        Raises:
            ValueError: wrong number of axes or channels, not float, not finite, or out of range.
        """
        expected = f"(batch, {self.num_channels} channels, {axes} signal axes)"
        if x.ndim != axes + 2 or x.shape[1] != self.num_channels:
            raise ValueError(f"{self.name}: expected a signal {expected}, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{self.name}: expected a float signal in [-1, 1], got {x.dtype}")
        if x.numel():
            low, high = (float(end) for end in x.aminmax())  # without copies of a large picture
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"{self.name}: the signal holds NaN or infinite values")
            if max(-low, high) > 1.001:
                raise ValueError(
                    f"{self.name}: expected values in [-1, 1], found up to {max(-low, high):.3g}"
                )
        return x.to(next(self.parameters()).dtype)

    def check_codes(self, codes: Tensor, axes: int) -> None:
        """Refuse codes of the wrong grid, level count, dtype or range.

        Args:
            codes: int64 (B, K, *grid).
            axes: number of grid axes.

        Raises:
            ValueError: says what was expected.
        """
        if codes.ndim != axes + 2 or codes.shape[1] != self.num_codebooks:
            raise ValueError(
                f"{self.name}: expected codes (batch, {self.num_codebooks} levels, {axes} grid "
                f"axes), got {tuple(codes.shape)}"
            )
        if codes.dtype != torch.int64:
            raise ValueError(f"{self.name}: expected codes of int64, got {codes.dtype}")
        low, high = PADDING_CODE if self.modality == "semantic" else 0, self.codebook_size - 1
        if codes.numel() and not (int(codes.min()) >= low and int(codes.max()) <= high):
            raise ValueError(
                f"{self.name}: codes must lie in {low} to {high}, found {int(codes.min())} to "
                f"{int(codes.max())}"
            )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and `model.safetensors` into a folder, weights cast to `dtype`.

        A quantizer's running statistics stay behind: only training needs them, and their sums
        would not fit into half precision.
        """
        config = {"codec": self.name, **dataclasses.asdict(self.config)}
        statistics = self.quantizer.statistics
        state = {k: v for k, v in self.state_dict().items() if not k.endswith(statistics)}
        save_model(folder, config, state, dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a codec of this class, or of any registered class when called on `Codec`.

        Raises:
            ValueError: a file is missing or damaged, or the class is not registered.
        """
        config = read_json(Path(folder) / CONFIG_FILE)
        if not isinstance(config, dict):
            raise ValueError(f"{Path(folder) / CONFIG_FILE}: expected a JSON object")
        codec = codec_from_config(str(config.pop("codec", None)), config, str(folder))
        if not isinstance(codec, cls):
            raise ValueError(f"{folder}: holds a {codec.name!r} codec, not a {cls.name!r}")
        load_weights(codec, folder, codec._upgraded)
        codec.quantizer.restart_statistics()
        return codec.eval()

    def _upgraded(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors under today's names; statistics that need not be stored are filled in."""
        prefix = "quantizer."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        rest = {k: v for k, v in state.items() if not k.startswith(prefix)}
        kept = {k: v for k, v in self.state_dict().items() if k.endswith(self.quantizer.statistics)}
        upgraded = {prefix + k: v for k, v in self.quantizer.upgraded(own).items()}
        return {**kept, **rest, **upgraded}


CodecClass = TypeVar("CodecClass", bound=type[Codec])

_REGISTERED: dict[str, type[Codec]] = {}


def register_codec(name: str) -> Callable[[CodecClass], CodecClass]:
    """Class decorator: make a codec loadable by its short name."""

    def register(cls: CodecClass) -> CodecClass:
        cls.name = name
        _REGISTERED[name] = cls
        return cls

    return register


def _registry() -> dict[str, type[Codec]]:
    for entry in entry_points(group="unimm.codecs"):
        if entry.name not in _REGISTERED:
            _REGISTERED[entry.name] = entry.load()
    return _REGISTERED


def codec_from_config(name: str, config: Mapping[str, Any], where: str) -> Codec:
    """Build a codec, untrained, from its registered name and its config as plain data.

    Raises:
        ValueError: the name is not registered, or a config key is unknown.
    """
    registry = _registry()
    if name not in registry:
        known = ", ".join(sorted(registry))
        raise ValueError(f"{where}: codec class {name!r} is unknown; known are {known}")
    found = registry[name]
    return found(config_from_dict(found.config_class, config, where))


def config_from_dict(config_class: type, data: Mapping[str, Any], where: str) -> Any:
    """Build a config dataclass from JSON; lists become tuples.

    Raises:
        ValueError: a key is unknown or missing; names it.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected a JSON object, got a {type(data).__name__}")
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ValueError(
            f"{where}: config key {unknown[0]!r} is unknown to {config_class.__name__}"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    try:
        return config_class(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None
