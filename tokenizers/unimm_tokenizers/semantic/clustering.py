"""Density-peaks clustering (DPC-KNN), batched and deterministic.

Rodriguez and Laio, Science 344 (2014), with the k-nearest-neighbour density of Du et al.
(Knowledge-Based Systems 99, 2016): a centre has a high density and is far from every denser point.
SeTok (arXiv 2406.05127) clusters picture features this way but breaks ties at random and walks
over the samples. Here ties go to the point that comes first in raster order, and every comparison
is made in float64 on numbers rounded to `DECIMALS`, six digits above the arithmetic's own noise:
sums may change in their last bit with the batch size, which must not change a region.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DECIMALS = 9


class Peaks(NamedTuple):
    """Centres among N points.

    index: int64 (B, M), the points that are centres, in raster order; 0 beyond `count`.
    count: int64 (B,), centres per picture, at most M.
    merged: int64 (B,), weaker centres that gave way to the bound M.
    """

    index: Tensor
    count: Tensor
    merged: Tensor

    @property
    def used(self) -> Tensor:
        """bool (B, M): which places of `index` hold a centre."""
        return torch.arange(self.index.shape[1], device=self.count.device) < self.count[:, None]

    def of(self, points: Tensor) -> Tensor:
        """The centres' own features (B, M, D) among those of all points (B, N, D)."""
        return points.gather(1, self.index[..., None].expand(-1, -1, points.shape[2]))


class Regions(NamedTuple):
    """Which points belong together.

    assignment: int64 (B, N), the region of each point, 0 to count - 1; regions are numbered in the
        raster order of their first point.
    count: int64 (B,), regions per picture.
    merged: int64 (B,), centres beyond the bound, whose points went to stronger ones.
    """

    assignment: Tensor
    count: Tensor
    merged: Tensor

    def members(self, max_regions: int) -> Tensor:
        """bool (B, max_regions, N): whether a point belongs to a region."""
        return F.one_hot(self.assignment, max_regions).bool().transpose(1, 2)

    def used(self, max_regions: int) -> Tensor:
        """bool (B, max_regions): which region numbers a picture has."""
        return torch.arange(max_regions, device=self.count.device) < self.count[:, None]


@torch.no_grad()
def find_peaks(
    features: Tensor,
    apart: Tensor,
    *,
    neighbours: int,
    threshold: float,
    min_regions: int,
    max_regions: int,
) -> Peaks:
    """The centres of each picture; how many follows the picture.

    Args:
        features: (B, N, D) float, of about unit scale per channel; N at least 1.
        apart: float64 (N, N), what the places of two points add to their squared distance. It has
            no part in the density, so that a plain area is one plateau, whose points all look up
            to the one before them.
        neighbours: points that the density of a point looks at.
        threshold: smallest score (density times distance to a denser point) of a centre.
        min_regions: centres that are taken whatever their score, unless their features equal those
            of a denser point.
        max_regions: bound M; weaker centres give way.
    """
    between = _squared_distances(features, features)
    points = between.shape[1]
    nearest = between.topk(min(neighbours + 1, points), largest=False, sorted=True).values
    # The nearest one is the point itself; a picture of one point has no other.
    density = torch.exp(-nearest[..., 1:].sum(-1) / max(nearest.shape[-1] - 1, 1))
    rank = _rank_descending(density.round(decimals=DECIMALS))
    distance2 = (between + apart).round(decimals=DECIMALS)
    denser = rank[:, None, :] < rank[:, :, None]
    isolation2 = distance2.masked_fill(~denser, torch.inf).amin(-1)
    # The densest point has none to look up to: its farthest point stands in (as in the paper).
    isolation2 = torch.where(isolation2.isinf(), distance2.amax(-1), isolation2)

    unlike = between.masked_fill(~denser, torch.inf).amin(-1) > 0
    score = (density * isolation2.sqrt()).round(decimals=DECIMALS)
    place = _rank_descending(score)
    wanted = (score > threshold) | ((place < min_regions) & unlike) | (place == 0)
    centre = wanted & (place < max_regions)
    count = centre.sum(1)
    # A stable sort brings the centres to the front in raster order.
    index = (~centre).byte().argsort(dim=1, stable=True)[:, :max_regions]
    beyond = torch.arange(index.shape[1], device=index.device) >= count[:, None]
    return Peaks(index.masked_fill(beyond, 0), count, wanted.sum(1) - count)


@torch.no_grad()
def join_peaks(features: Tensor, points: Tensor, apart: Tensor, peaks: Peaks) -> Regions:
    """Give every cell to its nearest centre.

    Args:
        features: (B, n, D) of the cells, in raster order.
        points: (B, N, D), the points among which centres were found.
        apart: float64 (n, N), what places add to squared distances.
        peaks: the centres.
    """
    away = apart.T[peaks.index].transpose(1, 2)  # (B, n, M)
    distance2 = _squared_distances(features, peaks.of(points)) + away
    reachable = distance2.round(decimals=DECIMALS).masked_fill(~peaks.used[:, None], torch.inf)
    return number_regions(reachable.argmin(-1), features.shape[1], peaks.merged)


def number_regions(owner: Tensor, names: int, merged: Tensor) -> Regions:
    """Regions by the raster order of their first cell; owner: int64 (B, n), below `names`."""
    index = torch.arange(owner.shape[1], device=owner.device).expand_as(owner)
    first = owner.new_full((len(owner), names), owner.shape[1])
    first = first.scatter_reduce(1, owner, index, "amin").gather(1, owner)
    opens = first == index
    number = opens.cumsum(1) - 1
    return Regions(number.gather(1, first), opens.sum(1), merged)


def density_peaks(
    features: Tensor,
    apart: Tensor,
    *,
    neighbours: int,
    threshold: float,
    min_regions: int,
    max_regions: int,
) -> Regions:
    """Centres and regions on one grid; see `find_peaks` and `join_peaks`."""
    peaks = find_peaks(
        features,
        apart,
        neighbours=neighbours,
        threshold=threshold,
        min_regions=min_regions,
        max_regions=max_regions,
    )
    return join_peaks(features, features, apart, peaks)


def _squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """(B, n, D), (B, N, D) -> float64 (B, n, N): mean over channels, rounded, 0 for equal ones."""
    x, y = left.double(), right.double()
    norms = x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None]
    distance2 = torch.baddbmm(norms, x, y.transpose(1, 2), alpha=-2)
    return distance2.div_(x.shape[-1]).clamp_(min=0).round_(decimals=DECIMALS)


def _rank_descending(values: Tensor) -> Tensor:
    """Place of each value in its row, 0 for the largest; the earlier of equal ones comes first."""
    return values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
