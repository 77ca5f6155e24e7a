# pyright: strict
# torch's own types are partly unknown, and what users give is checked whatever its annotation says.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnnecessaryIsInstance=false

"""Documents <-> ids: text model, codecs, vocabulary and grammar in one object."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from unimm.checkpoint import (
    CODECS_FOLDER,
    GENERATION_FILE,
    VOCABULARY_FILE,
    HubMixin,
    find_bundle,
    read_json,
    reopen,
    shipped_bundles,
    write_json,
    write_text,
)
from unimm.display import html
from unimm.sequence import Grammar, Segment
from unimm.signals import Audio, Item, Semantic, Turn, Video
from unimm.text import FILES, TextModel, text_file
from unimm.vocabulary import AudioLayout, Vocabulary
from unimm_tokenizers.codec import PADDING_CODE, Codec

MAX_PIXELS = 64 * 2**20
BATCH = 64  # signals coded at once; more only costs memory
_log = logging.getLogger("unimm")


def modality_of(item: Item) -> str:
    """The grammar's name for a document item.

    Raises:
        ValueError: the object is nothing that a document holds.
    """
    if isinstance(item, str):
        return "text"
    if isinstance(item, Image.Image):
        return "image"
    if isinstance(item, Turn):
        return item.role
    for kind, name in ((Audio, "audio"), (Video, "video"), (Semantic, "semantic")):
        if isinstance(item, kind):
            return name
    raise ValueError(
        f"a document holds str, PIL images, Audio, Video, Semantic and Turn, not "
        f"{type(item).__name__}"
    )


def joined(document: Sequence[Item]) -> list[Item]:
    """A document with neighbouring strings joined and empty ones left out, as ids hold it."""
    items: list[Item] = []
    for item in document:
        if not isinstance(item, str):
            items.append(item)
        elif items and isinstance(items[-1], str):
            items[-1] = items[-1] + item
        elif item:
            items.append(item)
    return items


class UnifiedTokenizer(HubMixin):
    """Text model + codecs + vocabulary + grammar.

    >>> tok = UnifiedTokenizer.from_pretrained("digits")
    >>> ids = tok.encode(["seven"])
    >>> tok.decode(ids)
    ['seven']

    Args:
        text: the text model.
        codecs: one codec per modality of its own; a codec that also serves film gives "video".
        audio_layout: "frame" or "level"; see `unimm.sequence`.
        grids: modality -> code grid that never varies; see `Vocabulary`. Pictures are cut to fit.
        defaults: modality -> sampling defaults, as `generation.json` holds them.

    Raises:
        ValueError: two codecs serve one modality.
    """

    def __init__(
        self,
        text: TextModel,
        codecs: Sequence[Codec] = (),
        *,
        audio_layout: AudioLayout = "frame",
        grids: Mapping[str, Sequence[int]] | None = None,
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.text = text
        self.codecs: dict[str, Codec] = {}
        for codec in codecs:
            for modality in codec.modalities:
                if modality in self.codecs:
                    raise ValueError(f"two codecs serve {modality!r}: give one")
                self.codecs[modality] = codec.eval()
        own = [codec for modality, codec in self.codecs.items() if codec.modality == modality]
        self.vocabulary = Vocabulary(
            text.size,
            {codec.modality: [codec.codebook_size] * codec.num_codebooks for codec in own},
            share={m: codec.modality for m, codec in self.codecs.items() if m != codec.modality},
            audio_layout=audio_layout,
            grids=grids,
        )
        self.grammar = Grammar(self.vocabulary)
        self.defaults = {modality: dict(values) for modality, values in (defaults or {}).items()}

    def __repr__(self) -> str:
        return f"UnifiedTokenizer({', '.join(self.vocabulary.modalities)}; {self.vocabulary})"

    def _repr_html_(self) -> str:
        kinds = (f"{modality}: {codec!r}" for modality, codec in self.codecs.items())
        facts = [("text", self.text), *(("codec", kind) for kind in kinds)]
        vocabulary = self.vocabulary._repr_html_()  # pyright: ignore[reportPrivateUsage]
        return html.card("UnifiedTokenizer", facts, vocabulary)

    def to(self, device: torch.device | str) -> Self:
        """Move the codecs."""
        for codec in self.codecs.values():
            codec.to(device)
        return self

    # Documents to ids

    def encode(self, document: Sequence[Item], *, complete: bool = True) -> Tensor:
        """A document -> int64 (T,); `complete=False` leaves out `<eos>` (a prompt).

        Raises:
            ValueError: an item can't be coded; says which and why.
        """
        return self.grammar.encode(self.segments(document), complete=complete)

    def segments(self, document: Sequence[Item]) -> list[Segment]:
        """A document -> grammar items in local codes, neighbouring strings joined.

        Raises:
            ValueError: an item can't be coded; says which (counted after joining) and why.
        """
        return self.encode_items(joined(document))

    def encode_items(self, items: Sequence[Item]) -> list[Segment]:
        """Items of any documents -> segments; signals of one shape are coded together.

        Raises:
            ValueError: an item can't be coded; says which and why.
        """
        segments: list[Segment | None] = [None] * len(items)
        groups: defaultdict[tuple[Any, ...], list[tuple[int, Tensor]]] = defaultdict(list)
        for index, item in enumerate(items):
            try:
                kind = modality_of(item)
                if isinstance(item, str):
                    segments[index] = Segment("text", self.text.encode(item))
                elif isinstance(item, Turn):
                    segments[index] = Segment(kind, torch.zeros(0, dtype=torch.int64))
                else:
                    codec = self._codec(kind)
                    signal = item_signal(item, codec, self.vocabulary.grids.get(kind))
                    groups[(kind, *signal.shape)].append((index, signal))
            except ValueError as error:
                raise ValueError(f"item {index}: {error}") from None
        for (kind, *_), members in groups.items():
            for start in range(0, len(members), BATCH):
                part = members[start : start + BATCH]
                try:
                    codes = self._encode(kind, torch.stack([signal for _, signal in part]))
                except ValueError as error:  # what is left to refuse is the shape, which they share
                    raise ValueError(f"item {part[0][0]}: {error}") from None
                for (index, _), code in zip(part, codes, strict=True):
                    segments[index] = Segment(kind, code)
        return [segment for segment in segments if segment is not None]

    def _codec(self, modality: str) -> Codec:
        self.grammar.rule(modality)  # refuses a modality that has no codec, naming those that have
        return self.codecs[modality]

    @torch.no_grad()
    def _encode(self, kind: str, signals: Tensor) -> list[Tensor]:
        codec = self.codecs[kind]
        device = next(codec.parameters()).device
        codes = codec.encode(signals.to(device)).cpu()
        if kind == "semantic":
            return [code[:, code[0] != PADDING_CODE] for code in codes]
        return list(codes)

    # Ids to documents

    def decode(self, ids: Tensor, *, strict: bool = True, complete: bool = True) -> list[Item]:
        """Ids (T,) -> a document.

        Args:
            ids: int64 (T,).
            strict: refuse malformed ids; otherwise keep every whole item.
            complete: require the final `<eos>` (strict only).

        Raises:
            GrammarError: the ids are malformed and `strict` is set.
        """
        return self.decode_segments(self.grammar.parse(ids.cpu(), strict=strict, complete=complete))

    def decode_segments(self, segments: Sequence[Segment]) -> list[Item]:
        """Segments of any documents -> items; codes of one shape are decoded together."""
        items: list[Item | None] = [None] * len(segments)
        groups: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        for index, (kind, codes) in enumerate(segments):
            if kind == "text":
                items[index] = self.text.decode(codes)
            elif kind in self.codecs:
                groups[(kind, *codes.shape)].append(index)
            else:
                items[index] = Turn("user" if kind == "user" else "assistant")
        for (kind, *_), members in groups.items():
            for start in range(0, len(members), BATCH):
                part = members[start : start + BATCH]
                signals = self._decode(kind, torch.stack([segments[i].codes for i in part]))
                for index, signal in zip(part, signals, strict=True):
                    items[index] = signal_item(kind, signal, self.codecs[kind])
        return [item for item in items if item is not None]

    @torch.no_grad()
    def _decode(self, kind: str, codes: Tensor) -> Tensor:
        codec = self.codecs[kind]
        device = next(codec.parameters()).device
        return codec.decode(codes.to(device)).float().cpu()

    # Bundles

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write vocabulary, text model, codecs (cast to `dtype`) and defaults into a folder.

        An `index.json` that stands there is void and removed: seal the bundle anew.
        """
        folder = Path(folder)
        reopen(folder)
        for modality, codec in self.codecs.items():
            if modality == codec.modality:
                codec.save_pretrained(folder / CODECS_FOLDER / modality, dtype)
        self.text.save(folder / self.text.file)
        for other in set(FILES) - {self.text.file}:  # the bundle had a text model of another kind
            (folder / other).unlink(missing_ok=True)
        write_json(folder / GENERATION_FILE, self.defaults)
        write_text(folder / VOCABULARY_FILE, self.vocabulary.to_json())

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, revision: str | None = None) -> Self:
        """Read the tokenizer of a bundle: shipped name, folder, or Hub repository id.

        Args:
            name_or_path: see `unimm.checkpoint.find_bundle`; a local folder comes first.
            revision: commit, tag or branch of a Hub repository.

        Raises:
            ValueError: nothing is found, a file is missing or damaged, or the codecs do not make
                the vocabulary that the bundle states.
        """
        folder = find_bundle(name_or_path, revision)
        if not (folder / VOCABULARY_FILE).exists():
            raise ValueError(f"{folder}: this folder holds no tokenizer ({VOCABULARY_FILE})")
        stated = Vocabulary.from_dict(read_json(folder / VOCABULARY_FILE))
        names = dict.fromkeys(block.name.split(".")[0] for block in stated if "." in block.name)
        tokenizer = cls(
            TextModel.load(text_file(folder)),
            [Codec.from_pretrained(folder / CODECS_FOLDER / name) for name in names],
            audio_layout=stated.audio_layout,
            grids=stated.grids,
            defaults=read_json(folder / GENERATION_FILE),
        )
        tokenizer.vocabulary.require(stated.fingerprint, str(folder / VOCABULARY_FILE))
        return tokenizer


