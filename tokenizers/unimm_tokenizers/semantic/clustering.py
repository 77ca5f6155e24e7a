"""Density-peaks clustering of patch features (DPC-KNN), batched and deterministic.

Rodriguez and Laio, Science 344 (2014), with the k-nearest-neighbour density of Du et al.
(Knowledge-Based Systems 99, 2016): a centre has a high density and is far from every denser point.
SeTok (arXiv 2406.05127) clusters picture features this way but breaks ties at random and walks
over the samples. Here ties go to the patch that comes first in raster order, and every comparison
is made in float64 on numbers rounded to `_DECIMALS`, six digits above the arithmetic's own noise:
sums may change in their last bit with the batch size, which must not change a region.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_DECIMALS = 9


class Regions(NamedTuple):
    """Which patches belong together.

    assignment: int64 (B, N), the region of each patch, 0 to count - 1; regions are numbered in the
        raster order of their first patch.
    count: int64 (B,), regions per picture.
    """

    assignment: Tensor
    count: Tensor

    def members(self, max_regions: int) -> Tensor:
        """bool (B, max_regions, N): whether a patch belongs to a region."""
        return F.one_hot(self.assignment, max_regions).bool().transpose(1, 2)

    def used(self, max_regions: int) -> Tensor:
        """bool (B, max_regions): which region numbers a picture has."""
        return torch.arange(max_regions, device=self.count.device) < self.count[:, None]


@torch.no_grad()
def density_peaks(
    features: Tensor,
    apart: Tensor,
    *,
    neighbours: int,
    threshold: float,
    min_regions: int,
    max_regions: int,
) -> Regions:
    """Cluster the patches of each picture; the number of regions follows the picture.

    Args:
        features: (B, N, D) float, of about unit scale per channel; N at least 1.
        apart: float64 (N, N), what the places of two patches add to their squared distance. It has
            no part in the density, so that a plain area is one plateau, whose patches all look up
            to the one before them.
        neighbours: patches that the density of a patch looks at.
        threshold: smallest score (density times distance to a denser patch) of a centre.
        min_regions: centres that are taken whatever their score, unless their features equal those
            of a denser patch.
        max_regions: bound; the patches of weaker centres go to the nearest stronger one.
    """
    between = _squared_distances(features)
    batch, patches = between.shape[:2]

    nearest = between.topk(min(neighbours + 1, patches), largest=False, sorted=True).values
    # The nearest one is the patch itself; a picture of one patch has no other.
    density = torch.exp(-nearest[..., 1:].sum(-1) / max(nearest.shape[-1] - 1, 1))
    rank = _rank_descending(density.round(decimals=_DECIMALS))
    distance2 = (between + apart).round(decimals=_DECIMALS)
    distance = distance2.sqrt()
    denser = rank[:, None, :] < rank[:, :, None]
    isolation = distance.masked_fill(~denser, torch.inf).amin(-1)
    # The densest patch has none to look up to: its farthest patch stands in (as in the paper).
    isolation = torch.where(isolation.isinf(), distance.amax(-1), isolation)

    unlike = between.masked_fill(~denser, torch.inf).amin(-1) > 0
    score = (density * isolation).round(decimals=_DECIMALS)
    place = _rank_descending(score)
    wanted = (score > threshold) | ((place < min_regions) & unlike) | (place == 0)
    centre = wanted & (place < max_regions)
    owner = distance2.masked_fill(~centre[:, None, :], torch.inf).argmin(-1)

    index = torch.arange(patches, device=features.device).expand(batch, patches)
    first = torch.full_like(index, patches).scatter_reduce(1, owner, index, "amin")
    first = first.gather(1, owner)  # of each patch: the first patch of its region
    opens = first == index
    number = opens.cumsum(1) - 1
    return Regions(number.gather(1, first), opens.sum(1))


def _squared_distances(features: Tensor) -> Tensor:
    """(B, N, D) -> float64 (B, N, N): mean over channels, rounded, zero for equal patches."""
    x = features.double()
    norm = x.square().sum(-1)
    distance2 = norm[:, :, None] + norm[:, None, :] - 2 * x @ x.transpose(1, 2)
    return (distance2 / x.shape[-1]).clamp(min=0).round(decimals=_DECIMALS)


def _rank_descending(values: Tensor) -> Tensor:
    """Place of each value in its row, 0 for the largest; the earlier of equal ones comes first."""
    return values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
