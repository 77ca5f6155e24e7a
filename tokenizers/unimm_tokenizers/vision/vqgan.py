"""The VQ-GAN of taming-transformers (Esser et al., arXiv 2012.09841), for weights that exist.

Chameleon's picture tokenizer is one (arXiv 2405.09818, section 2.1, after Make-A-Scene, arXiv
2203.13131): 16 x 16 pixels per code, 8,192 codes of 256 channels. Group norms and attention see
the whole picture, so it neither tiles nor streams: codecs made here are of the class `vision`.
Its weights have the names of the public checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_kernels import nearest_code
from unimm_tokenizers.codec import Codec, CodecOutput, register_codec
from unimm_tokenizers.quantize import Quantized, Quantizer
from unimm_tokenizers.vision.layers import pad_to_multiple

GROUPS, EPS = 32, 1e-6
COMMITMENT = 0.25


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Shape of a VQ-GAN.

    Space shrinks by 2 for every multiplier after the first. `attention` lists the levels (indices
    of multipliers) whose every block is followed by attention; there is some in the middle if
    `middle_attention` is set. The decoder has one block more per level than the encoder.

    Raises:
        ValueError: a width is not a multiple of the 32 groups of its norms.
    """

    num_channels: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    attention: tuple[int, ...] = ()
    middle_attention: bool = True
    latent_channels: int = 256
    codebook_dim: int = 256
    codebook_size: int = 8192
    fps: float = 10.0

    def __post_init__(self) -> None:
        if not self.multipliers or any(self.channels * m % GROUPS for m in self.multipliers):
            raise ValueError(
                f"channels {self.channels} times each of {self.multipliers} must be a multiple of "
                f"{GROUPS}"
            )


class Codebook(Quantizer):
    """One table of vectors, learned by gradient (van den Oord et al., arXiv 1711.00937)."""

    num_codebooks = 1

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.codebook_size = size
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def quantize(self, latents: Tensor) -> Quantized:
        """See `Quantizer.quantize`."""
        with torch.autocast(latents.device.type, enabled=False):
            rows = latents.float().movedim(1, -1)
            codes = nearest_code(rows.detach().flatten(0, -2), self.embedding.weight.float())
            codes = codes.view(rows.shape[:-1])
            vectors = self.embedding(codes)
            loss = F.mse_loss(vectors, rows.detach()) + COMMITMENT * F.mse_loss(
                rows, vectors.detach()
            )
            passed = rows + (vectors - rows).detach()
        return Quantized(passed.movedim(-1, 1), codes[:, None], loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """See `Quantizer.lookup`."""
        return self.embedding(codes[:, 0]).movedim(-1, 1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=EPS)


class Residual(nn.Module):
    """norm, SiLU, 3x3, norm, SiLU, 3x3, added to the input; (N, C, H, W)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(channels), _norm(out_channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out, H, W)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over all places, added to the input; (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(mixed.reshape(x.shape))


class Down(nn.Module):
    """Halve height and width, padded at the right and the bottom alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Double height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks of one resolution, each with attention after it if the level has some, then `Down`
    or `Up` under the name that the checkpoints give it."""

    def __init__(
        self, widths: list[int], attentive: bool, down: bool = False, up: bool = False
    ) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.block = nn.ModuleList(Residual(a, b) for a, b in pairs)
        self.attn = nn.ModuleList(Attention(b) for _, b in pairs if attentive)
        self.downsample = Down(widths[-1]) if down else None
        self.upsample = Up(widths[-1]) if up else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out, H', W')."""
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        for resized in (self.downsample, self.upsample):
            x = x if resized is None else resized(x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, attentive: bool) -> None:
        super().__init__()
        self.block_1, self.block_2 = Residual(channels, channels), Residual(channels, channels)
        self.attn_1 = Attention(channels) if attentive else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pictures (N, C, H, W) -> latents (N, latent_channels, h, w)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels, *(config.channels * m for m in config.multipliers)]
        self.conv_in = nn.Conv2d(config.num_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for number, width in enumerate(widths[1:]):
            blocks = [widths[number]] + [width] * config.num_blocks
            last = number == len(config.multipliers) - 1
            self.down.append(Level(blocks, number in config.attention, down=not last))
        self.mid = Middle(widths[-1], config.middle_attention)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents (N, latent_channels, h, w) -> pictures (N, C, H, W)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        above = [*widths[1:], widths[-1]]  # of the level before it, the lowest first
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.middle_attention)
        self.up = nn.ModuleList()  # the highest resolution first, as in the encoder
        for number, width in enumerate(widths):
            blocks = [above[number]] + [width] * (config.num_blocks + 1)
            self.up.append(Level(blocks, number in config.attention, up=number > 0))
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.num_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


@register_codec("vqgan")
class VQGANCodec(Codec):
    """Pictures (B, C, H, W) of any size <-> codes (B, 1, h, w)."""

    config_class = VQGANConfig
    config: VQGANConfig
    modalities = ("image",)
    quantizer: Codebook

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = Codebook(config.codebook_size, config.codebook_dim)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)

    @property
    def downsample(self) -> tuple[int, int]:
        """(h, w) pixels per code."""
        space = 2 ** (len(self.config.multipliers) - 1)
        return space, space

    @property
    def receptive_field(self) -> tuple[int, int]:
        """The whole picture."""
        return 2**31, 2**31

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> int64 (B, 1, h, w); edges are repeated to whole codes."""
        return self.quantizer.quantize(self._latents(self._padded(self.check_signal(x, 2)))).codes

    def decode(self, codes: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """(B, 1, h, w) -> (B, C, H, W) in [-1, 1], cropped to `size`."""
        self.check_codes(codes, 2)
        signal = self.decode_latents(self.quantizer.lookup(codes)).clamp(-1, 1)
        return signal if size is None else signal[..., : size[0], : size[1]]

    def decode_latents(self, latents: Tensor) -> Tensor:
        """(B, codebook_dim, h, w) -> (B, C, H, W), not clipped; those of codes or near them."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, x: Tensor) -> CodecOutput:
        """See `Codec.forward`."""
        target = self._padded(x)
        quantized, codes, loss = self.quantizer(self._latents(target))
        return CodecOutput(self.decode_latents(quantized), target, codes, loss)

    def _padded(self, x: Tensor) -> Tensor:
        return pad_to_multiple(x, self.downsample[0], (2, 3))

    def _latents(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))
