"""How a decoder is laid out over devices: recomputation, compilation, float8, shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from unimm.model import UnifiedLM
from unimm.model.initial import initialise
from unimm.training.tensor_parallel import share_out

Recompute = Literal["none", "selective", "full"]
FLOAT8_WIDTH = 1600  # narrower layers lose: tensorwise scaling costs more than it saves
# Products are kept, all else is made again: the policy of torchtitan's "op" mode.
_KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """How training fits a model into memory.

    recompute: activations of a block that the backward pass makes again: "none"; "selective",
        all but matrix products and attention; "full", everything but the block's input.
    recompute_every: each so-manieth block alone.
    micro_batches: parts in which a batch goes through, with one gradient for all.
    deferred: make no weight before it is known where it is kept, then block by block. Needs
        `ShardedStrategy`; models that one process cannot hold whole need it.
    float8: products of layers at least 1,600 wide in float8 (package torchao; Hopper or newer).
    """

    recompute: Recompute = "none"
    recompute_every: int = 1
    micro_batches: int = 1
    deferred: bool = False
    float8: bool = False

    def __post_init__(self) -> None:
        if self.recompute_every < 1 or self.micro_batches < 1:
            raise ValueError(
                "scale: recompute_every and micro_batches must be 1 or more, got "
                f"{self.recompute_every} and {self.micro_batches}"
            )
        if self.float8 and find_spec("torchao") is None:
            raise ValueError("scale.float8 needs the package torchao: pip install torchao")


def prepare(lm: UnifiedLM, scale: ScaleConfig, *, compiled: bool) -> None:
    """Recompute, convert and compile blocks in place; parameters keep their names."""
    for number, block in enumerate(lm.blocks):
        if scale.float8:
            _to_float8(block)
        if scale.recompute != "none" and number % scale.recompute_every == 0:
            _recompute(block, selective=scale.recompute == "selective")
        if compiled:
            block.compile()


def shard(
    lm: UnifiedLM, mesh: DeviceMesh, scale: ScaleConfig, *, half: bool, compiled: bool
) -> None:
    """Cut a decoder into shards, block by block, each made only now where it stands on "meta".

    Args:
        lm: the decoder; with weights, equal on all processes, or without.
        mesh: axes "data_parallel" and "tensor_parallel".
        scale: see `prepare`.
        half: gather and multiply in bfloat16, reduce in float32.
        compiled: compile the blocks.
    """
    device = torch.device("cpu")
    if mesh.device_type != "cpu":
        device = torch.device(mesh.device_type, torch.accelerator.current_device_index())
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
    )
    tensor_parallel = mesh["tensor_parallel"]
    whole = mesh._flatten("all")
    for number, block in enumerate(lm.blocks):
        _place(block, f"blocks.{number}", lm, device)
        if tensor_parallel.size() > 1:
            share_out(block, tensor_parallel)  # pyright: ignore[reportArgumentType]
    for name in ("embedding", "norm", "head"):
        part = getattr(lm, name)
        if part is not None:
            _place(part, name, lm, device)
    prepare(lm, scale, compiled=compiled)
    for block in lm.blocks:
        fully_shard(block, mesh=whole, mp_policy=policy)
    fully_shard(lm, mesh=whole, mp_policy=policy)
    register_fsdp_forward_method(lm, "hidden")  # training enters there, not at `forward`


def _place(module: nn.Module, name: str, lm: UnifiedLM, device: torch.device) -> None:
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device=device)
        initialise(module, name, lm.config, lm.seed)
    else:
        module.to(device)


def _recompute(block: nn.Module, *, selective: bool) -> None:
    forward = block.forward
    contexts: dict[str, Any] = {}
    if selective:
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def again(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, **contexts)

    block.forward = again  # on the instance: wrapping the block would rename its parameters


def _policy(_: Any, op: Callable[..., Any], *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _to_float8(block: nn.Module) -> None:
    from torchao.float8 import convert_to_float8_training  # pyright: ignore[reportMissingImports]

    def wide(module: nn.Module, _: str) -> bool:
        return isinstance(module, nn.Linear) and min(module.weight.shape) >= FLOAT8_WIDTH

    convert_to_float8_training(block, module_filter_fn=wide)
