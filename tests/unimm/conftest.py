"""Small enough for every test run: tokenizers of all modalities, and a dial-pad world."""

from pathlib import Path

import pytest
import torch

from unimm import ModelConfig, UnifiedLM, UnifiedTokenizer
from unimm.checkpoint import seal
from unimm.data import dialpad
from unimm.data.templates import Template
from unimm.data.tokenize import TokenizeConfig
from unimm.data.tokenize_many import tokenize_shards
from unimm.text import TextModel
from unimm.vocabulary import AudioLayout
from unimm_tokenizers.audio import (
    SoundStreamCodec,
    SoundStreamConfig,
    SpectralCodec,
    SpectralConfig,
)
from unimm_tokenizers.codec import Codec
from unimm_tokenizers.semantic import SeTokCodec, SeTokConfig
from unimm_tokenizers.vision import VisionCodec, VisionConfig

VISION = VisionConfig(
    channels=8,
    multipliers=(1, 2),
    latent_channels=8,
    codebook_size=16,
    codebook_dim=4,
    time_downsample=2,
)
SOUND = SoundStreamConfig(
    sample_rate=800,
    channels=4,
    strides=(2, 4),
    dilations=(1,),
    latent_channels=8,
    num_codebooks=2,
    codebook_size=8,
)
SEMANTIC = SeTokConfig(
    image_size=16,
    patch=2,
    dim=8,
    num_heads=2,
    num_layers=1,
    decoder_layers=1,
    max_regions=4,
    codebook_size=8,
    codebook_dim=4,
)


def make_codecs() -> list[Codec]:
    """Untrained: pictures and film by 4 (2 in time), sound by 8 at 800 Hz, regions of 16 x 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [VisionCodec(VISION), SoundStreamCodec(SOUND), SeTokCodec(SEMANTIC)]


def make_tokenizer(audio_layout: AudioLayout) -> UnifiedTokenizer:
    text = TextModel.train(["seven eight nine", "up down left right"] * 3, size=290)
    return UnifiedTokenizer(text, make_codecs(), audio_layout=audio_layout)


@pytest.fixture(scope="session")
def frame_tok() -> UnifiedTokenizer:
    """All modalities, open-ended sound. Shared by all tests: not to be changed."""
    return make_tokenizer("frame")


@pytest.fixture(scope="session")
def level_tok() -> UnifiedTokenizer:
    """All modalities, sound level by level. Shared by all tests: not to be changed."""
    return make_tokenizer("level")


@pytest.fixture(scope="session")
def tiny_lm(frame_tok: UnifiedTokenizer) -> UnifiedLM:
    """An untrained model that both tokenizers fit. Shared by all tests: not to be changed."""
    config = ModelConfig(
        vocab_size=frame_tok.vocabulary.padded_size,
        d_model=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        d_ff=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UnifiedLM(config).eval()


# The dial-pad world: 32 x 32 pixels, 8 kHz, codecs of a few thousand parameters.


def dialpad_tokenizer(levels: int = 4) -> UnifiedTokenizer:
    """Words, pictures, films and sounds; pictures have `levels` x 4 codes."""
    vision = VisionConfig(
        channels=8,
        multipliers=(1, 2),
        patch=4,
        time_downsample=4,
        latent_channels=8,
        fsq_levels=(levels, 4),
    )
    sound = SpectralConfig(
        channels=16, num_blocks=1, latent_channels=8, num_codebooks=2, codebook_size=16
    )
    captions = [f"{word} {way}" for word in dialpad.WORDS for way in dialpad.DIRECTIONS]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codecs = [VisionCodec(vision), SpectralCodec(sound)]
    return UnifiedTokenizer(TextModel.train(captions, 300), codecs)


@pytest.fixture(scope="session")
def raw_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two raw shards of twelve scenes."""
    folder = tmp_path_factory.mktemp("world") / "raw"
    dialpad.write_raw_shards(folder, 24, seed=0, samples_per_shard=12)
    return folder


@pytest.fixture(scope="session")
def tokenizer_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed tokenizer of the dial-pad world."""
    folder = tmp_path_factory.mktemp("world") / "tokenizer"
    dialpad_tokenizer().save_pretrained(folder)
    seal(folder)
    return folder


@pytest.fixture(scope="session")
def other_tokenizer_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another vocabulary of the same padded size."""
    folder = tmp_path_factory.mktemp("world") / "other"
    dialpad_tokenizer(levels=5).save_pretrained(folder)
    seal(folder)
    return folder


@pytest.fixture(scope="session")
def token_shards(
    tmp_path_factory: pytest.TempPathFactory, raw_shards: Path, tokenizer_bundle: Path
) -> Path:
    """Folder of two token shards, four documents of every scene."""
    folder = tmp_path_factory.mktemp("world") / "tokens"
    templates = [
        Template(["{txt}", "{png}"]),
        Template(["{png}", "{txt}"]),
        Template(["{txt}", "{wav}"]),
        Template(["{json.film}", "{gif}"]),
    ]
    every = TokenizeConfig(documents_per_sample=None)
    tokenize_shards(raw_shards, folder, tokenizer_bundle, templates, every, progress=False)
    return folder


@pytest.fixture(scope="session")
def model_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed bundle of the dial-pad world with an untrained language model."""
    folder = tmp_path_factory.mktemp("world") / "bundle"
    tokenizer = dialpad_tokenizer()
    tokenizer.save_pretrained(folder)
    size = tokenizer.vocabulary.padded_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = UnifiedLM(ModelConfig(vocab_size=size, d_model=32, num_layers=1, num_heads=2))
    lm.save_pretrained(folder)
    seal(folder)
    return folder
