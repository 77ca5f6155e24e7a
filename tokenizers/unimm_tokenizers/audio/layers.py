"""Causal one-dimensional layers; x: (B, C, T). Nothing sees a later frame.

Each layer can also go on from where it stopped: `step(x, past)` gives what `forward` would have
given for x behind all that came before, and the past of what comes next. The caller owns the past.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What a layer must know of what came before: frames (B, C, n), or the pasts of its parts.
Past: TypeAlias = Tensor | tuple["Past | None", ...]

# Outputs up to which a chunk goes as rows through one product of matrices. Frames side by side, as
# `F.conv1d` has them, make narrow products: at 10 outputs of 512 x 4096 weights a third as fast.
SHORT = 32


def tail(x: Tensor, count: int) -> Tensor:
    """The last `count` frames (B, C, count), as a copy: a view would keep all of x alive."""
    return x[..., x.shape[-1] - count :].clone()


class Causal(nn.Module, ABC):
    """A layer with a past. A new sound has none, which counts as silence before it."""

    @abstractmethod
    def step(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """(B, C, T) behind `past` -> output, and the past of the next chunk."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T), a whole sound -> output."""
        return self.step(x, None)[0]


class CausalStack(nn.Sequential):
    """Layers one after the other; those without a past work frame by frame."""

    def step(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """See `Causal.step`."""
        pasts = (None,) * len(self) if past is None else past
        assert isinstance(pasts, tuple)
        kept: list[Past | None] = []
        for layer, before in zip(self, pasts, strict=True):
            if isinstance(layer, Causal):
                x, after = layer.step(x, before)
                kept.append(after)
            else:
                x = layer(x)
                kept.append(None)
        return x, tuple(kept)


class CausalConv(Causal):
    """Convolution padded on the left only; T must be a multiple of the stride.

    (B, C, T) -> (B, C', T / stride).
    """

    def __init__(
        self, channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        self.past = (kernel - 1) * dilation + 1 - stride
        self.short = self.past + SHORT * stride
        self.conv = nn.Conv1d(channels, out_channels, kernel, stride=stride, dilation=dilation)

    def step(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """See `Causal.step`; the past is the last inputs, (B, C, past)."""
        if past is None:
            x = F.pad(x, (self.past, 0))
            return self.conv(x), tail(x, self.past)
        assert isinstance(past, Tensor)
        if self.past + x.shape[-1] > self.short:
            x = torch.cat([past, x], dim=2)
            return self.conv(x), tail(x, self.past)
        rows = torch.cat([past.transpose(1, 2), x.transpose(1, 2)], dim=1)
        return self._few(rows), tail(rows.transpose(1, 2), self.past)

    def _few(self, rows: Tensor) -> Tensor:
        """What frames (B, T, C) give, as one product of matrices; see `SHORT`."""
        (stride,), (dilation,), (kernel,) = (
            self.conv.stride,
            self.conv.dilation,
            self.conv.kernel_size,
        )
        seen = rows.unfold(1, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
        return by_rows(self.conv, seen.flatten(2))


class CausalUpsample(Causal):
    """Transposed convolution, kernel twice the stride (no checkerboard), cut to be causal.

    (B, C, T) -> (B, C', T * stride).
    """

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.ConvTranspose1d(channels, out_channels, 2 * stride, stride=stride)

    def step(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """See `Causal.step`; the past is what the last input adds to the next outputs.

        Its shape is (B, C', stride).
        """
        bias = self.conv.bias
        assert bias is not None
        assert past is None or isinstance(past, Tensor)
        if past is None or x.shape[-1] > SHORT:
            y = self.conv(x)
            if past is not None:
                y[..., : self.stride] += past
            return y[..., : -self.stride], tail(y, self.stride) - bias[:, None]
        # As in `CausalConv`; each input gives its own outputs, and adds to those of the next one.
        both = x.transpose(1, 2).contiguous() @ self.conv.weight.flatten(1)
        own, later = both.unflatten(2, (-1, 2, self.stride)).unbind(3)  # (B, T, C', stride)
        added = torch.cat([past[:, None], later[:, :-1]], dim=1) + bias[:, None]
        return (own + added).transpose(1, 2).flatten(2), later[:, -1].clone()


class Pointwise(nn.Conv1d):
    """A convolution of kernel 1: frame by frame, (B, C, T) -> (B, C', T)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        if input.shape[-1] > SHORT:
            return super().forward(input)
        return by_rows(self, input.transpose(1, 2))


def by_rows(conv: nn.Conv1d, rows: Tensor) -> Tensor:
    """What a convolution makes of the inputs (B, T', C * kernel) that each output sees."""
    return F.linear(rows, conv.weight.flatten(1), conv.bias).transpose(1, 2)


class Snake(nn.Module):
    """x + sin(a x)^2 / a with a learned a per channel (Ziyin et al., arXiv 2006.08195; DAC)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        return x + (self.frequency * x).sin().square() / (self.frequency + 1e-9)


def activation(name: str, channels: int) -> nn.Module:
    """ "elu" or "snake"."""
    return nn.ELU() if name == "elu" else Snake(channels)


class ResidualUnit(Causal):
    """Activation, dilated convolution (kernel 7 or 3), activation, 1x1, added to the input.

    Args:
        channels: C.
        dilation: of the convolution.
        kernel: of the convolution.
        compress: how many times fewer channels there are between the convolutions.
        act: see `activation`.
    """

    def __init__(
        self, channels: int, dilation: int, kernel: int = 7, compress: int = 1, act: str = "elu"
    ) -> None:
        super().__init__()
        inner = channels // compress
        self.past = (kernel - 1) * dilation
        self.body = CausalStack(
            activation(act, channels),
            CausalConv(channels, inner, kernel, dilation=dilation),
            activation(act, inner),
            Pointwise(inner, channels),
        )

    def step(self, x: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """See `Causal.step`."""
        y, kept = self.body.step(x, past)
        return x + y, kept


def reach(layers: Iterable[nn.Module]) -> int:
    """Inputs before its own block of `stride` that one output of these layers can depend on.

    Of layers that only shrink time, or keep it.
    """
    total, rate = 0, 1
    for layer in layers:
        if isinstance(layer, CausalConv):
            total += layer.past * rate
            rate *= layer.conv.stride[0]
        elif hasattr(layer, "past"):
            total += int(layer.past) * rate  # pyright: ignore[reportArgumentType]
    return total
