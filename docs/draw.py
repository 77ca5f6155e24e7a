"""Draws the pictures of the concept pages from what the shipped bundle really makes.

python docs/draw.py        needs the extra `bench` (matplotlib)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import unimm
from unimm.data import dialpad
from unimm.data.module import TokenDataModule
from unimm.data.tokenize_many import tokenize_shards
from unimm.display.html import COLOURS
from unimm.sequence import Grammar
from unimm.vocabulary import MODALITIES, Vocabulary

OUT = Path(__file__).parent / "images"
COLUMNS = 16
INK = "#333333"


def draw_sequence(tok: unimm.UnifiedTokenizer, scene: dialpad.Scene) -> None:
    """A box for each id, coloured by its block."""
    ids = tok.encode([scene.caption, scene.image, scene.audio]).tolist()
    rows = -(-len(ids) // COLUMNS)
    figure, axes = plt.subplots(figsize=(9, 0.5 * rows))
    for place, token in enumerate(ids):
        x, y = place % COLUMNS, rows - 1 - place // COLUMNS
        name = tok.vocabulary.block_of(token).name.partition(".")[0]
        axes.add_patch(Rectangle((x, y), 0.94, 0.9, color=COLOURS[name]))
        axes.text(x + 0.47, y + 0.45, str(token), ha="center", va="center", fontsize=8, color=INK)
    axes.set(xlim=(0, COLUMNS), ylim=(0, rows))
    axes.axis("off")
    _save(figure, "sequence")


def draw_positions(grammar: Grammar, tok: unimm.UnifiedTokenizer, scene: dialpad.Scene) -> None:
    """Time, height and width of each id."""
    ids = tok.encode([scene.caption, scene.image, scene.video])
    positions = grammar.layout(ids).positions
    figure, axes = plt.subplots(figsize=(9, 2.6))
    for name, line in zip(("time", "height", "width"), positions, strict=True):
        axes.plot(line, label=name, drawstyle="steps-post", linewidth=1.2)
    axes.set(xlabel="place in the sequence", ylabel="position")
    axes.legend(frameon=False)
    _save(figure, "positions")


def draw_codec(seed: int, count: int = 3) -> None:
    """Original, reconstruction, error and codes."""
    codec = unimm.load_codec("dialpad/image")
    figure, axes = plt.subplots(count, 4, figsize=(7, 1.8 * count))
    for row, index in zip(axes, range(count), strict=True):
        view = unimm.reconstruct(dialpad.make_scene(seed, index).image, codec)
        pixels = np.asarray(view.original)
        signal = np.moveaxis(pixels, -1, 0)[None] / 127.5 - 1
        codes = codec.encode(_tensor(signal))[0, 0]
        titles = ("original", f"from 16 codes, {view.figures['PSNR']}", "error", "codes")
        shown = (view.original, view.made, view.error)
        for axis, title, picture in zip(row, titles, (*shown, None), strict=True):
            axis.set_title(title, fontsize=8, color=INK)
            axis.axis("off")
            if picture is not None:
                assert isinstance(picture, Image.Image)
                axis.imshow(picture)
        row[3].imshow(codes, cmap="twilight", vmin=0, vmax=codec.codebook_size)
        for (y, x), code in np.ndenumerate(codes.numpy()):
            row[3].text(x, y, str(code), ha="center", va="center", fontsize=6, color="white")
    _save(figure, "codec")


def draw_packing(vocabulary: Vocabulary, rows: int = 4) -> None:
    """Rows as training gets them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dialpad.write_raw_shards(folder / "raw", 40, 0)
        tokenize_shards(folder / "raw", folder / "tokens", "dialpad", progress=False)
        data = TokenDataModule(
            "dialpad", str(folder / "tokens"), row_length=128, batch_size=rows, seed=1
        )
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
    kinds = np.where(batch.segment_ids.numpy() > 0, batch.modality.numpy() + 1, 0)
    names = [m for m in MODALITIES if m in vocabulary.modalities]
    colours = ["#ffffff", *(COLOURS[m] for m in MODALITIES)]
    figure, axes = plt.subplots(figsize=(9, 0.45 * rows + 0.6))
    axes.imshow(kinds, aspect="auto", cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1)
    for row, segments in enumerate(batch.segment_ids.numpy()):
        for at in np.flatnonzero(np.diff(segments, prepend=0)):
            axes.plot((at - 0.5, at - 0.5), (row - 0.5, row + 0.5), color=INK, linewidth=1.2)
    axes.set(yticks=range(rows), ylabel="row", xlabel="id")
    handles = [Rectangle((0, 0), 1, 1, color=COLOURS[m]) for m in names]
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1)}
    axes.legend(handles, names, ncols=len(names), frameon=False, **place)
    _save(figure, "packing")


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).float()


def _save(figure: Figure, name: str) -> None:
    figure.savefig(OUT / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    tokenizer = unimm.UnifiedTokenizer.from_pretrained("dialpad")
    shown = dialpad.make_scene(seed=1, index=3)
    draw_sequence(tokenizer, shown)
    draw_positions(tokenizer.grammar, tokenizer, shown)
    draw_codec(seed=5)
    draw_packing(tokenizer.vocabulary)
