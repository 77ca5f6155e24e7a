"""Generation into a folder: prompts that are files, answers that are files, figures beside them.

Sample N of a run is a document; its items become `NN-M.txt`, `.png`, `.wav` (16-bit) or `.gif`, in
their order. `results.json` lists them with the prompt, the seed that repeats the run, the wall time
and the number of ids.
"""

from __future__ import annotations

import io
import os.path
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unimm.data.media import FILMS, PICTURES, SOUNDS, decode
from unimm.evaluation.figures import png_bytes, wav_bytes
from unimm.evaluation.report import write_results
from unimm.generation import generate
from unimm.model import UnifiedLM
from unimm.signals import Audio, Document, Item, Semantic, Turn, Video
from unimm.tokenizer import UnifiedTokenizer
from unimm_tokenizers.storage import replacing

RESULTS_FILE = "results.json"
_MEDIA = (*PICTURES, *SOUNDS, *FILMS)


def generate_to_folder(
    model: str | Path,
    prompt: Sequence[str],
    modality: str | None,
    out: str | Path,
    *,
    num_samples: int = 1,
    seed: int | None = None,
    size: str | None = None,
    max_new_tokens: int | None = None,
    **sampling: Any,
) -> list[Path]:
    """Continue a document and write what the model answers.

    Args:
        model: bundle: shipped name, folder, or Hub repository id.
        prompt: items of the document; see `read_prompt`.
        modality: kind of the answer; None: the model chooses.
        out: folder; files of the same names are replaced.
        num_samples: how many answers.
        seed: of the first answer; None draws one, which `results.json` then holds.
        size: of the answer, as `read_size` reads it; None: the model chooses.
        max_new_tokens: most ids of an answer.
        sampling: options of `Sampling`; None takes the bundle's default for the modality.

    Returns:
        The files, in order, without `results.json`.

    Raises:
        ValueError: a prompt's file is missing or damaged, or the bundle can't do what is asked.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: at least 1, got {num_samples}")
    document = [read_prompt(entry) for entry in prompt]
    lm, tok = UnifiedLM.from_pretrained(model), UnifiedTokenizer.from_pretrained(model)
    first = int(torch.randint(2**31, ())) if seed is None else seed
    begun = time.perf_counter()
    answers = generate(
        lm,
        tok,
        document,
        modality,
        None if size is None else read_size(size),
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        seed=first,
        **sampling,
    )
    seconds = time.perf_counter() - begun
    written = [
        write_document(answer, Path(out), number) for number, answer in enumerate(answers, start=1)
    ]
    tokens = [_count(tok, answer) for answer in answers]
    paths = [path for paths in written for path in paths]
    write_results(
        Path(out, RESULTS_FILE),
        prompt=list(prompt),
        modality=modality,
        seed=first,
        files=[path.name for path in paths],
        seconds={"generate": round(seconds, 3)},
        tokens=sum(tokens),
        samples=[
            {"files": [path.name for path in paths], "tokens": count}
            for paths, count in zip(written, tokens, strict=True)
        ],
    )
    return paths


def read_prompt(entry: str) -> Item:
    """One prompt: the picture, sound or film in a file, else the text as it stands.

    Raises:
        ValueError: the file is missing or damaged. A single word that ends like a media file names
            one: as text it would be a misspelled path more often than a wish.
    """
    suffix = os.path.splitext(entry)[1].removeprefix(".").lower()
    if suffix not in (*_MEDIA, "txt"):
        return entry
    if os.path.isfile(entry):
        return decode(suffix, Path(entry).read_bytes(), entry)
    if len(entry.split()) == 1:
        raise ValueError(f"prompt {entry!r}: no such file; give the path of a .{suffix} file")
    return entry


def read_size(text: str) -> float | tuple[int, ...]:
    """A size as `generate` takes it: "256x256" pixels, "9x64x64" of a film, "1.5" seconds.

    Raises:
        ValueError: it is none of these.
    """
    parts = text.lower().split("x")
    try:
        return float(text) if len(parts) == 1 else tuple(int(part) for part in parts)
    except ValueError:
        raise ValueError(
            f"size {text!r}: give HEIGHTxWIDTH, FRAMESxHEIGHTxWIDTH or seconds, such as 32x32"
        ) from None


def write_document(document: Document, folder: Path, number: int) -> list[Path]:
    """Write the items of answer `number` (from 1), each atomically; an empty one writes nothing."""
    paths = []
    for position, item in enumerate(document, start=1):
        suffix, data = _file(item)
        path = folder / f"{number:02d}-{position}.{suffix}"
        with replacing(path) as temporary:
            temporary.write_bytes(data)
        paths.append(path)
    return paths


def _file(item: Item) -> tuple[str, bytes]:
    """Extension and bytes of an item."""
    if isinstance(item, str):
        return "txt", item.encode()
    if isinstance(item, Turn):
        return "txt", f"<{item.role}>".encode()
    if isinstance(item, Audio):
        return "wav", wav_bytes(item)
    if isinstance(item, Video):
        return "gif", gif_bytes(item)
    return "png", png_bytes(item.image if isinstance(item, Semantic) else item)


def gif_bytes(video: Video) -> bytes:
    """A film as a GIF without end, up to 256 colours a frame.

    GIF counts time in 10 ms, and browsers slow down what is faster than 20 ms. Frames that equal
    their predecessor are joined to it; its time grows, so the film lasts as long.
    """
    first, *others = [Image.fromarray(frame.cpu().numpy()).quantize(256) for frame in video.frames]
    buffer = io.BytesIO()
    first.save(
        buffer,
        "GIF",
        save_all=True,
        append_images=others,
        duration=max(20, 10 * round(100 / video.fps)),
        loop=0,
        optimize=False,
    )
    return buffer.getvalue()


def _count(tok: UnifiedTokenizer, document: Document) -> int:
    """Ids that the items of an answer take; `<bos>` and `<eos>` are no item."""
    return len(tok.encode(document, complete=False)) - 1
