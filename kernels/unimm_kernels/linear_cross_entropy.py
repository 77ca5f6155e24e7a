"""Cross-entropy of a linear head without the N x V logits, gradients made in the forward pass.

With a_i = W h_i, lse_i = log sum_j exp(a_ij), nll_i = lse_i - a_i[t_i] and weights w_i:
loss = (sum_i w_i nll_i + z sum_i w_i lse_i^2) / sum_i w_i, and
d loss / d a_ij = w_i / sum_k w_k * ((1 + 2 z lse_i) softmax(a_i)_j - [j = t_i]).
Rows go through in chunks: one product for the logits, the gradient written over them, two products
into the gradients of h and W. A row with a range has only that part of W as its head; rows of
one range form a group. Sources: z-loss: Chowdhery et al. 2022 (2204.02311), section 5; gradients in
the forward pass: Hsu et al. 2024 (2410.10989), section 3.2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unimm_kernels.backend import autocast, resolve, same_dtype, tl, triton

# Bytes of logits held at once. CUDA: 1,536 rows of 65,536 in bfloat16, within the 256 MiB that the
# op may take; CPU: small, but enough rows that reading W again for each chunk costs little.
LOGIT_BYTES = {"cuda": 192 << 20, "cpu": 64 << 20}

# Logits whose softmax the torch version takes at once: 2 MiB of float32, which stay in the cache.
# Measured on one core of an AMD EPYC (Zen 5), 4,096 rows of 1,536 in bfloat16: 5.9 ms so, 8.6 ms
# all at once, 16.1 ms by logsumexp and exp.
SOFTMAX_ELEMENTS = 2**19

# Columns that one program of the Triton kernel holds at once.
BLOCK = 4096


class LinearCrossEntropy(NamedTuple):
    """What `linear_cross_entropy` returns: loss, nll and lse; only `loss` carries a gradient."""

    loss: Tensor
    """float32 (), the weighted mean, z-loss included."""
    nll: Tensor
    """float32 (N,), -log p(target) in nats without weight or z-loss; 0 where ignored."""
    lse: Tensor
    """float32 (N,), log of the sum of the exponentials of the row's logits."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss_weight: Tensor | None = None,
    ranges: Tensor | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    implementation: str | None = None,
) -> LinearCrossEntropy:
    """Loss of hidden states under a linear head; differentiable once in hidden and weight.

    Args:
        hidden: (N, H), floating.
        weight: (V, H), the head, same dtype (autocast is heeded).
        targets: integers (N,): ids of the vocabulary, or `ignore_index`.
        loss_weight: (N,), weight of each row, 1 by default. Gets no gradient.
        ranges: int64 (N, 2), first id and end of the ids that the row is scored against.
        z_loss: factor z of the mean square of the log-normaliser.
        ignore_index: target of rows that count nowhere.
        implementation: "triton", "torch" or None (by device).

    Returns:
        LinearCrossEntropy(loss, nll, lse). With no weight left (all ignored) the loss is 0.

    Raises:
        ValueError: for shapes that do not fit; for a target or range outside the vocabulary or a
            target outside its range, where the check costs no wait for the device: always on
            a CPU, on CUDA with `ranges`. Elsewhere such a row has an infinite loss.
    """
    hidden, weight = autocast(hidden, weight)
    same_dtype("linear_cross_entropy", hidden=hidden, weight=weight)
    n = hidden.shape[0]
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)} must be (N, H) "
            f"and weight {tuple(weight.shape)} (V, H)"
        )
    if targets.shape != (n,) or (loss_weight is not None and loss_weight.shape != (n,)):
        raise ValueError(f"linear_cross_entropy: targets and loss_weight must be ({n},)")
    if ranges is not None and ranges.shape != (n, 2):
        raise ValueError(f"linear_cross_entropy: ranges {tuple(ranges.shape)} must be ({n}, 2)")
    with_grads = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss, nll, lse, _, _ = _linear_cross_entropy(
        hidden,
        weight,
        targets,
        None if loss_weight is None else loss_weight.detach(),
        ranges,
        float(z_loss),
        ignore_index,
        with_grads,
        resolve(implementation, hidden),
    )
    return LinearCrossEntropy(loss, nll, lse)


