"""What the ranks of a distributed training must agree on.

Every rank calls these equally often with tensors of equal shape, whatever its data: a collective
that depends on data is a hang (vector-quantize-pytorch issues 25 and 105, and EnCodec, whose
buffers are overwritten by those of rank 0, lose the other ranks' statistics).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of every rank's tensor, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def least_over_ranks(number: int, device: torch.device) -> int:
    """The smallest of the ranks' numbers."""
    if world_size() == 1:
        return number
    least = torch.tensor(number, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def gather_rows(x: Tensor) -> Tensor:
    """(n, d) of every rank -> (ranks * n, d), the same on all."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def from_first_rank(x: Tensor) -> Tensor:
    """Rank 0's tensor, in place."""
    if world_size() > 1:
        dist.broadcast(x, 0)
    return x
