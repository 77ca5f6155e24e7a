"""The web page: give words, pictures, sounds and films, and watch what the model writes.

Gradio (extra `demo`), on this machine alone unless told otherwise. One answer is written at a
time; further ones wait in a queue. Uploads are bounded in size and decoded by the library's own
readers, which run no code and name what they can't read.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimm.data.media import FILMS, PICTURES, SOUNDS, decode
from unimm.evaluation.figures import token_grid
from unimm.evaluation.writing import gif_bytes
from unimm.generation import Piece, join, stream
from unimm.generation.requests import MAX_NEW_TOKENS
from unimm.model import UnifiedLM
from unimm.sequence import Rule
from unimm.signals import Audio, Item, Semantic, Video
from unimm.tokenizer import UnifiedTokenizer

if TYPE_CHECKING:
    import gradio

ANY = "whatever the model likes"
MAX_UPLOAD_MB = 20
WAITING = 16  # requests that may wait


class View(NamedTuple):
    """What the page shows of an answer so far; None leaves a part empty.

    picture: PIL image, or the path of a film's GIF. sound: (Hz, int16 samples (T, C)).
    """

    status: str
    text: str
    picture: Image.Image | str | None
    sound: tuple[int, np.ndarray] | None
    codes: Image.Image | None


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_upload_mb: int = MAX_UPLOAD_MB,
) -> int:
    """Open the page and keep it open until interrupted.

    Args:
        model: bundle: shipped name, folder, or Hub repository id.
        host: address to listen on; the default can't be reached from other machines.
        port: where.
        max_upload_mb: most megabytes of an uploaded file.

    Raises:
        ValueError: the bundle is missing or damaged, or a number is out of range.
        ModuleNotFoundError: Gradio is not installed.
        OSError: the port is taken.
    """
    if not 0 < port < 65536 or max_upload_mb < 1:
        raise ValueError(f"serve: port {port} must be 1 to 65535, max_upload_mb {max_upload_mb} >0")
    gradio = _gradio()
    lm, tok = UnifiedLM.from_pretrained(model), UnifiedTokenizer.from_pretrained(model)
    page(lm, tok, title=str(model)).launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=max_upload_mb * gradio.FileSize.MB,
        allowed_paths=[],
        footer_links=[],
        ssr_mode=False,
        theme=gradio.themes.Base(font="sans-serif", font_mono="monospace"),  # fetches no fonts
    )
    return 0


def _gradio() -> Any:
    # Gradio reports home by default, and asks the network for newer versions of itself.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the web page needs Gradio: pip install 'unimm[demo]'", name="gradio"
        ) from None
    return gradio


def page(lm: UnifiedLM, tok: UnifiedTokenizer, *, title: str = "unimm") -> gradio.Blocks:
    """The page of a model, not yet open."""
    gradio = _gradio()
    buttons = ["download", "fullscreen"]  # without Gradio's own, which share on the Hub
    folder = tempfile.TemporaryDirectory(prefix="unimm-serve-")

    def answer(
        words: str,
        files: list[str] | None,
        recording: str | None,
        modality: str,
        seed: float,
        temperature: float,
        most: float,
    ) -> Iterator[tuple[Any, ...]]:
        try:
            document = prompt(words, [*(files or []), *([recording] if recording else [])])
            for view in views(
                lm,
                tok,
                document,
                None if modality == ANY else modality,
                seed=int(seed),
                temperature=temperature or None,
                max_new_tokens=int(most),
                folder=Path(folder.name),
            ):
                yield tuple(view)
        except (ValueError, ModuleNotFoundError) as error:
            raise gradio.Error(" ".join(str(error).split()), print_exception=False) from None

    blocks = gradio.Blocks(title=f"unimm: {title}", analytics_enabled=False)
    # The page's GIFs live as long as the page does.
    blocks.folder = folder
    with blocks:
        gradio.Markdown(f"## unimm: {title}")
        with gradio.Row():
            with gradio.Column():
                words = gradio.Textbox(label="Words", elem_id="words", lines=2)
                files = gradio.File(
                    label="Pictures, sounds, films",
                    elem_id="files",
                    file_count="multiple",
                    file_types=[f".{kind}" for kind in (*PICTURES, *SOUNDS, *FILMS)],
                )
                recording = gradio.Audio(
                    label="Record", elem_id="recording", sources=["microphone"], type="filepath"
                )
                modality = gradio.Radio(
                    [*tok.vocabulary.modalities, ANY], value="text", label="Answer with",
                    elem_id="modality",
                )  # fmt: skip
                with gradio.Accordion("More", open=False):
                    seed = gradio.Number(label="Seed", value=0, precision=0)
                    temperature = gradio.Slider(
                        0, 2, value=0, step=0.05, label="Temperature (0: the bundle's own)"
                    )
                    most = gradio.Number(label="Most tokens", value=MAX_NEW_TOKENS, precision=0)
                with gradio.Row():
                    write = gradio.Button("Write", variant="primary", elem_id="write")
                    stop = gradio.Button("Stop", elem_id="stop")
            with gradio.Column():
                status = gradio.Markdown(elem_id="status")
                text = gradio.Textbox(label="Text", elem_id="text", interactive=False)
                picture = gradio.Image(
                    label="Picture or film", elem_id="picture", interactive=False, buttons=buttons
                )
                sound = gradio.Audio(
                    label="Sound", elem_id="sound", interactive=False, buttons=buttons[:1]
                )
                codes = gradio.Image(
                    label="Tokens", elem_id="codes", interactive=False, buttons=buttons
                )
        begun = write.click(
            answer,
            [words, files, recording, modality, seed, temperature, most],
            [status, text, picture, sound, codes],
            concurrency_limit=1,
            concurrency_id="model",
        )
        stop.click(None, cancels=[begun])
    blocks.queue(max_size=WAITING, default_concurrency_limit=1)
    return blocks


def prompt(words: str, files: Sequence[str | Path]) -> list[Item]:
    """The document of a request: files first, then the words.

    Raises:
        ValueError: a file can't be decoded; names it.
    """
    items: list[Item] = []
    for path in map(Path, files):
        items.append(decode(path.suffix[1:].lower(), path.read_bytes(), path.name))
    return [*items, words.strip()] if words.strip() else items


def views(
    lm: UnifiedLM,
    tok: UnifiedTokenizer,
    document: Sequence[Item],
    modality: str | None,
    *,
    seed: int,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    folder: Path,
) -> Iterator[View]:
    """The answer as it grows; the last view is the whole of it.

    Args:
        lm, tok, modality, seed, temperature, max_new_tokens: see `generate`.
        document: the prompt.
        folder: where GIFs are written.

    Raises:
        ValueError: as for `generate`.
    """
    begun = time.perf_counter()
    parts: list[Piece] = []  # of the present item
    view = View("nothing was written", "", None, None, None)
    count, heard = 0, ""
    options: dict[str, Any] = {"seed": seed, "temperature": temperature}
    answer = stream(lm, tok, document, modality, max_new_tokens=max_new_tokens, **options)
    for piece in answer:
        if parts and parts[-1].item != piece.item:
            parts = []
        parts.append(piece)
        count += len(piece.codes)
        seconds = time.perf_counter() - begun
        if piece.kind == "audio" and piece.content is not None and not heard:
            heard = f", first sound after {seconds:.2f} s"
        if piece.kind in tok.grammar.rules:
            codes = torch.cat([part.codes for part in parts])
            grid = grid_picture(tok.grammar.rules[piece.kind], piece.sizes, codes)
            view = view._replace(codes=grid)
        status = f"{count} tokens in {seconds:.1f} s ({count / max(seconds, 1e-9):.0f}/s){heard}"
        view = _with(view, parts, folder)._replace(status=status)
        yield view
    if not count:
        yield view


def _with(view: View, parts: Sequence[Piece], folder: Path) -> View:
    """The view with what an item's last piece adds.

    Of a film the newest frame, and of a sound nothing until it is whole: a player that starts
    again with every chunk can't be listened to.
    """
    content, final = parts[-1].content, parts[-1].final
    if isinstance(content, str):
        return view._replace(text=view.text + content)
    if isinstance(content, Video) and not final:
        return view._replace(picture=enlarged(Image.fromarray(content.frames[-1].numpy())))
    if isinstance(content, Semantic | Image.Image):
        picture = content.image if isinstance(content, Semantic) else content
        return view._replace(picture=enlarged(picture))
    if not final or parts[-1].kind not in ("audio", "video"):
        return view
    (item,) = join(parts)
    if isinstance(item, Video):
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".gif", delete=False) as file:
            file.write(gif_bytes(item))
        return view._replace(picture=file.name)
    assert isinstance(item, Audio)
    samples = (item.samples.T.clamp(-1, 1) * 32767).round().to(torch.int16)
    return view._replace(sound=(item.sample_rate, samples.numpy()))


def enlarged(picture: Image.Image, side: int = 256) -> Image.Image:
    """A small picture at whole multiples of its size, its pixels as they are."""
    times = max(1, side // max(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def grid_picture(rule: Rule, sizes: tuple[int, int, int], codes: Tensor) -> Image.Image:
    """Codes (n,) written so far, a coloured square each where it stands; the rest is grey.

    A picture is its grid, a film one grid beside the other, a sound a row for each level.
    """
    total = rule.count(sizes) if rule.axes or len(codes) else 0
    place = rule.place(torch.arange(min(len(codes), total)), *sizes)
    _, h, w = sizes
    if rule.order == "raster":
        cells = np.full((h, sizes[0] * (w + 1) - 1), -1)
        rows, columns = place.h, place.t * (w + 1) + place.w
        # Levels of one place stand on top of each other: the first one shows.
        shown = place.level == 0
    else:
        cells = np.full((rule.num_levels, max(1, sizes[0])), -1)
        rows, columns, shown = place.level, place.t, torch.ones_like(place.t, dtype=torch.bool)
    cells[rows[shown].numpy(), columns[shown].numpy()] = codes[: len(shown)][shown].numpy()
    return enlarged(token_grid(cells))