@torch.library.custom_op("unimm::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weight: Tensor | None,
    ranges: Tensor | None,
    z_loss: float,
    ignore_index: int,
    with_grads: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, lse and the gradients of hidden and weight (empty without `with_grads`)."""
    with torch.autocast(hidden.device.type, enabled=False):
        kept = targets != ignore_index
        row_weight = kept.float() if loss_weight is None else kept * loss_weight.float()
        total = row_weight.sum()
        # All ignored: 0 / 1 instead of 0 / 0.
        share = row_weight / torch.where(total == 0, torch.ones_like(total), total)
        targets = targets.masked_fill(~kept, -1)
        nll = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        lse = torch.zeros_like(nll)
        grad_hidden = torch.zeros_like(hidden if with_grads else hidden[:0])
        grad_weight = torch.zeros_like(weight if with_grads else weight[:0])
        for rows, first, end in _groups(ranges, targets, weight.shape[0]):
            part = hidden if rows is None else hidden[rows]
            row_nll, row_lse, row_grad = _chunks(
                part,
                weight[first:end],
                (targets if rows is None else targets[rows]) - first,
                share if rows is None else share[rows],
                z_loss,
                grad_weight[first:end] if with_grads else None,
                implementation,
            )
            if rows is None:
                nll, lse = row_nll, row_lse
                grad_hidden = grad_hidden if row_grad is None else row_grad
            else:
                nll[rows], lse[rows] = row_nll, row_lse
                if row_grad is not None:
                    grad_hidden[rows] = row_grad
        nll = nll.masked_fill(~kept, 0.0)
        loss = (share * (nll + z_loss * lse.square())).sum()
        return loss, nll, lse, grad_hidden, grad_weight


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weight: Tensor | None,
    ranges: Tensor | None,
    z_loss: float,
    ignore_index: int,
    with_grads: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row = hidden.new_empty(hidden.shape[:1], dtype=torch.float32)
    return (
        row.new_empty(()),
        row,
        torch.empty_like(row),
        torch.empty_like(hidden if with_grads else hidden[:0]),
        torch.empty_like(weight if with_grads else weight[:0]),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, nll, lse, grad_hidden, grad_weight = output
    ctx.save_for_backward(grad_hidden, grad_weight)
    ctx.mark_non_differentiable(nll, lse, grad_hidden, grad_weight)
    # Otherwise autograd would fill zeros of the head's size for the unused outputs.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    # Not in place: torch.compile forbids a backward pass to write over what the forward pass gave.
    grad_hidden, grad_weight = ctx.saved_tensors
    return (grad_hidden * grad, grad_weight * grad, *(None,) * 7)


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup)


def _groups(
    ranges: Tensor | None, targets: Tensor, vocabulary: int
) -> list[tuple[Tensor | None, int, int]]:
    """Rows (None: all), first id and end of each group of rows that share a range; checked."""
    if ranges is None:
        if targets.device.type == "cpu" and bool((targets >= vocabulary).any()):
            raise ValueError(
                f"linear_cross_entropy: target {int(targets.max())} is outside the "
                f"vocabulary of {vocabulary} ids"
            )
        return [(None, 0, vocabulary)]
    outside = (targets < ranges[:, 0]) | (targets >= ranges[:, 1])
    outside = (outside & (targets != -1)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"linear_cross_entropy: target {int(targets[row])} of row {row} is outside its range "
            f"{ranges[row].tolist()}"
        )
    kinds, kind_of = ranges.unique(dim=0, return_inverse=True)
    groups: list[tuple[Tensor | None, int, int]] = []
    for kind, (first, end) in enumerate(kinds.tolist()):
        if not 0 <= first < end <= vocabulary:
            raise ValueError(
                f"linear_cross_entropy: range [{first}, {end}) is empty or outside the vocabulary "
                f"of {vocabulary} ids"
            )
        groups.append(((kind_of == kind).nonzero().squeeze(1), first, end))
    return groups


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    share: Tensor,
    z_loss: float,
    grad_weight: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """nll, lse and the gradient of hidden of rows with one head; adds to `grad_weight` in place."""
    rows = hidden.shape[0]
    nll = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    lse = torch.empty_like(nll)
    grad_hidden = None if grad_weight is None else torch.empty_like(hidden)
    budget = LOGIT_BYTES.get(hidden.device.type, LOGIT_BYTES["cpu"])
    step = max(1, budget // (weight.shape[0] * hidden.element_size()))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        logits = hidden[part] @ weight.T
        if implementation == "triton":
            softmax_gradient_kernel[(logits.shape[0],)](
                logits, targets[part], share[part], nll[part], lse[part], logits.shape[1], z_loss,
                WRITTEN=grad_hidden is not None, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
        else:
            nll[part], lse[part] = _softmax_gradient(
                logits, targets[part], share[part], z_loss, grad_hidden is not None
            )
        if grad_hidden is not None and grad_weight is not None:
            torch.mm(logits, weight, out=grad_hidden[part])
            grad_weight.addmm_(logits.T, hidden[part])
    return nll, lse, grad_hidden


def _softmax_gradient(
    logits: Tensor, targets: Tensor, share: Tensor, z_loss: float, written: bool
) -> tuple[Tensor, Tensor]:
    """nll and lse (n,) in float32; if `written`, `logits` (n, V) becomes the loss's gradient by it.

    A target of a negative id has no place in the row: its nll is infinite.
    """
    inside = (targets >= 0) & (targets < logits.shape[1])
    place = targets.where(inside, 0)[:, None]
    nll = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(nll)
    step = max(1, SOFTMAX_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        part = slice(start, start + step)
        work = logits[part].float()
        own = work.gather(1, place[part]).squeeze(1).masked_fill(~inside[part], float("-inf"))
        # The largest weight is 1 / sum(exp(a - top)): softmax passes over the row once, in cache.
        weights = work.softmax(1)
        torch.sub(work.amax(1), weights.amax(1).log(), out=lse[part])
        torch.sub(lse[part], own, out=nll[part])
        if written:
            weights.mul_((share[part] * (1 + 2 * z_loss * lse[part]))[:, None])
            weights.scatter_add_(1, place[part], -(share[part] * inside[part])[:, None])
            logits[part].copy_(weights)
    return nll, lse


@triton.jit
def softmax_gradient_kernel(
    LOGITS, TARGETS, SHARE, NLL, LSE, width, z_loss, WRITTEN: tl.constexpr, BLOCK: tl.constexpr
):
    """`_softmax_gradient` of one row: one pass for the normaliser, one that writes if WRITTEN."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * width
    target = tl.load(TARGETS + row)
    share = tl.load(SHARE + row)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        a = tl.load(LOGITS + column, mask=column < width, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, a)
        # A lane that has only seen columns behind the end: -inf - -inf would be NaN.
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - base) + tl.exp(a - base)
        top = new
    highest = tl.max(top, 0)
    lse = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    inside = (target >= 0) & (target < width)
    own = tl.load(LOGITS + target, mask=inside, other=float("-inf")).to(tl.float32)
    tl.store(NLL + row, lse - own)
    tl.store(LSE + row, lse)
    if WRITTEN:
        slope = share * (1 + 2 * z_loss * lse)
        for start in tl.range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            a = tl.load(LOGITS + column, mask=column < width, other=0.0).to(tl.float32)
            grad = slope * tl.exp(a - lse) - tl.where(column == target, share, 0.0)
            tl.store(LOGITS + column, grad.to(LOGITS.dtype.element_ty), mask=column < width)
