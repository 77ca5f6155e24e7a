"""Codecs by name, and the classical ones that a benchmark sets beside them.

A name is a codec folder, `bundle/modality`, a preset (untrained), a classical codec ("jpeg:75",
"opus@6"), or `hf:FOLDER` for a checkpoint of transformers or diffusers. Two names stand for
several: "shipped" (every codec of every bundle that ships) and "classical" (curves for each
modality of the data, and for each learned codec the classical ones at its rate).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import log2, prod
from pathlib import Path

from unimm.checkpoint import CODECS_FOLDER, find_bundle, shipped_bundles
from unimm.evaluation.reconstruction.protocol import Protocol
from unimm.tokenizer import load_codec
from unimm_tokenizers.adapters import ByteCodec, classical, classical_formats, open_checkpoint
from unimm_tokenizers.codec import Codec
from unimm_tokenizers.presets import build_codec, presets

LADDER: Mapping[str, Sequence[int]] = {
    "jpeg": (5, 25, 60, 90),
    "webp": (0, 25, 60, 90),
    "avif": (10, 35, 60, 85),
    "png": (8, 64),
    "opus": (6, 8, 12, 24, 48),
    "mp3": (8, 16, 32, 64),
    "flac": (),
    "h264": (44, 36, 28, 20),
    "vp9": (60, 48, 36, 24),
    "av1": (60, 48, 36, 24),
}
# What has nothing to say at a learned codec's rate: palettes and lossless sound.
_MATCHED = {"image": ("jpeg", "webp", "avif"), "audio": ("opus",), "video": ("h264", "vp9", "av1")}


def open_codecs(
    names: Sequence[str], modalities: Iterable[str], protocol: Protocol
) -> dict[str, Codec]:
    """Codecs by name, in the order of the names, each once.

    Args:
        names: see above.
        modalities: those of the data; classical codecs are set beside these alone.
        protocol: whose sample rate and frame rate classical codecs take.

    Raises:
        ValueError: a codec is not found.
    """
    found: dict[str, Codec] = {}
    there = list(dict.fromkeys(modalities))
    for name in names:
        if name == "shipped":
            for bundle in shipped_bundles():
                for folder in sorted((find_bundle(bundle) / CODECS_FOLDER).iterdir()):
                    found[f"{bundle}/{folder.name}"] = load_codec(folder)
        elif name != "classical":
            found[name] = _open(name, protocol)
    if "classical" in names:
        beside = [*ladder(there), *matched(found, there)]
        found |= {name: _open(name, protocol) for name in beside}
    return found


def _open(name: str, protocol: Protocol) -> Codec:
    if name in presets():
        return build_codec(name)
    if name.startswith("hf:"):
        return open_checkpoint(name.removeprefix("hf:"))
    formats = [f for kind in ("image", "audio", "video") for f in classical_formats(kind)]
    if name.replace("@", ":").partition(":")[0] in formats and not Path(name).exists():
        return classical(name, sample_rate=protocol.sample_rate, fps=protocol.fps or 10.0)
    return load_codec(name)


def ladder(modalities: Iterable[str]) -> list[str]:
    """Names of classical codecs at settings that span their range."""
    names = []
    for modality in modalities:
        for format_ in classical_formats(modality):
            steps = LADDER[format_]
            names += [f"{format_}:{step}" for step in steps] or [format_]
    return names


def matched(codecs: Mapping[str, Codec], modalities: Iterable[str]) -> list[str]:
    """Names of classical codecs at the rates of learned ones."""
    there = set(modalities)
    names = []
    for codec in codecs.values():
        for modality in codec.modalities:
            if isinstance(codec, ByteCodec) or modality not in there or modality not in _MATCHED:
                continue
            rate = nominal_rate(codec, modality)
            names += [f"{format_}@{_digits(rate)}" for format_ in _MATCHED[modality]]
    return list(dict.fromkeys(names))


def nominal_rate(codec: Codec, modality: str) -> float:
    """Bits per pixel, or kbit/s of sound, of a codec on a regular grid."""
    bits = codec.num_codebooks * log2(codec.codebook_size)
    if modality == "audio":
        assert codec.frame_rate is not None, "a codec of sound has a frame rate"
        return bits * codec.frame_rate / 1000
    axes = 3 if modality == "video" else 2
    return bits / prod(codec.downsample[-axes:])


def _digits(rate: float) -> str:
    """Four significant digits, never with an exponent."""
    return f"{rate:.4g}" if 1e-4 <= rate < 1e4 else f"{rate:f}"
