"""Pictures and film: tiles equal the whole, receptive fields hold, time is causal."""

from typing import Any

import pytest
import torch
from torch import Tensor

from unimm_tokenizers.quantize import Quantizer
from unimm_tokenizers.vision import VisionCodec, VisionConfig
from unimm_tokenizers.vision.layers import unit_rms

SHAPES: dict[str, dict[str, Any]] = {
    "f4": {"multipliers": (1, 2)},
    "deep": {"multipliers": (1,), "patch": 4, "num_blocks": 2},
    "f8": {"multipliers": (1, 1, 2)},
    "fsq": {"multipliers": (1, 2), "fsq_levels": (5, 4)},
    "lean": {"multipliers": (1, 2), "patch": 4, "block": "lean", "num_blocks": 2},
}


def started(**options: Any) -> VisionCodec:
    """A codec whose codebook fits its encoder: one training pass starts k-means."""
    config = VisionConfig(channels=8, latent_channels=8, codebook_size=64, **options)
    codec = VisionCodec(config).train()
    for parameter in codec.parameters():  # blocks that start as the identity see nothing
        if parameter.ndim > 1 and not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.1)
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


@torch.no_grad()
@pytest.mark.slow
def test_a_large_picture_is_tiled_in_bounded_memory() -> None:
    """2048 x 1536: no code differs, the picture to 1e-5, and no tensor outgrows the picture."""
    config = VisionConfig(channels=32, multipliers=(1, 1, 2), latent_channels=8, codebook_size=64)
    codec = VisionCodec(config).train()
    codec(noise(2, 3, 128, 128))
    codec.eval()
    x = torch.nn.functional.interpolate(noise(1, 3, 96, 128), (1536, 2048), mode="bilinear")

    def largest(profile: Any) -> int:
        return max(abs(event.self_cpu_memory_usage) for event in profile.events())

    with torch.profiler.profile(profile_memory=True, acc_events=True) as whole:
        codes = codec.encode(x)
        made = codec.decode(codes)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as tiles:
        assert int((codec.encode_tiled(x, 256) != codes).sum()) == 0
        tiled = codec.decode_tiled(codes, 32, (1536, 2048))
    torch.testing.assert_close(tiled, made, rtol=0, atol=1e-5)
    assert largest(whole) > 2 * x.nbytes
    assert largest(tiles) <= x.nbytes  # what is read and what is written, and nothing between


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
        return codec._latents(codec._padded(signal))[0][0, :, 0, at, at]

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
        return film_codec._latents(signal)[0][0, :, -1]

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


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 9, 14])
@pytest.mark.parametrize("chunk", [1, 3, 4, 50])
def test_chunks_are_the_whole_film(film_codec: VisionCodec, frames: int, chunk: int) -> None:
    """Codes of chunks of any length are those of the film, and so are the decoded frames."""
    x = noise(2, 3, frames, 9, 14)
    codes = film_codec.encode(x)
    state = film_codec.init_state(2)
    parts = []
    for start in range(0, frames, chunk):
        last = start + chunk >= frames
        part, state = film_codec.encode_chunk(x[:, :, start : start + chunk], state, last=last)
        parts.append(part)
    assert int((torch.cat(parts, 2) != codes).sum()) == 0
    film = film_codec.decode(codes)
    state = film_codec.init_state(2)
    made = []
    for start in range(0, codes.shape[2], 2):
        part, state = film_codec.decode_chunk(codes[:, :, start : start + 2], state)
        made.append(part)
    torch.testing.assert_close(torch.cat(made, 2), film, rtol=0, atol=1e-5)


@torch.no_grad()
def test_streams_do_not_touch_each_other(film_codec: VisionCodec) -> None:
    """The state is the caller's: two films by turns, and one film twice from the same state."""
    films = [noise(1, 3, 9, 8, 8) for _ in range(2)]
    states = [film_codec.init_state(1) for _ in range(2)]
    parts: list[list[Tensor]] = [[], []]
    for start in (0, 5):
        for n in range(2):
            chunk = films[n][:, :, start : start + 5]
            again, _ = film_codec.encode_chunk(chunk, states[n], last=start > 0)
            part, states[n] = film_codec.encode_chunk(chunk, states[n], last=start > 0)
            assert torch.equal(again, part)
            parts[n].append(part)
    for n in range(2):
        assert torch.equal(torch.cat(parts[n], 2), film_codec.encode(films[n]))


def test_bad_chunks_are_refused(codec: VisionCodec, film_codec: VisionCodec) -> None:
    with pytest.raises(ValueError, match="a codec of pictures has nothing to stream"):
        codec.init_state(1)
    state = film_codec.init_state(2)
    with pytest.raises(ValueError, match="the state holds 2 films, the chunk 1"):
        film_codec.encode_chunk(noise(1, 3, 2, 8, 8), state)
    with pytest.raises(ValueError, match="the state holds 2 films, the chunk 1"):
        film_codec.decode_chunk(torch.zeros(1, 1, 1, 2, 2, dtype=torch.int64), state)
    _, state = film_codec.encode_chunk(noise(2, 3, 2, 8, 8), state)
    with pytest.raises(ValueError, match=r"the film is \(8, 8\), the chunk \(8, 9\)"):
        film_codec.encode_chunk(noise(2, 3, 2, 8, 9), state)
    with pytest.raises(ValueError, match="expected a signal"):
        film_codec.encode_chunk(noise(2, 3, 8, 8), state)


