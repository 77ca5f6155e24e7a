"""Sparse mixture-of-experts feed-forward with a load-balancing loss.

A token x goes through the k experts of highest router probability p = softmax(R x), weighted by
their probabilities over their sum (Lepikhin et al., arXiv 2006.16668, section 2.2; Jiang et al.,
arXiv 2401.04088, section 2.1). No token is dropped: all tokens of an expert are one group of one
grouped matrix product. The balancing loss is E sum_e f_e P_e, f_e the share of choices that fell on
expert e and P_e its mean probability (Fedus et al., arXiv 2101.03961, equations 4 to 6). It enters
the gradients where it arises, so no caller has to carry it to the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.model.config import ModelConfig
from unimm_kernels import swiglu
from unimm_kernels.backend import autocast


class _WithLoss(torch.autograd.Function):
    """The identity, whose backward pass adds the gradient of a second, scalar loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)


class SparseFeedForward(nn.Module):
    """`count` gated feed-forwards, of which every token takes `chosen`.

    Attributes:
        choices: int64 (tokens, chosen), the experts of the last forward pass; None before it.
        balance_loss: (), that pass's balancing loss without its factor; 1 when all are used alike.
    """

    choices: Tensor | None
    balance_loss: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts = config.experts
        assert experts is not None
        self.experts = experts
        width = experts.d_ff or -(-config.feed_forward // experts.chosen // 64) * 64
        self.router = nn.Linear(config.d_model, experts.count, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts.count, config.d_model, 2 * width))
        self.down = nn.Parameter(torch.empty(experts.count, width, config.d_model))
        self.choices = self.balance_loss = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., d_model)."""
        tokens = x.reshape(-1, x.shape[-1])
        # In float32: rounded logits choose other experts (arXiv 2101.03961, section 2.4).
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.router.weight.float())
            probability = logits.softmax(-1)
        weights, choices = probability.topk(self.experts.chosen, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        counts = torch.bincount(choices.flatten(), minlength=self.experts.count)
        share = counts.float() / choices.numel()
        balance = self.experts.count * (share * probability.mean(0)).sum()
        self.choices, self.balance_loss = choices.detach(), balance.detach()
        if torch.is_grad_enabled() and self.experts.balance:
            tokens = _WithLoss.apply(tokens, self.experts.balance * balance)
        mixed = self._mix(tokens, weights, choices, counts)
        return mixed.view_as(x)

    def _mix(self, tokens: Tensor, weights: Tensor, choices: Tensor, counts: Tensor) -> Tensor:
        """Weighted sum of each token's experts, (tokens, d_model)."""
        order = choices.flatten().argsort(stable=True)
        source = order // self.experts.chosen
        given, gate_up, down = autocast(tokens[source], self.gate_up, self.down)
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(given, gate_up, offs=ends).chunk(2, dim=-1)
        made = F.grouped_mm(swiglu(gate, up), down, offs=ends)
        made = made * weights.flatten()[order, None].to(made.dtype)
        return torch.zeros_like(tokens, dtype=made.dtype).index_add(0, source, made)
