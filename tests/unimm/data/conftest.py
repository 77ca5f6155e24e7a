"""A tokenizer with small untrained codecs, and raw samples for it."""

import io
import json
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unimm.data.shards import ShardWriter
from unimm.text import TextModel
from unimm.tokenizer import UnifiedTokenizer
from unimm_tokenizers.audio import SpectralCodec, SpectralConfig
from unimm_tokenizers.semantic import SeTokCodec, SeTokConfig
from unimm_tokenizers.vision import VisionCodec, VisionConfig

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Maker:
    """Makes files, samples and shards of noise; equal numbers make equal bytes."""

    words = WORDS

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def png(number: int, width: int = 16, height: int = 16, form: str = "PNG") -> bytes:
        """A colour picture."""
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, form)
        return stream.getvalue()

    @staticmethod
    def wav(number: int, length: int = 1600, rate: int = 8000, channels: int = 1) -> bytes:
        """A sound of 16 bits."""
        random = np.random.default_rng(number)
        stream = io.BytesIO()
        with wave.open(stream, "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(random.integers(-9000, 9000, length * channels, "<i2").tobytes())
        return stream.getvalue()

    @staticmethod
    def gif(number: int, frames: int = 5, size: int = 16, milliseconds: int = 100) -> bytes:
        """A grey film."""
        random = np.random.default_rng(number)
        pictures = [
            Image.fromarray(random.integers(0, 256, (size, size), dtype=np.uint8))
            for _ in range(frames)
        ]
        stream = io.BytesIO()
        pictures[0].save(
            stream, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0
        )
        return stream.getvalue()

    def sample(self, number: int) -> dict[str, bytes]:
        """A word, its picture and sound, and a note."""
        word = WORDS[number % 10]
        return {
            "json": json.dumps({"digit": number % 10, "note": {"word": f"{word} left"}}).encode(),
            "png": self.png(number),
            "txt": word.encode(),
            "wav": self.wav(number),
        }

    def shard(self, samples: Sequence[Mapping[str, bytes]], name: str = "raw/one.tar") -> Path:
        """A raw shard with keys 0000, 0001, ..."""
        path = self.folder / name
        with ShardWriter(path) as writer:
            for number, files in enumerate(samples):
                writer.write(f"{number:04d}", files)
        return path

    def raw(self, shards: int = 2, samples: int = 6) -> Path:
        """A folder of raw shards `raw-000.tar`, ... of whole samples."""
        for shard in range(shards):
            numbers = range(shard * samples, (shard + 1) * samples)
            self.shard([self.sample(n) for n in numbers], f"raw/raw-{shard:03d}.tar")
        return self.folder / "raw"


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


@pytest.fixture(scope="session")
def tokenizer() -> UnifiedTokenizer:
    """Text; pictures and films, 4 x 4 codes for 16 x 16 pixels; sounds of 8 kHz; regions of
    pictures of 16 x 16 pixels, and of no other size."""
    torch.manual_seed(0)
    vision = VisionCodec(
        VisionConfig(
            channels=8,
            multipliers=(1, 1),
            patch=2,
            time_downsample=4,
            latent_channels=8,
            fsq_levels=(4, 4, 4),
        )
    )
    audio = SpectralCodec(
        SpectralConfig(channels=16, num_blocks=1, num_codebooks=2, codebook_size=16)
    )
    semantic = SeTokCodec(
        SeTokConfig(
            image_size=16, patch=4, dim=16, num_heads=2, num_layers=1, max_regions=4, threshold=0.8
        )
    )
    lines = [f"{word} left" for word in WORDS]
    return UnifiedTokenizer(TextModel.train(lines, 300), [vision, audio, semantic])


@pytest.fixture(scope="session")
def bundle(tokenizer: UnifiedTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer's folder."""
    folder = tmp_path_factory.mktemp("bundle")
    tokenizer.save_pretrained(folder)
    return folder