@torch.no_grad()
@pytest.mark.parametrize("step", [2, 4, 8])
def test_a_picture_codec_becomes_one_of_films(codec: VisionCodec, step: int) -> None:
    """Pictures keep their codes, a still film decodes to the picture, and time can be learned."""
    films = codec.inflate(step, fps=12.5)
    assert films.modalities == ("image", "video")
    assert films.config.fps == 12.5
    assert not films.training
    x = noise(2, 3, 21, 18)
    codes = codec.encode(x)
    assert torch.equal(films.encode(x), codes)
    torch.testing.assert_close(films.decode(codes), codec.decode(codes))
    still = films.encode(x[:, :, None].expand(-1, -1, 1 + step, -1, -1))
    assert torch.equal(still, codes[:, :, None].expand(-1, -1, 2, -1, -1))
    picture = codec.decode(codes)[:, :, None].expand(-1, -1, 1 + step, -1, -1)
    torch.testing.assert_close(films.decode(still), picture, rtol=0, atol=1e-5)
    with torch.enable_grad():
        films.train()(noise(1, 3, 1 + step, 16, 16)).reconstruction.square().sum().backward()
    for stack in (films.time_encoder, films.time_decoder):
        convolutions = [m for m in stack[-1].modules() if isinstance(m, torch.nn.Conv3d)]
        assert bool(convolutions[0].weight.grad.any())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="only a codec of pictures"):
        films.inflate(2)


@torch.no_grad()
def test_a_picture_costs_one_frame(film_codec: VisionCodec) -> None:
    """Counted in multiplications of convolutions: a film of 1 + T frames costs the more frames."""

    def cost(x: Tensor) -> int:
        seen = 0

        def count(module: Any, inputs: Any, output: Tensor) -> None:
            nonlocal seen
            seen += output.numel() * module.weight[0].numel()

        spatial = [m for m in film_codec.modules() if isinstance(m, torch.nn.Conv2d)]
        hooks = [module.register_forward_hook(count) for module in spatial]
        film_codec.encode(x)
        for hook in hooks:
            hook.remove()
        return seen

    step = film_codec.downsample[0]
    one = cost(noise(1, 3, 16, 16))
    assert cost(noise(1, 3, 1, 16, 16)) == one
    assert step * one < cost(noise(1, 3, 1 + step, 16, 16)) <= (1 + step) * one


@torch.no_grad()
def test_pictures_of_many_sizes_are_coded_as_one_by_one(codec: VisionCodec) -> None:
    sizes = [(16, 16), (9, 31), (1, 1), (16, 16), (40, 8), (9, 31), (16, 16)]
    signals = [noise(3, *size) for size in sizes]
    together = codec.encode_each(signals)
    for signal, codes in zip(signals, together, strict=True):
        assert torch.equal(codes, codec.encode(signal[None])[0])


@torch.no_grad()
def test_encoding_twice_gives_the_same(codec: VisionCodec) -> None:
    x = noise(2, 3, 33, 47)
    codes = codec.encode(x)
    assert all(torch.equal(codec.encode(x), codes) for _ in range(5))


@torch.no_grad()
def test_every_size_from_one_pixel_comes_back(codec: VisionCodec) -> None:
    """All sizes up to two cells: padded by the edge repeated, cropped back exactly."""
    cell = codec.downsample[0]
    for height in range(1, 2 * cell + 1, 3):
        for width in range(1, 2 * cell + 1, 5):
            x = noise(1, 3, height, width)
            codes = codec.encode(x)
            assert codes.shape == (1, 1, -(-height // cell), -(-width // cell))
            assert codec.decode(codes, (height, width)).shape == x.shape
            padded = x[:, :, [min(n, height - 1) for n in range(codes.shape[2] * cell)]]
            padded = padded[:, :, :, [min(n, width - 1) for n in range(codes.shape[3] * cell)]]
            assert torch.equal(codec.encode(padded), codes)


QUANTIZERS: dict[str, dict[str, Any]] = {
    "vq": {},
    "residual": {"num_codebooks": 3, "codebook_dim": None},
    "simvq": {"quantizer": "simvq"},
    "ibq": {"quantizer": "ibq"},
    "lfq": {"quantizer": "lfq"},
    "bsq": {"quantizer": "bsq"},
}


@torch.no_grad()
@pytest.mark.parametrize("name", QUANTIZERS)
def test_any_quantizer_serves(name: str, tmp_path: Any) -> None:
    codec = started(multipliers=(1, 2), **QUANTIZERS[name])
    assert isinstance(codec.quantizer, Quantizer)
    assert (codec.codebook_size, codec.num_codebooks) == (64, 3 if name == "residual" else 1)
    x = noise(2, 3, 20, 12)
    codes = codec.encode(x)
    codec.save_pretrained(tmp_path)
    again = VisionCodec.from_pretrained(tmp_path)
    assert torch.equal(again.encode(x), codes)
    assert torch.equal(again.decode(codes), codec.decode(codes))
    assert int((codec.encode_tiled(x, 8) != codes).sum()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "dense"}, "block must be one of residual, lean, got 'dense'"),
        ({"quantizer": "pq"}, "quantizer must be one of vq, simvq, ibq, lfq, bsq, got 'pq'"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"multipliers": ()}, "multipliers must be numbers above 0"),
        ({"codebook_size": 1}, "codebook_size must be at least 2, got 1"),
        ({"num_codebooks": 2, "quantizer": "ibq"}, "residual levels.* needs quantizer 'vq'"),
        ({"quantizer": "bsq", "codebook_size": 100}, "bsq: codebook_size must be a power of 2"),
    ],
)
def test_bad_configs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionConfig(**options)


def test_the_norm_has_the_gradient_of_its_formula() -> None:
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    scale = (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    weights = torch.randn_like(x)
    (expected,) = torch.autograd.grad((x * scale * weights).sum(), x)
    (found,) = torch.autograd.grad((unit_rms(x) * weights).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


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
