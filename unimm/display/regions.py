"""Regions of a picture over the picture, and the code of each."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image

from unimm.display import html, media

_ENLARGED = 256  # pixels of the longer side, about


def region_colour(number: int) -> tuple[int, int, int]:
    """A colour of its own; the golden angle sets neighbouring numbers far apart."""
    red, green, blue = colorsys.hsv_to_rgb(number * 137.508 % 360 / 360, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def region_overlay(image: Image.Image, regions: np.ndarray) -> Image.Image:
    """A picture under the colours of its regions int (h, w), a line around each; enlarged."""
    height, width = regions.shape
    factor = max(1, round(_ENLARGED / max(height, width)))
    names = regions.repeat(factor, 0).repeat(factor, 1)
    size = (width * factor, height * factor)
    under = np.asarray(image.convert("RGB").resize(size, Image.Resampling.NEAREST), np.float32)
    colours = np.array([region_colour(n) for n in range(int(regions.max()) + 1)], np.float32)
    mixed = 0.6 * under + 0.4 * colours[names]
    edge = np.zeros(names.shape, dtype=bool)
    edge[:, 1:] |= names[:, 1:] != names[:, :-1]
    edge[1:] |= names[1:] != names[:-1]
    mixed[edge] = colours[names][edge]
    return Image.fromarray(mixed.astype(np.uint8))


def region_figure(image: Image.Image, regions: np.ndarray, codes: list[int]) -> str:
    """HTML: the overlay, and below it the codes in their order, each on its region's colour."""
    swatches = html.row(
        html.swatch(code, "rgb({}, {}, {})".format(*region_colour(place)), f"token {place}")
        for place, code in enumerate(codes)
    )
    return media.picture(region_overlay(image, regions), "regions") + swatches
