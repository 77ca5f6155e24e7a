"""Calls of a float32 module in float64, for what must not depend on how a sound is cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Method(nn.Module):
    """A method of a module, as a module."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module = module
        self.name = name

    def forward(self, *args: Any) -> Any:
        return getattr(self.module, self.name)(*args)


def precisely(module: nn.Module, name: str, *args: Any) -> Any:
    """`module.name(*args)` with float64 parameters, buffers and first argument; no gradients."""

    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    method = _Method(module, name)
    with torch.no_grad(), torch.autocast(_device(module).type, enabled=False):
        state = {k: wide(v) for k, v in [*method.named_parameters(), *method.named_buffers()]}
        return torch.func.functional_call(method, state, (wide(args[0]), *args[1:]))


def _device(module: nn.Module) -> torch.device:
    return next(x.device for x in [*module.parameters(), *module.buffers()])
