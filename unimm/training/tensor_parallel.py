"""Attention and feed-forward whose heads and hidden units are shared out among processes.

After Megatron-LM (Shoeybi et al., arXiv 1909.08053, section 3): a process computes some heads and
some hidden units, and one sum over the group ends each branch. Weights are not cut for it: they
are sharded over all processes by FSDP2, gathered for each block, and a process multiplies by its
rows of them. So a checkpoint is the same with and without tensor parallelism, and a fused
projection needs no layout of its own; what it saves is work and activations, not the gathering.

Gradients are means over all processes. Every process of a group has the whole gradient of what is
not shared out (the mean is right) and only its rows of what is, with zeros elsewhere (the mean is
1 / size of the sum): `_Rows` makes up for that factor.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from unimm.model import KVCache
from unimm.model.block import Attention, Block, FeedForward
from unimm_kernels import attention, qk_norm_rotary, swiglu


class Share(NamedTuple):
    """One process's part: `rank` of `size` in `group`."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def rows(self, count: int) -> slice:
        """This process's part of `count` heads or units."""
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


class _Enter(torch.autograd.Function):
    """The identity; backward sums the gradients of all processes' parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.share.group)
        return total, None


class _Leave(torch.autograd.Function):
    """The sum of all processes' parts; backward is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=share.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Rows(torch.autograd.Function):
    """The identity on a parameter that this process uses in part; see the module."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, share: Share) -> Tensor:
        ctx.size = share.size
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.size, None


class SharedAttention(nn.Module):
    """`Attention`, of which this process computes some heads; its parameters under their names."""

    def __init__(self, whole: Attention, share: Share) -> None:
        super().__init__()
        if whole.config.kv_heads % share.size:
            raise ValueError(
                f"tensor_parallel_size {share.size} must divide the model's "
                f"{whole.config.kv_heads} key heads"
            )
        self.config, self.window, self.share = whole.config, whole.window, share
        self.bases, self.qkv, self.out = whole.bases, whole.qkv, whole.out
        self.q_norm, self.k_norm = whole.q_norm, whole.k_norm

    def forward(
        self, x: Tensor, positions: Tensor, segment_ids: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """(B, T, d_model) -> (B, T, d_model)."""
        assert cache is None, "tensor parallelism is for training"
        config, share = self.config, self.share
        head, kv = config.head_dim, config.kv_heads
        x = _Enter.apply(x, share)
        queries, keys = share.rows(config.num_heads), share.rows(kv)
        weight = _Rows.apply(self.qkv.weight, share).unflatten(0, (-1, head))
        q, k, v = weight.split((config.num_heads, kv, kv))
        mine = torch.cat([q[queries], k[keys], v[keys]]).flatten(0, 1)
        heads = F.linear(x, mine).unflatten(-1, (-1, head))
        counts = [queries.stop - queries.start, *[keys.stop - keys.start] * 2]
        q, k, v = heads.split(counts, dim=2)
        q_norm, k_norm = (
            cast(Tensor, _Rows.apply(norm, share)) for norm in (self.q_norm, self.k_norm)
        )
        q, k = qk_norm_rotary(
            q, k, q_norm, k_norm, positions, bases=self.bases, eps=config.norm_eps
        )
        mixed = attention(q, k, v, window=self.window, segment_ids=segment_ids).flatten(2)
        out = _Rows.apply(self.out.weight, share).unflatten(1, (-1, head))[:, queries]
        return _Leave.apply(F.linear(mixed, out.flatten(1)), share)


class SharedFeedForward(nn.Module):
    """`FeedForward`, of which this process computes some hidden units."""

    def __init__(self, whole: FeedForward, share: Share) -> None:
        super().__init__()
        self.units = whole.down.in_features
        if self.units % share.size:
            raise ValueError(
                f"tensor_parallel_size {share.size} must divide the model's d_ff {self.units}"
            )
        self.gate_up, self.down, self.share = whole.gate_up, whole.down, share

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., d_model)."""
        share, mine = self.share, self.share.rows(self.units)
        x = _Enter.apply(x, share)
        weight = _Rows.apply(self.gate_up.weight, share).unflatten(0, (2, -1))[:, mine]
        gate, up = F.linear(x, weight.flatten(0, 1)).chunk(2, dim=-1)
        down = _Rows.apply(self.down.weight, share)[:, mine]
        return _Leave.apply(F.linear(swiglu(gate, up), down), share)


def share_out(block: Block, mesh: DeviceMesh) -> None:
    """Let the processes of a mesh of one axis compute a block together; sparse layers stay whole.

    Raises:
        ValueError: the heads or hidden units do not divide among them, or the model is a converted
            one whose queries and keys have another norm.
    """
    if type(block.attention) is not Attention or block.attention.config.qkv_bias:
        raise ValueError("tensor parallelism needs qk_norm 'rms', and queries without biases")
    share = Share(mesh.get_group(), mesh.get_local_rank(), mesh.size())
    # Children of the same names and parameters; a block only calls them.
    block.add_module("attention", SharedAttention(block.attention, share))
    if isinstance(block.feed_forward, FeedForward):
        block.add_module("feed_forward", SharedFeedForward(block.feed_forward, share))
