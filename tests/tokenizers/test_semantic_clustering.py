"""Density-peaks clustering against a plain reference, and what it promises about ties."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unimm_tokenizers.semantic.clustering import (
    Regions,
    density_peaks,
    find_peaks,
    join_peaks,
)

SETTINGS = {"neighbours": 3, "threshold": 0.4, "min_regions": 1, "max_regions": 12}


def apart(side: int, weight: float) -> Tensor:
    """Squared distances of the cells of a grid whose side has length 1, times `weight`."""
    axis = torch.arange(side, dtype=torch.float64)
    place = torch.cartesian_prod(axis, axis)
    return (place[:, None] - place).square().sum(-1) * (weight / side**2)


def blobs(seed: int, batch: int, side: int) -> Tensor:
    """Features (B, side * side, 6) around three means per picture, many patches exactly equal."""
    random = torch.Generator().manual_seed(seed)
    means = torch.randn(batch, 3, 6, generator=random)
    kinds = torch.randint(0, 3, (batch, side**2), generator=random)
    noise = torch.randn(batch, side**2, 6, generator=random) * 0.3
    noise *= torch.rand(batch, side**2, 1, generator=random) < 0.5
    return means.gather(1, kinds[..., None].expand(-1, -1, 6)) + noise


def reference(features: Tensor, between: Tensor, settings: dict[str, float]) -> list[int]:
    """One picture, patch by patch, as the paper says it."""
    x = features.double().numpy()
    patches = len(x)
    feature2 = np.array([[((a - b) ** 2).mean() for b in x] for a in x]).round(9)
    distance = np.sqrt((feature2 + between.numpy()).round(9))
    density: list[float] = []
    for row in feature2:
        others = np.sort(row)[1 : int(settings["neighbours"]) + 1]
        density.append(np.exp(-others.mean()).round(9))
    score = []
    for i in range(patches):
        denser = [j for j in range(patches) if (-density[j], j) < (-density[i], i)]
        reach = min(distance[i][j] for j in denser) if denser else distance[i].max()
        score.append(np.round(density[i] * reach, 9))
    order = sorted(range(patches), key=lambda i: (-score[i], i))
    centres = []
    for place, i in enumerate(order[: int(settings["max_regions"])]):
        denser = [j for j in range(patches) if (-density[j], j) < (-density[i], i)]
        unlike = all(feature2[i][j] > 0 for j in denser)
        forced = place == 0 or (place < settings["min_regions"] and unlike)
        if forced or score[i] > settings["threshold"]:
            centres.append(i)
    owner = [min(sorted(centres), key=lambda c: distance[i][c]) for i in range(patches)]
    names: dict[int, int] = {}
    return [names.setdefault(c, len(names)) for c in owner]


@pytest.mark.parametrize("weight", [0.0, 0.8])
@pytest.mark.parametrize(
    "settings",
    [SETTINGS, {**SETTINGS, "min_regions": 4, "threshold": 5.0}, {**SETTINGS, "max_regions": 2}],
)
def test_equals_the_reference(weight: float, settings: dict[str, float]) -> None:
    features = blobs(0, batch=12, side=5)
    found = density_peaks(features, apart(5, weight), **settings)  # pyright: ignore
    expected = [reference(picture, apart(5, weight), settings) for picture in features]
    assert found.assignment.tolist() == expected
    assert found.count.tolist() == [max(row) + 1 for row in expected]


def test_the_number_of_regions_follows_the_picture() -> None:
    settings = {**SETTINGS, "max_regions": 25}
    counts = density_peaks(blobs(0, batch=12, side=5), apart(5, 0.8), **settings).count
    assert len(counts.unique()) >= 4
    assert int(counts.max()) < 25


@pytest.mark.parametrize("side", [1, 2, 5, 8])
@pytest.mark.parametrize("neighbours", [1, 5, 100])
def test_equal_patches_are_one_region(side: int, neighbours: int) -> None:
    """Up to the spatial weight that the config allows: one cell just short of the threshold."""
    found = density_peaks(
        torch.full((2, side**2, 7), 0.3),
        apart(side, (0.39 * side) ** 2),
        **{**SETTINGS, "neighbours": neighbours, "max_regions": min(8, side**2)},
    )
    assert found.count.tolist() == [1, 1]
    assert int(found.assignment.abs().max()) == 0


def test_wanted_regions_are_not_made_of_equal_patches() -> None:
    found = density_peaks(torch.zeros(1, 16, 4), apart(4, 1.0), **{**SETTINGS, "min_regions": 5})
    assert found.count.tolist() == [1]


def test_the_weakest_centres_give_way_to_the_bound() -> None:
    """Four kinds of patches and room for three: the kind least unlike another one joins it."""
    kinds = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [0.0, 5.0]])
    features = kinds.repeat_interleave(4, 0)[None]
    four = density_peaks(features, apart(4, 0.0), **{**SETTINGS, "max_regions": 4})
    three = density_peaks(features, apart(4, 0.0), **{**SETTINGS, "max_regions": 3})
    assert four.assignment[0, ::4].tolist() == [0, 1, 2, 3]
    assert three.assignment[0, ::4].tolist() == [0, 1, 2, 2]
    assert (four.merged.tolist(), three.merged.tolist()) == ([0], [1])


def test_cells_between_the_points_join_the_nearest_centre() -> None:
    """Centres sought on every second cell of a row, cells on all of it."""
    cells = torch.tensor([0.0, 0.1, 0.0, 0.2, 5.0, 5.0, 5.0, 4.0])[None, :, None]
    line = torch.arange(8.0, dtype=torch.float64)
    away = (line[:, None] - line[::2]).square() * 1e-3
    peaks = find_peaks(cells[:, ::2], away[::2], **{**SETTINGS, "neighbours": 1})  # pyright: ignore
    regions = join_peaks(cells, cells[:, ::2], away, peaks)
    assert regions.assignment.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    assert peaks.index[0, :2].tolist() == [0, 2]
    assert peaks.count.tolist() == regions.count.tolist() == [2]


@given(seed=st.integers(0, 10_000), bound=st.integers(1, 16))
def test_regions_are_numbered_by_their_first_patch(seed: int, bound: int) -> None:
    found = density_peaks(
        blobs(seed, batch=2, side=4), apart(4, 1.0), **{**SETTINGS, "max_regions": bound}
    )
    for row, count in zip(found.assignment.tolist(), found.count.tolist(), strict=True):
        assert list(dict.fromkeys(row)) == list(range(count))
        assert 1 <= count <= bound


def test_noise_of_the_arithmetic_changes_nothing() -> None:
    features = blobs(1, batch=64, side=6).double()
    random = torch.Generator().manual_seed(0)
    shaken = features + 1e-14 * torch.randn(features.shape, generator=random, dtype=torch.float64)
    one = density_peaks(features, apart(6, 1.0), **SETTINGS)
    other = density_peaks(shaken, apart(6, 1.0), **SETTINGS)
    assert torch.equal(one.assignment, other.assignment)


def test_masks_of_members_and_of_used_regions() -> None:
    regions = Regions(torch.tensor([[0, 1, 0], [0, 0, 0]]), torch.tensor([2, 1]), torch.zeros(2))
    assert regions.used(3).tolist() == [[True, True, False], [True, False, False]]
    members = regions.members(3)
    assert members[0].tolist() == [[True, False, True], [False, True, False], [False] * 3]
    assert members[1].sum().item() == 3
