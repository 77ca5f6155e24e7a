"""Scenes whose masks are known."""

import numpy as np
import pytest

from unimm.data.composed import best_overlap, composed_scene


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_masks_share_no_pixel_and_leave_none_out(digits: int) -> None:
    scene = composed_scene(np.random.default_rng(0), 48, digits)
    assert scene.picture.shape == (48, 48, 3)
    assert scene.masks.shape == (digits + 1, 48, 48)
    assert (scene.masks.sum(0) == 1).all()
    assert scene.masks.any((1, 2)).all()
    # What a mask holds looks unlike the ground.
    means = [scene.picture[mask].mean(0) for mask in scene.masks]
    assert all(np.abs(mean - means[-1]).max() > 50 for mean in means[:-1])


def test_a_ground_shows_where_no_digit_lies() -> None:
    ground = np.full((32, 32, 3), 90, dtype=np.uint8)
    ground[:, 16:] = 30
    scene = composed_scene(np.random.default_rng(1), 32, 1, ground)
    far = scene.masks[-1] & (scene.picture.astype(int).max(-1) < 130)
    assert np.abs(scene.picture[far].astype(int) - ground[far]).mean() < 12


def test_scenes_follow_the_random_state_and_refuse_nonsense() -> None:
    one, other = (composed_scene(np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(one.picture, other.picture)
    with pytest.raises(ValueError, match="at least one digit"):
        composed_scene(np.random.default_rng(0), digits=0)
    with pytest.raises(ValueError, match=r"the ground must be \(32, 32, 3\)"):
        composed_scene(np.random.default_rng(0), ground=np.zeros((8, 8, 3), np.uint8))


def test_overlap_of_the_region_that_fits_best() -> None:
    regions = np.array([[0, 0, 1], [2, 2, 1]])
    mask = np.array([[True, True, False], [True, False, False]])
    assert best_overlap(regions, mask) == pytest.approx(2 / 3)
    assert best_overlap(regions, regions == 1) == 1
