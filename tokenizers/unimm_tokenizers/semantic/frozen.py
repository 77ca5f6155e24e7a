"""A SeTok on features of somebody else's frozen network.

The network stays outside the codec's weights: its name and the sha256 of its weights stand in the
config, and a codec is refused when the network that goes by that name has other weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from unimm_tokenizers.codec import register_codec
from unimm_tokenizers.semantic.backbone import PictureFeatures, stem
from unimm_tokenizers.semantic.codec import SemanticCodec
from unimm_tokenizers.semantic.config import SeTokConfig
from unimm_tokenizers.semantic.encoder import RegionEncoder

_BUILDERS: dict[str, Callable[[], nn.Module]] = {}


def register_backbone(name: str, build: Callable[[], nn.Module]) -> None:
    """Make a network known: pictures (B, 3, H, W) in [-1, 1] -> features (B, D, h, w).

    `timm:NAME` and `transformers:NAME_OR_FOLDER` need no registration.
    """
    _BUILDERS[name] = build


@dataclass(frozen=True, kw_only=True)
class FrozenSeTokConfig(SeTokConfig):
    """`SeTokConfig` with a frozen backbone.

    backbone: a registered name, `timm:NAME` or `transformers:NAME_OR_FOLDER`.
    backbone_sha256: of its weights; empty: whatever they are when the codec is made, and from then
        on those.
    """

    backbone: str
    backbone_sha256: str = ""
    learned_weight: float = 0.5


def weights_sha256(module: nn.Module) -> str:
    """Digest of a module's tensors, names, shapes and types included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pinned_sha256(module: nn.Module, wanted: str, name: str, kind: str) -> str:
    """Digest of a network that stays outside a codec's weights.

    Args:
        module: the network.
        wanted: the digest that the codec was made with; empty: any.
        name: of the network, for the message.
        kind: what it is, for the message.

    Raises:
        ValueError: it is another one.
    """
    digest = weights_sha256(module)
    if wanted not in ("", digest):
        raise ValueError(
            f"{kind} {name!r} has weights {digest[:12]}, the codec was made with {wanted[:12]}: "
            f"give it the {kind} it was made with"
        )
    return digest


def open_backbone(name: str) -> nn.Module:
    """The network of that name, in evaluation mode.

    Raises:
        ValueError: nothing goes by it, or its library is not installed.
    """
    kind, _, rest = name.partition(":")
    if name in _BUILDERS:
        found = _BUILDERS[name]()
    elif kind == "timm" and rest:
        found = _timm(rest)
    elif kind == "transformers" and rest:
        found = _Transformers(rest)
    else:
        known = ", ".join([*sorted(_BUILDERS), "timm:NAME", "transformers:NAME"])
        raise ValueError(f"backbone {name!r} is unknown; known are {known}")
    return found.eval().requires_grad_(False)


def _timm(name: str) -> nn.Module:
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"backbone 'timm:{name}' needs timm: pip install timm") from None

    return _Last(timm.create_model(name, pretrained=True, features_only=True))


class _Last(nn.Module):
    """The last of a network's feature maps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[-1]


class _Transformers(nn.Module):
    """Patch features of a vision transformer of `transformers`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            from transformers import AutoModel
        except ImportError:
            raise ValueError(
                f"backbone 'transformers:{name}' needs transformers: pip install transformers"
            ) from None
        self.network: Any = AutoModel.from_pretrained(name)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.network(pixel_values=x).last_hidden_state
        side = int((hidden.shape[1] + 0.5) ** 0.5)  # class and register tokens stand in front
        patches = hidden[:, hidden.shape[1] - side**2 :]
        return patches.transpose(1, 2).unflatten(2, (side, side))


class FrozenFeatures(nn.Module):
    """Features of a frozen network, brought to the codec's width and grid."""

    def __init__(self, config: FrozenSeTokConfig, network: nn.Module) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple: no part of the codec's weights
        self.side = config.side
        with torch.no_grad():
            probe = torch.zeros(1, config.num_channels, config.image_size, config.image_size)
            found = network(probe)
        if not isinstance(found, Tensor) or found.ndim != 4:
            raise ValueError(
                f"backbone {config.backbone!r} must give features (B, D, h, w), it gave "
                f"{tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__}"
            )
        self.project = nn.Linear(found.shape[1], config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.stem = stem(config)

    def forward(self, x: Tensor) -> PictureFeatures:
        """(B, C, H, W) in [-1, 1] -> `PictureFeatures`."""
        (network,) = self._network
        # In the precision of the signal, so that codes do not depend on the batch.
        weights = {
            name: tensor.to(x.device, x.dtype if tensor.is_floating_point() else None)
            for name, tensor in network.state_dict(keep_vars=True).items()
        }
        with torch.no_grad():
            found = functional_call(network, weights, (x,))
        patches = F.adaptive_avg_pool2d(found, self.side).flatten(2).transpose(1, 2)
        return PictureFeatures(F.silu(self.stem(x)), self.norm(self.project(patches)))


@register_codec("setok-frozen")
class FrozenSeTokCodec(SemanticCodec):
    """SeTok on a frozen network's features.

    Args:
        config: names the network.
        backbone: the network itself; None opens the one that `config.backbone` names.

    Raises:
        ValueError: the network is unknown, gives no feature map, or has other weights than those
            that the config names.
    """

    config_class = FrozenSeTokConfig
    config: FrozenSeTokConfig

    def __init__(self, config: FrozenSeTokConfig, backbone: nn.Module | None = None) -> None:
        network = (backbone or open_backbone(config.backbone)).eval().requires_grad_(False)
        digest = pinned_sha256(network, config.backbone_sha256, config.backbone, "backbone")
        config = dataclasses.replace(config, backbone_sha256=digest)
        super().__init__(config, RegionEncoder(config, FrozenFeatures(config, network)))
