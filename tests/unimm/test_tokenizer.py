"""Documents to ids and back: all modalities, one object, errors that name the item."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unimm import Audio, Semantic, Turn, UnifiedTokenizer, Video, load_codec
from unimm.checkpoint import seal
from unimm.sequence import GrammarError
from unimm.signals import Item
from unimm.text import TextModel
from unimm.tokenizer import (
    MAX_PIXELS,
    audio_signal,
    image_signal,
    joined,
    modality_of,
    signal_item,
    video_signal,
)
from unimm_tokenizers.vision import VisionCodec, VisionConfig


def picture(height: int, width: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels))
    array = values.astype(np.uint8)
    return Image.fromarray(array[..., 0] if channels == 1 else array, mode=None)


def sound(samples: int, rate: int = 800, channels: int = 1, seed: int = 0) -> Audio:
    generator = torch.Generator().manual_seed(seed)
    return Audio(torch.rand(channels, samples, generator=generator) * 2 - 1, rate)


def film(frames: int, height: int, width: int, fps: float = 10.0) -> Video:
    generator = torch.Generator().manual_seed(frames)
    shape = (frames, height, width, 3)
    return Video(torch.randint(256, shape, generator=generator).to(torch.uint8), fps)


DOCUMENT: list[Item] = [
    Turn("user"),
    "seven \u2581 caf\u00e9",
    picture(9, 5),
    sound(50),
    film(4, 8, 4),
    Turn("assistant"),
    Semantic(picture(16, 16)),
    "up",
]


@pytest.mark.parametrize("name", ["frame_tok", "level_tok"])
def test_a_document_of_everything(name: str, request: pytest.FixtureRequest) -> None:
    tok: UnifiedTokenizer = request.getfixturevalue(name)
    ids = tok.encode(DOCUMENT)
    assert ids.dtype == torch.int64
    assert ids.ndim == 1
    assert 0 <= int(ids.min()) <= int(ids.max()) < len(tok.vocabulary)
    segments = tok.grammar.parse(ids)
    kinds = ["user", "text", "image", "audio", "video", "assistant", "semantic", "text"]
    assert [segment.kind for segment in segments] == kinds

    turn, text, image, audio, video, answer, semantic, last = tok.decode(ids)
    assert (turn, text) == (Turn("user"), "seven \u2581 caf\u00e9")
    assert (answer, last) == (Turn("assistant"), "up")
    assert isinstance(image, Image.Image)
    assert (image.size, image.mode) == ((8, 12), "RGB")  # whole codes of 4 x 4 pixels
    assert isinstance(audio, Audio)
    assert (audio.samples.shape, audio.sample_rate) == ((1, 56), 800)
    assert isinstance(video, Video)
    assert (video.frames.shape, video.fps) == ((5, 8, 4, 3), 10.0)  # 1 + 2 * 2 frames
    assert isinstance(semantic, Semantic)
    assert semantic.image.size == (16, 16)


@pytest.mark.parametrize("name", ["frame_tok", "level_tok"])
def test_prompts_and_damaged_ids(name: str, request: pytest.FixtureRequest) -> None:
    tok: UnifiedTokenizer = request.getfixturevalue(name)
    ids = tok.encode(DOCUMENT)
    prompt = tok.encode(DOCUMENT, complete=False)
    assert torch.equal(prompt, ids[:-1])
    with pytest.raises(GrammarError, match=f"position {len(prompt)}"):
        tok.decode(prompt)
    assert len(tok.decode(prompt, complete=False)) == len(DOCUMENT)
    outside = torch.cat([ids[:1], torch.tensor([len(tok.vocabulary)]), ids[1:]])
    with pytest.raises(GrammarError, match=rf"position 1, .* found id {len(tok.vocabulary)}"):
        tok.decode(outside)
    assert len(tok.decode(outside, strict=False)) == len(DOCUMENT)


@given(st.data())
@settings(max_examples=25)
def test_salvaged_random_ids_always_decode(
    frame_tok: UnifiedTokenizer, data: st.DataObject
) -> None:
    ids = frame_tok.encode(["up", picture(4, 4), sound(16), Semantic(picture(16, 16))])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(ids) - 1))
        ids[at] = data.draw(st.integers(-2, len(frame_tok.vocabulary) + 2))
    for item in frame_tok.decode(ids, strict=False):
        modality_of(item)


def test_neighbouring_strings_are_one_text(frame_tok: UnifiedTokenizer) -> None:
    image = picture(4, 4)
    assert joined(["", "se", "", "ven", image, "", Turn("user"), "a", ""]) == [
        *("seven", image),
        *(Turn("user"), "a"),
    ]
    assert torch.equal(frame_tok.encode(["se", "", "ven"]), frame_tok.encode(["seven"]))
    assert frame_tok.encode([]).tolist() == frame_tok.encode([""]).tolist() == [1, 2]
    assert frame_tok.decode(frame_tok.encode([])) == []


def test_coding_together_is_coding_alone(frame_tok: UnifiedTokenizer) -> None:
    """100 pictures of two shapes, more than one batch: each has the codes that it has alone."""
    items: list[Item] = [picture(8, 8 + 4 * (i % 2), seed=i) for i in range(100)]
    items[50:50] = ["seven", sound(40), sound(40, seed=1)]
    together = frame_tok.encode_items(items)
    for item, segment in zip(items, together, strict=True):
        alone = frame_tok.encode_items([item])[0]
        assert alone.kind == segment.kind
        assert torch.equal(alone.codes, segment.codes)
    decoded = frame_tok.decode_segments(together)
    assert [modality_of(item) for item in decoded] == [modality_of(item) for item in items]
    single = frame_tok.decode_segments(together[99:100])[0]
    assert isinstance(single, Image.Image)
    assert np.abs(np.asarray(single, np.int16) - np.asarray(decoded[99], np.int16)).max() <= 1


def test_modalities_and_repr(frame_tok: UnifiedTokenizer) -> None:
    assert frame_tok.vocabulary.modalities == ("text", "image", "video", "audio", "semantic")
    assert frame_tok.vocabulary.share == {"video": "image"}
    assert repr(frame_tok).startswith("UnifiedTokenizer(text, image, video, audio, semantic; Voc")
    assert frame_tok.to("cpu") is frame_tok
    text_only = UnifiedTokenizer(frame_tok.text)
    assert text_only.decode(text_only.encode(["seven"])) == ["seven"]
    assert all(not codec.training for codec in frame_tok.codecs.values())


# Signals


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_pictures_of_every_mode(frame_tok: UnifiedTokenizer, mode: str) -> None:
    image = picture(6, 7).convert(mode)
    codec = frame_tok.codecs["image"]
    signal = image_signal(image, codec)
    assert signal.shape == (3, 6, 7)
    assert signal.abs().max() <= 1
    assert torch.equal(signal, image_signal(image.convert("RGB"), codec))
    frame_tok.encode([image])


def test_pixels_survive_the_way_to_the_codec_and_back(frame_tok: UnifiedTokenizer) -> None:
    codec = frame_tok.codecs["image"]
    image, clip = picture(6, 7), film(3, 4, 5)
    back = signal_item("image", image_signal(image, codec), codec)
    assert isinstance(back, Image.Image)
    assert np.array_equal(np.asarray(back), np.asarray(image))
    again = signal_item("video", video_signal(clip, codec), codec)
    assert isinstance(again, Video)
    assert torch.equal(again.frames, clip.frames)
    semantic = signal_item("semantic", image_signal(image, codec), codec)
    assert isinstance(semantic, Semantic)


def test_grey_codecs(frame_tok: UnifiedTokenizer) -> None:
    config = VisionConfig(num_channels=1, channels=4, multipliers=(1,), time_downsample=2)
    tok = UnifiedTokenizer(frame_tok.text, [VisionCodec(config)])
    image, video = tok.decode(tok.encode([picture(4, 4), film(2, 4, 4)]))
    assert isinstance(image, Image.Image)
    assert image.mode == "L"
    assert isinstance(video, Video)
    assert video.frames.shape == (3, 4, 4, 3)


def test_the_smallest_and_the_largest_picture(frame_tok: UnifiedTokenizer) -> None:
    one = frame_tok.decode(frame_tok.encode([picture(1, 1)]))[0]
    assert isinstance(one, Image.Image)
    assert one.size == (4, 4)
    huge = Image.new("1", (8200, 8200))
    message = f"item 1: picture of 8200 x 8200 pixels: at most {MAX_PIXELS} are allowed"
    with pytest.raises(ValueError, match=message):
        frame_tok.encode(["up", huge])


def test_sound_is_brought_to_the_codec(
    frame_tok: UnifiedTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    codec = frame_tok.codecs["audio"]
    stereo = sound(40, channels=2)
    assert torch.equal(audio_signal(stereo, codec), stereo.samples.mean(0, keepdim=True))
    assert caplog.text == ""
    assert audio_signal(sound(80, rate=1600), codec).shape == (1, 40)
    assert "resampled to the codec's 800 Hz" in caplog.text
    loud = Audio(torch.full((1, 8), 3.0), 800)
    assert audio_signal(loud, codec).max() == 1
    silent = frame_tok.decode(frame_tok.encode([Audio(torch.zeros(1, 16), 800)]))[0]
    assert isinstance(silent, Audio)
    assert silent.samples.shape == (1, 16)


@pytest.mark.parametrize("rate", [800, 1600])
def test_empty_sound(frame_tok: UnifiedTokenizer, level_tok: UnifiedTokenizer, rate: int) -> None:
    """Open-ended sound may be empty; sound that writes its length may not."""
    empty = Audio(torch.zeros(1, 0), rate)
    back = frame_tok.decode(frame_tok.encode([empty]))[0]
    assert isinstance(back, Audio)
    assert back.samples.shape == (1, 0)
    with pytest.raises(ValueError, match=r"item 0 \(audio\): grid sizes must be 1 to 65535"):
        level_tok.encode([empty])


def test_film_is_brought_to_the_codec(
    frame_tok: UnifiedTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    codec = frame_tok.codecs["video"]
    assert video_signal(film(4, 3, 2), codec).shape == (3, 4, 3, 2)
    assert caplog.text == ""
    fast = film(8, 3, 2, fps=20.0)
    slow = video_signal(fast, codec)
    assert "film at 20 fps is read at the codec's 10 fps" in caplog.text
    assert torch.equal(slow, video_signal(Video(fast.frames[::2], 10.0), codec))
    assert video_signal(film(3, 3, 2, fps=5.0), codec).shape == (3, 6, 3, 2)
    assert video_signal(film(1, 3, 2, fps=100.0), codec).shape == (3, 1, 3, 2)


def test_a_film_of_one_frame_is_its_picture(frame_tok: UnifiedTokenizer) -> None:
    image = picture(8, 8)
    clip = Video(torch.from_numpy(np.asarray(image).copy())[None], 10.0)
    picture_codes, film_codes = frame_tok.encode_items([image, clip])
    assert film_codes.codes.shape == (1, 1, 2, 2)
    assert torch.equal(film_codes.codes[:, 0], picture_codes.codes)


# Errors


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (["up", 7], "item 1: a document holds str, PIL images, .* not int"),
        ([np.zeros((4, 4, 3))], "item 0: a document holds .* not ndarray"),
        (["a", "b", "\ud800"], "item 0: .*surrogates not allowed"),
        ([Turn("user"), Semantic(picture(8, 8))], "item 1: setok: takes pictures of 16 x 16"),
    ],
)
def test_errors_name_the_item(
    frame_tok: UnifiedTokenizer, document: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        frame_tok.encode(document)
    assert "\n" not in str(caught.value)


def test_a_modality_without_codec_is_named(frame_tok: UnifiedTokenizer) -> None:
    tok = UnifiedTokenizer(frame_tok.text, [frame_tok.codecs["image"]])
    with pytest.raises(
        ValueError, match="item 1: there is no codec for 'audio' here; modalities are text, image"
    ):
        tok.encode(["up", sound(8)])


def test_one_codec_per_modality(frame_tok: UnifiedTokenizer) -> None:
    image = frame_tok.codecs["image"]
    with pytest.raises(ValueError, match="two codecs serve 'image'"):
        UnifiedTokenizer(frame_tok.text, [image, image])


# Bundles


@pytest.fixture(scope="module")
def bundle(level_tok: UnifiedTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    level_tok.save_pretrained(folder)
    return folder


def test_bundle_round_trip(bundle: Path, level_tok: UnifiedTokenizer) -> None:
    again = UnifiedTokenizer.from_pretrained(bundle)
    assert again.vocabulary == level_tok.vocabulary
    assert torch.equal(again.encode(DOCUMENT), level_tok.encode(DOCUMENT))
    files = sorted(p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file())
    codecs = [
        f"codecs/{m}/{f}"
        for m in ("audio", "image", "semantic")
        for f in ("config.json", "model.safetensors")
    ]
    assert files == [*codecs, "generation.json", "text.model", "vocabulary.json"]


def test_sampling_defaults_travel(tmp_path: Path, frame_tok: UnifiedTokenizer) -> None:
    tok = UnifiedTokenizer(frame_tok.text, defaults={"text": {"temperature": 0.5}})
    tok.save_pretrained(tmp_path)
    assert UnifiedTokenizer.from_pretrained(tmp_path).defaults == {"text": {"temperature": 0.5}}


def test_saving_again_voids_the_seal(tmp_path: Path, frame_tok: UnifiedTokenizer) -> None:
    UnifiedTokenizer(frame_tok.text).save_pretrained(tmp_path)
    seal(tmp_path)
    other = TextModel.train(["something else"], size=280)
    UnifiedTokenizer(other).save_pretrained(tmp_path)
    assert not (tmp_path / "index.json").exists()
    assert UnifiedTokenizer.from_pretrained(tmp_path).text.model == other.model


def _swap_codec(folder: Path) -> None:
    config = VisionConfig(channels=4, multipliers=(1,), codebook_size=32, time_downsample=2)
    VisionCodec(config).save_pretrained(folder / "codecs" / "image")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "vocabulary.json").unlink(), "holds no tokenizer"),
        (lambda folder: (folder / "text.model").unlink(), r"text\.model: the file is missing"),
        (lambda folder: (folder / "generation.json").unlink(), "generation.json: the file is mis"),
        (
            lambda folder: (folder / "codecs/audio/config.json").unlink(),
            "audio/config.json: the file is missing",
        ),
        (_swap_codec, "vocabulary.json was made with vocabulary .*, not with this one"),
    ],
)
def test_a_broken_bundle_says_what_is_wrong(
    tmp_path: Path, level_tok: UnifiedTokenizer, damage: Callable[[Path], None], message: str
) -> None:
    level_tok.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        UnifiedTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_load_codec(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_codec(bundle / "codecs" / "image").modality == "image"
    assert load_codec(f"{bundle}/audio").modality == "audio"
    assert load_codec(f"{bundle}/audio/").modality == "audio"
    monkeypatch.chdir(bundle.parent)
    assert load_codec(f"./{bundle.name}/semantic").modality == "semantic"
    for whole in (bundle, f"{bundle}/"):
        with pytest.raises(ValueError, match="name one of its codecs: audio, image, semantic"):
            load_codec(whole)
    with pytest.raises(ValueError, match=rf"no folder {re.escape(repr(f'{bundle}/smell'))}"):
        load_codec(f"{bundle}/smell")


def test_load_codec_of_a_bundle_with_one(tmp_path: Path, frame_tok: UnifiedTokenizer) -> None:
    UnifiedTokenizer(frame_tok.text, [frame_tok.codecs["audio"]]).save_pretrained(tmp_path)
    assert load_codec(tmp_path).modality == "audio"
