"""PatchGAN (Isola et al., arXiv 1611.07004, section 3.2): a score for every patch."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from unimm_tokenizers.discriminators.base import Discriminator, outputs


class PatchDiscriminator(Discriminator):
    """Scores pictures (B, C, H, W), the frames of films (B, C, T, H, W), or spectra (B, bins, T).

    Args:
        num_channels: C; 1 for spectra.
        channels: width of the first layer; doubles at each of `num_layers` halvings.
        num_layers: number of halvings.
    """

    def __init__(self, num_channels: int, channels: int = 32, num_layers: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = num_channels
        for layer in range(num_layers):
            wider = channels * 2**layer
            layers += [spectral_norm(nn.Conv2d(width, wider, 4, 2, 1)), nn.LeakyReLU(0.2)]
            width = wider
        layers += [spectral_norm(nn.Conv2d(width, 1, 3, padding=1))]
        self.body = nn.Sequential(*layers)

    def features(self, x: Tensor) -> list[Tensor]:
        """See `Discriminator.features`; scores (N, 1, h, w)."""
        if x.ndim == 5:
            x = x.transpose(1, 2).flatten(0, 1)
        elif x.ndim == 3:
            x = x[:, None]
        return outputs(self.body, x)
