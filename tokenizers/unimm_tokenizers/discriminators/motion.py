"""A PatchGAN over space and time: a score for every patch of every three successive frames.

Frames that are each right can move wrongly. The stand-in for a temporal discriminator as in TATS
(Ge et al., arXiv 2204.03638, section 3.1), which has a second, three-dimensional one beside that of
frames.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from unimm_tokenizers.discriminators.base import Discriminator, outputs


class MotionDiscriminator(Discriminator):
    """Scores films (B, C, T, H, W) of three frames or more.

    Args:
        num_channels: C.
        channels: width of the first layer; doubles at each of `num_layers` halvings of space.
        num_layers: number of halvings.
    """

    def __init__(self, num_channels: int, channels: int = 32, num_layers: int = 2) -> None:
        super().__init__()
        # The first layer sees three frames; time has no padding, so that no score lacks motion.
        layers: list[nn.Module] = []
        width, frames = num_channels, 3
        for layer in range(num_layers):
            wider = channels * 2**layer
            convolution = nn.Conv3d(width, wider, (frames, 4, 4), (1, 2, 2), (0, 1, 1))
            layers += [spectral_norm(convolution), nn.LeakyReLU(0.2)]
            width, frames = wider, 1
        layers += [spectral_norm(nn.Conv3d(width, 1, (frames, 3, 3), padding=(0, 1, 1)))]
        self.body = nn.Sequential(*layers)

    def accepts(self, x: Tensor) -> bool:
        """Films alone, and none too short to move."""
        return x.ndim == 5 and x.shape[2] >= 3

    def features(self, x: Tensor) -> list[Tensor]:
        """See `Discriminator.features`; scores (B, 1, T - 2, h, w)."""
        return outputs(self.body, x)
