"""Pictures and film: tiles equal the whole, receptive fields hold, time is causal."""

from typing import Any

import pytest
import torch
from torch import Tensor

from unimm_tokenizers.vision import VisionCodec, VisionConfig

SHAPES: dict[str, dict[str, Any]] = {
    "f4": {"multipliers": (1, 2)},
    "deep": {"multipliers": (1,), "patch": 4, "num_blocks": 2},
    "f8": {"multipliers": (1, 1, 2)},
    "fsq": {"multipliers": (1, 2), "fsq_levels": (5, 4)},
}


def started(**options: Any) -> VisionCodec:
    """A codec whose codebook fits its encoder: one training pass starts k-means."""
    config = VisionConfig(channels=8, latent_channels=8, codebook_size=64, **options)
    codec = VisionCodec(config).train()
    with torch.no_grad():
        codec(noise(8, 3, 32, 32))
    return codec.eval()


def noise(*shape: int) -> Tensor:
    return torch.rand(*shape) * 2 - 1


@pytest.fixture(params=SHAPES)
def codec(request: pytest.FixtureRequest) -> VisionCodec:
    return started(**SHAPES[request.param])


@pytest.fixture(params=[2, 4, 8])
def film_codec(request: pytest.FixtureRequest) -> VisionCodec:
    return started(multipliers=(1, 2), time_downsample=request.param)


# Tiles


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (37, 45), (9, 80)])
def test_tiles_are_the_whole(codec: VisionCodec, size: tuple[int, int]) -> None:
    x = noise(2, 3, *size)
    cell = codec.downsample[0]
    codes = codec.encode(x)
    made = codec.decode(codes, size)
    for tile in (2 * cell, 7 * cell):
        assert int((codec.encode_tiled(x, tile) != codes).sum()) == 0
    for tile in (2, 5):
        tiled = codec.decode_tiled(codes, tile, size)
        torch.testing.assert_close(tiled, made, rtol=0, atol=1e-5)
    whole = codec.decode_tiled(codes, 4)
    torch.testing.assert_close(whole, codec.decode(codes), rtol=0, atol=1e-5)


def test_bad_tiles_are_refused(codec: VisionCodec, film_codec: VisionCodec) -> None:
    cell = codec.downsample[0]
    x = noise(1, 3, 16, 16)
    for tile in (0, -cell, cell + 1):
        with pytest.raises(ValueError, match=f"tile must be a multiple of {cell}, got {tile}"):
            codec.encode_tiled(x, tile)
    with pytest.raises(ValueError, match="tile must be at least 1 code, got 0"):
        codec.decode_tiled(codec.encode(x), 0)
    with pytest.raises(ValueError, match="expected a signal"):
        film_codec.encode_tiled(noise(1, 3, 2, 16, 16), 8)
    with pytest.raises(ValueError, match="expected codes"):
        film_codec.decode_tiled(film_codec.encode(noise(1, 3, 2, 16, 16)), 8)
    with pytest.raises(ValueError, match="is empty"):
        codec.encode_tiled(x[:, :, :0], cell)


# Receptive field


