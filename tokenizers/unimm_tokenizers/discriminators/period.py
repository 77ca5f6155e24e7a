"""Multi-period discriminator of waveforms (HiFi-GAN, Kong et al., arXiv 2010.05646, 2.3)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from unimm_tokenizers.discriminators.base import Discriminator, outputs, side_by_side

KERNEL, STRIDE = 5, 3


class PeriodDiscriminator(Discriminator):
    """Every p-th sample in a row of its own, for several p: what repeats and what should not.

    Args:
        periods: in samples; primes, so that they overlap little.
        channels: width of the first layer; doubles at each of `num_layers` thirdings of time.
        num_layers: number of thirdings.
    """

    def __init__(
        self, periods: tuple[int, ...] = (2, 3, 5, 7, 11), channels: int = 16, num_layers: int = 4
    ) -> None:
        super().__init__()
        self.periods = periods
        self.scorers = nn.ModuleList(_scorer(channels, num_layers) for _ in periods)

    def accepts(self, x: Tensor) -> bool:
        """Waveforms (B, C, T)."""
        return x.ndim == 3 and x.shape[1] <= 2

    def features(self, x: Tensor) -> list[Tensor]:
        """See `Discriminator.features`; scores (B * C, n)."""
        parts = []
        for period, scorer in zip(self.periods, self.scorers, strict=True):
            assert isinstance(scorer, nn.Sequential)
            rows = F.pad(x.flatten(0, 1), (0, -x.shape[-1] % period))
            parts.append(outputs(scorer, rows.unflatten(1, (-1, period))[:, None]))
        return side_by_side(parts)


def _scorer(channels: int, num_layers: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 1
    for layer in range(num_layers):
        wider = channels * 2**layer
        convolution = nn.Conv2d(width, wider, (KERNEL, 1), (STRIDE, 1), (KERNEL // 2, 0))
        layers += [spectral_norm(convolution), nn.LeakyReLU(0.1)]
        width = wider
    last = nn.Conv2d(width, 1, (3, 1), padding=(1, 0))
    return nn.Sequential(*layers, spectral_norm(last))