def load_codec(name_or_path: str | Path) -> Codec:
    """Read a codec: a codec folder, `bundle/modality`, or a bundle with a single codec.

    Raises:
        ValueError: nothing is found; says what was looked for.
    """
    folder = Path(name_or_path)
    name = folder.as_posix()  # without a slash at the end
    if (folder / "config.json").exists():
        return Codec.from_pretrained(folder)
    bundle, _, modality = name.rpartition("/")
    if bundle in shipped_bundles() or (Path(bundle) / CODECS_FOLDER / modality).is_dir():
        return Codec.from_pretrained(find_bundle(bundle) / CODECS_FOLDER / modality)
    found = find_bundle(name_or_path)
    if (found / "config.json").exists():
        return Codec.from_pretrained(found)
    codecs = sorted(path.name for path in (found / CODECS_FOLDER).glob("*"))
    if len(codecs) != 1:
        raise ValueError(f"{name}: name one of its codecs: {', '.join(codecs) or 'it has none'}")
    return Codec.from_pretrained(found / CODECS_FOLDER / codecs[0])


def fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """A picture scaled to cover height x width pixels, and cut to them around its middle."""
    if image.size == (width, height):
        return image
    _log.info("picture of %d x %d pixels is cut to %d x %d", *image.size, width, height)
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def item_signal(
    item: Audio | Video | Semantic | Image.Image, codec: Codec, grid: Sequence[int] | None = None
) -> Tensor:
    """A picture, sound or film -> float (C, *signal) in [-1, 1], as a codec takes it.

    Args:
        item: of a document.
        codec: its sample rate, channels and downsampling count.
        grid: code grid that never varies; pictures are cut to fit.
    """
    if isinstance(item, Audio):
        return audio_signal(item, codec)
    if isinstance(item, Video):
        return video_signal(item, codec)
    picture = item.image if isinstance(item, Semantic) else item
    if grid is not None:
        height, width = (n * d for n, d in zip(grid, codec.downsample[-2:], strict=True))
        picture = fitted(picture, height, width)
    return image_signal(picture, codec)