@torch.no_grad()
def test_a_code_sees_no_further_than_it_says(codec: VisionCodec) -> None:
    """Everything outside the field is replaced: the code's latents do not move. Inside, they do."""
    cell, (field, _) = codec.downsample[0], codec.receptive_field
    side = -(-2 * field // cell) * cell
    at = side // cell // 2
    margin = (field - cell) // 2
    low, high = at * cell - margin, (at + 1) * cell + margin
    assert 0 < low < high < side
    x = noise(1, 3, side, side)
    outside = noise(1, 3, side, side)
    outside[:, :, low:high, low:high] = x[:, :, low:high, low:high]

    def latents(signal: Tensor) -> Tensor:
        return codec._latents(codec._padded(signal))[0, :, 0, at, at]

    assert torch.allclose(latents(outside), latents(x), atol=1e-6)
    assert torch.equal(codec.encode(outside)[..., at, at], codec.encode(x)[..., at, at])
    for edge in (low, high - 1):  # the field is no larger than it has to be
        touched = x.clone()
        touched[:, :, edge, edge] *= -1
        assert not torch.equal(latents(touched), latents(x))


@torch.no_grad()
def test_a_film_code_sees_no_further_back_than_it_says(film_codec: VisionCodec) -> None:
    step = film_codec.downsample[0]
    frames, height, width = film_codec.receptive_field
    assert frames == {2: 7, 4: 19, 8: 43}[step]
    assert height == width
    count = 1 + step * (-(-frames // step) + 1)
    x = noise(1, 3, count, 4, 4)
    last = count - 1
    changed = noise(1, 3, count, 4, 4)
    changed[:, :, last - frames + 1 :] = x[:, :, last - frames + 1 :]

    def latents(signal: Tensor) -> Tensor:
        return film_codec._latents(signal)[0, :, -1]

    assert torch.allclose(latents(changed), latents(x), atol=1e-6)
    touched = x.clone()
    touched[:, :, last - frames + 1] *= -1
    assert not torch.equal(latents(touched), latents(x))


# Film


@torch.no_grad()
def test_the_first_frame_is_a_picture(film_codec: VisionCodec) -> None:
    step = film_codec.downsample[0]
    for frames in (1, 2, step + 1, 2 * step + 3):
        x = noise(2, 3, frames, 9, 14)
        codes = film_codec.encode(x)
        assert codes.shape[2] == 1 + -(-(frames - 1) // step)
        picture = film_codec.encode(x[:, :, 0])
        assert torch.equal(codes[:, :, 0], picture)
        film = film_codec.decode(codes, (frames, 9, 14))
        assert film.shape == x.shape
        still = film_codec.decode(picture, (9, 14))
        torch.testing.assert_close(film[:, :, 0], still, rtol=0, atol=1e-5)


@torch.no_grad()
def test_later_frames_change_no_earlier_code(film_codec: VisionCodec) -> None:
    step = film_codec.downsample[0]
    x = noise(1, 3, 1 + 4 * step, 8, 8)
    codes = film_codec.encode(x)
    for frame in range(1, 5):
        kept = 1 + (frame - 1) * step  # frames that code frames 0 .. frame - 1 stand for
        changed = x.clone()
        changed[:, :, kept:] = noise(1, 3, x.shape[2] - kept, 8, 8)
        assert torch.equal(film_codec.encode(changed)[:, :, :frame], codes[:, :, :frame])
        assert torch.equal(film_codec.encode(x[:, :, :kept]), codes[:, :, :frame])


@torch.no_grad()
def test_later_codes_change_no_earlier_frame(film_codec: VisionCodec) -> None:
    step = film_codec.downsample[0]
    codes = film_codec.encode(noise(1, 3, 1 + 4 * step, 8, 8))
    film = film_codec.decode(codes)
    for frame in range(1, 5):
        kept = 1 + (frame - 1) * step
        changed = codes.clone()
        changed[:, :, frame:] = (changed[:, :, frame:] + 7) % 64
        other = film_codec.decode(changed)[:, :, :kept]
        torch.testing.assert_close(other, film[:, :, :kept], rtol=0, atol=1e-5)
        part = film_codec.decode(codes[:, :, :frame])
        torch.testing.assert_close(part, film[:, :, :kept], rtol=0, atol=1e-5)


def test_what_is_no_film_is_refused(codec: VisionCodec, film_codec: VisionCodec) -> None:
    film = noise(1, 3, 3, 8, 8)
    with pytest.raises(ValueError, match=r"expected a signal \(batch, 3 channels, 2 signal axes\)"):
        codec.encode(film)
    with pytest.raises(ValueError, match="expected codes"):
        codec.decode(film_codec.encode(film))
    for size in ((1, 3, 0, 8, 8), (1, 3, 2, 0, 8), (1, 3, 8, 0)):
        with pytest.raises(ValueError, match="the picture or film is empty"):
            film_codec.encode(torch.zeros(size))
    assert film_codec.modalities == ("image", "video")
    assert codec.modalities == ("image",)
    with pytest.raises(ValueError, match="time_downsample must be 1, 2, 4 or 8, got 0"):
        VisionConfig(time_downsample=0)


@torch.no_grad()
def test_a_flat_picture_has_flat_codes_inside() -> None:
    """No position is told from another but by the border."""
    codec = started(multipliers=(1, 2))
    codes = codec.encode(torch.zeros(1, 3, 96, 96))[0, 0]
    margin = codec.receptive_field[0] // codec.downsample[0]
    assert len(codes[margin:-margin, margin:-margin].unique()) == 1


def test_a_few_steps_of_training_help() -> None:
    torch.manual_seed(0)
    codec = VisionCodec(
        VisionConfig(channels=8, multipliers=(1, 2), latent_channels=8, fsq_levels=(8, 5, 5))
    )
    x = torch.nn.functional.interpolate(noise(8, 3, 4, 4), (16, 16), mode="bilinear")
    optimizer = torch.optim.Adam(codec.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        output = codec(x)
        loss = (output.reconstruction - output.target).square().mean() + output.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
