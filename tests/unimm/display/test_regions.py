"""A picture's regions as a notebook shows them."""

import numpy as np
import torch
from PIL import Image

from unimm import Semantic, reconstruct
from unimm.display.regions import region_colour, region_overlay
from unimm_tokenizers import build_codec


def test_an_overlay_is_enlarged_and_colours_each_region() -> None:
    regions = np.zeros((4, 8), dtype=np.int64)
    regions[:, 4:] = 1
    made = np.asarray(region_overlay(Image.new("RGB", (8, 4), (100, 100, 100)), regions))
    assert made.shape == (128, 256, 3)
    for number, place in ((0, (5, 5)), (1, (5, 250))):
        expected = 0.6 * 100 + 0.4 * np.array(region_colour(number))
        assert np.abs(made[place] - expected).max() <= 1
    # The line between them is of the region's own colour.
    assert made[5, 128].tolist() == list(region_colour(1))


def test_a_semantic_reconstruction_names_the_code_of_each_region() -> None:
    codec = build_codec("semantic-tiny")
    picture = Image.new("RGB", (32, 32), (200, 30, 30))
    picture.paste((0, 0, 220), (8, 8, 24, 24))
    view = reconstruct(Semantic(picture), codec)
    signal = torch.from_numpy(np.array(picture)).movedim(-1, 0)[None].float() / 127.5 - 1
    codes = codec.encode(signal)
    codes = codes[codes >= 0].tolist()
    assert view.figures["codes"] == str(len(codes))
    page = view._repr_html_()
    assert "regions" in page
    for place, code in enumerate(codes):
        assert f'title="token {place}"' in page
        assert f">{code}</span>" in page