def image_signal(image: Image.Image, codec: Codec) -> Tensor:
    """A picture -> float (C, H, W) in [-1, 1], in the codec's colours.

    Raises:
        ValueError: the picture has more than 64 Mi pixels.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"picture of {width} x {height} pixels: at most {MAX_PIXELS} are allowed")
    mode = "L" if codec.num_channels == 1 else "RGB"
    array = np.array(image if image.mode == mode else image.convert(mode), dtype=np.uint8)
    pixels = torch.from_numpy(array).view(height, width, -1).permute(2, 0, 1)
    return pixels.float().div_(127.5).sub_(1)


def video_signal(video: Video, codec: Codec) -> Tensor:
    """A film -> float (C, T, H, W) in [-1, 1], at the codec's frame rate."""
    frames, rate = video.frames, codec.config.fps
    if abs(video.fps - rate) > 1e-3 * rate:
        _log.warning("film at %g fps is read at the codec's %g fps", video.fps, rate)
        count = max(1, round(len(frames) * rate / video.fps))
        frames = frames[(torch.arange(count) * video.fps / rate).long().clamp(max=len(frames) - 1)]
    pixels = frames.permute(3, 0, 1, 2).float() / 127.5 - 1
    return pixels.mean(0, keepdim=True) if codec.num_channels == 1 else pixels


def audio_signal(audio: Audio, codec: Codec) -> Tensor:
    """A sound -> float (C, T) in [-1, 1], at the codec's sample rate and channel count."""
    samples, rate = audio.samples.float(), codec.sample_rate
    assert rate is not None
    if audio.sample_rate != rate:
        _log.warning("sound at %d Hz is resampled to the codec's %d Hz", audio.sample_rate, rate)
        if samples.numel():  # of nothing, torchaudio can't tell the shape
            # Late: most sounds have the codec's rate.
            import torchaudio  # pyright: ignore[reportMissingTypeStubs]

            samples = torchaudio.functional.resample(samples, audio.sample_rate, rate)
    if samples.shape[0] != codec.num_channels:
        samples = samples.mean(0, keepdim=True).expand(codec.num_channels, -1)
    return samples.clamp(-1, 1)


def signal_item(kind: str, signal: Tensor, codec: Codec) -> Item:
    """A decoded signal (C, *signal) in [-1, 1] -> a document item."""
    if kind == "audio":
        assert codec.sample_rate is not None
        return Audio(signal, codec.sample_rate)
    pixels = ((signal + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    if kind == "video":
        return Video(
            pixels.expand(3, -1, -1, -1).permute(1, 2, 3, 0).contiguous(), codec.config.fps
        )
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(array))
    return Semantic(image) if kind == "semantic" else image
