"""Perceptual distances of pictures: LPIPS from a named file, and what stands in without one.

No weights come with the library and none are fetched. LPIPS (Zhang et al., arXiv 1801.03924) needs
VGG16 and five heads, which `pack_lpips` puts into one file; its hash is compared before use.
`StructuralDistance` needs no weights and has not been fitted to what people see.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from unimm_tokenizers.storage import replacing, sha256

# Convolutions of torchvision's VGG16, by their place in `features`; a pooling before each stage.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


class Lpips(nn.Module):
    """Distance of features of a VGG16, weighted per channel, summed over five depths.

    Args:
        weights: a file that `pack_lpips` wrote.
        sha256_digest: its sha256, which must agree.

    Raises:
        ValueError: the file is missing, is another one, or does not hold what is needed.
    """

    def __init__(self, weights: str, sha256_digest: str) -> None:
        super().__init__()
        if not Path(weights).is_file():
            raise ValueError(f"{weights}: no such file; `pack_lpips` writes LPIPS weights")
        found = sha256(weights)
        if found != sha256_digest.lower():
            raise ValueError(f"{weights}: sha256 is {found}, expected {sha256_digest}")
        state = load_file(weights)
        for name in _names():
            if name not in state:
                raise ValueError(f"{weights}: tensor {name!r} is missing; see `pack_lpips`")
            self.register_buffer(name.replace(".", "_"), state[name].float(), persistent=False)
        self.shift: Tensor
        self.scale: Tensor
        # Of ImageNet's colours, for pictures in [-1, 1].
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1], C 1 or 3, sides of 16 or more -> scalar mean."""
        both = torch.cat([made, real]).expand(-1, 3, -1, -1)
        x = (both - self.shift) / self.scale
        total = made.new_zeros(())
        for depth, stage in enumerate(STAGES):
            x = F.max_pool2d(x, 2) if depth else x
            for place in stage:
                weight, bias = (self._of(f"features.{place}.{k}") for k in ("weight", "bias"))
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            a, b = F.normalize(x.float(), dim=1, eps=1e-10).chunk(2)
            head = self._of(f"head.{depth}").view(1, -1, 1, 1)
            total = total + ((a - b).square() * head).sum(1).mean()
        return total

    def _of(self, name: str) -> Tensor:
        return self.get_buffer(name.replace(".", "_"))


def _names() -> list[str]:
    places = [place for stage in STAGES for place in stage]
    convolutions = [f"features.{place}.{kind}" for place in places for kind in ("weight", "bias")]
    return [*convolutions, *(f"head.{depth}" for depth in range(len(STAGES)))]


def pack_lpips(vgg: str | Path, heads: str | Path, out: str | Path) -> str:
    """Put VGG16 and LPIPS heads into one safetensors file.

    Args:
        vgg: torchvision's `vgg16-397923af.pth`.
        heads: `vgg.pth` of the LPIPS authors (version 0.1), keys `lin0.model.1.weight` and on.
        out: the file to write.

    Returns:
        Its sha256, for `Lpips`.

    Raises:
        ValueError: a tensor is missing.
    """
    features = torch.load(vgg, map_location="cpu", weights_only=True)
    lines = torch.load(heads, map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = {}
    for name in _names():
        depth = name.removeprefix("head.")
        source, key = (lines, f"lin{depth}.model.1.weight") if depth != name else (features, name)
        if key not in source:
            raise ValueError(f"{heads if depth != name else vgg}: tensor {key!r} is missing")
        state[name] = source[key].float().flatten() if depth != name else source[key].float()
    with replacing(out) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
    return sha256(out)


class StructuralDistance(nn.Module):
    """L1 of gradients at four scales and of overlapping 8 x 8 cosine transforms.

    Gradients ask for edges in the right place; the transforms, whose coefficients count less the
    higher their frequency (1 / (1 + u + v)), for texture of the right kind in each block.

    Args:
        gradient, cosine: weights of the two.
    """

    def __init__(self, gradient: float = 0.5, cosine: float = 0.0) -> None:
        super().__init__()
        self.gradient, self.cosine = gradient, cosine
        n, u = torch.arange(8.0), torch.arange(8.0)[:, None]
        basis = torch.cos((n + 0.5) * u * torch.pi / 8) * torch.where(u == 0, 0.125, 0.25).sqrt()
        kernels = torch.einsum("ux,vy->uvxy", basis, basis)
        weight = 1 / (1 + u + u.T)
        self.kernels: Tensor
        kernels = (kernels * weight[..., None, None]).flatten(0, 1)[:, None]
        self.register_buffer("kernels", kernels, persistent=False)

    def forward(self, made: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Pictures (B, C, H, W) -> weighted terms by name; those of weight 0 are left out."""
        terms = {}
        if self.gradient:
            terms["gradient"] = self.gradient * gradient_distance(made, real)
        if self.cosine:
            terms["cosine"] = self.cosine * self._cosine_distance(made - real)
        return terms

    def _cosine_distance(self, difference: Tensor) -> Tensor:
        planes = difference.flatten(0, 1)[:, None]
        short = [max(0, 8 - side) for side in planes.shape[2:]]
        planes = F.pad(planes, (0, short[1], 0, short[0]))
        return F.conv2d(planes, self.kernels, stride=4).abs().mean()


def gradient_distance(made: Tensor, real: Tensor, scales: int = 4) -> Tensor:
    """Mean L1 of differences between neighbours, at full size and after each halving; scalar."""
    total = made.new_zeros(())
    for _ in range(scales):
        for axis in (2, 3):
            if made.shape[axis] > 1:
                total = total + F.l1_loss(made.diff(dim=axis), real.diff(dim=axis))
        if min(made.shape[2:]) < 2:
            break
        made, real = F.avg_pool2d(made, 2), F.avg_pool2d(real, 2)
    return total / scales
