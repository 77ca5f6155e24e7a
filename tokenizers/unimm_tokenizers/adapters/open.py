"""Finding the adapter: for a model at hand, or for a classical codec's short name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from unimm_tokenizers.adapters.byte_codec import ByteCodec, ClassicalConfig
from unimm_tokenizers.adapters.classical_image import PillowCodec
from unimm_tokenizers.adapters.classical_media import FilmFileCodec, SoundFileCodec
from unimm_tokenizers.adapters.diffusers_vq import DiffusersAdapter
from unimm_tokenizers.adapters.transformers_audio import DacAdapter, EncodecAdapter, MimiAdapter
from unimm_tokenizers.adapters.transformers_image import (
    ChameleonAdapter,
    Emu3Adapter,
    JanusAdapter,
)
from unimm_tokenizers.codec import Codec
from unimm_tokenizers.storage import read_json

_WRAPPERS = (
    EncodecAdapter,
    DacAdapter,
    MimiAdapter,
    ChameleonAdapter,
    Emu3Adapter,
    JanusAdapter,
)
_CLASSICAL: tuple[type[ByteCodec], ...] = (PillowCodec, SoundFileCodec, FilmFileCodec)
_NAME = re.compile(r"(?P<format>[a-z0-9]+)(:(?P<setting>\d+)|@(?P<rate>\d+(\.\d+)?))?")


def adapt(model: nn.Module, **choices: Any) -> Codec:
    """A tokenizer of `transformers` or `diffusers` -> a codec.

    Args:
        model: EncodecModel, DacModel, MimiModel, ChameleonVQVAE, Emu3VQVAE, JanusVQVAE or VQModel.
        choices: what the model leaves open, such as `bandwidth` (EnCodec) or `num_codebooks`.

    Raises:
        ValueError: there is no adapter for the model's class; names those that there are.
    """
    kind = type(model).__name__
    if kind == "VQModel":
        return DiffusersAdapter.wrap(model).eval()
    for wrapper in _WRAPPERS:
        if wrapper.model_class == kind:
            return wrapper.wrap(model, **choices).eval()
    known = ", ".join([*(wrapper.model_class for wrapper in _WRAPPERS), "VQModel"])
    raise ValueError(f"adapt: there is no adapter for {kind}; there are some for {known}")


def open_checkpoint(folder: str | Path) -> Codec:
    """A tokenizer's checkpoint folder, as transformers or diffusers write it -> a codec.

    Only safetensors are read, and nothing is looked for anywhere else.

    Raises:
        ValueError: the folder holds no checkpoint of a class that there is an adapter for.
    """
    config = read_json(Path(folder) / "config.json")
    names = [*(config.get("architectures") or ()), config.get("_class_name")]
    local: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    if "VQModel" in names:
        from diffusers.models.autoencoders.vq_model import VQModel  # pyright: ignore

        return adapt(VQModel.from_pretrained(folder, **local))
    known = [wrapper.model_class for wrapper in _WRAPPERS if wrapper.model_class in names]
    if not known:
        raise ValueError(f"{folder}: holds {names[0]!r}, for which there is no adapter")
    import transformers  # pyright: ignore[reportMissingImports]

    return adapt(getattr(transformers, known[0]).from_pretrained(folder, **local))


def classical_formats(modality: str) -> tuple[str, ...]:
    """Names of the classical codecs of "image", "audio" or "video"."""
    return tuple(f for c in _CLASSICAL if modality in c.modalities for f in c.formats)


def classical(name: str, *, sample_rate: int = 16000, fps: float = 10.0) -> ByteCodec:
    """A classical codec by its short name.

    Args:
        name: "jpeg:75" (quality; palette size of png; CRF of film; kbit/s of sound), "avif@0.25"
            (bits per pixel; kbit/s of sound), or "flac".
        sample_rate: Hz of the sound that it takes; Opus takes the next rate that it knows.
        fps: frames per second that a film's stream states.

    Raises:
        ValueError: no such codec, or no such setting.
    """
    found = _NAME.fullmatch(name)
    for kind in _CLASSICAL:
        if found is None or found["format"] not in kind.formats:
            continue
        setting = None if found["setting"] is None else int(found["setting"])
        rate = None if found["rate"] is None else float(found["rate"])
        if kind is FilmFileCodec and setting is not None:
            setting = -setting
        if kind is SoundFileCodec and found["format"] == "opus":
            known = (8000, 12000, 16000, 24000, 48000)
            sample_rate = next((r for r in known if r >= sample_rate), known[-1])
        config = ClassicalConfig(
            format=found["format"],
            setting=setting,
            rate=rate,
            num_channels=1 if kind is SoundFileCodec else 3,
            sample_rate=sample_rate if kind is SoundFileCodec else None,
            fps=fps,
        )
        return kind(config).eval()  # type: ignore[abstract]
    formats = ", ".join(f for kind in _CLASSICAL for f in kind.formats)
    raise ValueError(
        f"{name}: no classical codec; write one of {formats} with :SETTING or @RATE, "
        f"such as jpeg:75 or avif@0.25"
    )
