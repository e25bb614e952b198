"""Rules that treat every entry alone: AdamW and Lion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_soap.blocks import Chunk, Layout
from hf_soap.rules.base import MOMENTS, Rule, State, zeros


@dataclass(frozen=True, kw_only=True)
class AdamW(Rule):
    """Adam with ε beside the debiased root of the second moment, from the first gradient on.

    Attributes:
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Added to √(V / (1-β₂ᵗ)).

    Source:
        Adam, arXiv:1412.6980, algorithm 1; the decay of the weights is the step loop's, arXiv:1711.05101.
    """

    beta1: float
    beta2: float
    eps: float

    def allocate(self, layout: Layout, tensors: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Returns zero moments."""
        return zeros(layout, tensors, MOMENTS, dtype=dtype, device=device)

    def update(self, grad: Tensor, state: State, chunk: Chunk) -> Tensor:
        """Returns M̂ / (√V̂ + ε)."""
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        exp_avg.lerp_(grad, 1 - self.beta1)
        exp_avg_sq.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        debias1 = chunk.per_block([1 - self.beta1**t for t in chunk.t], grad)
        debias2 = chunk.per_block([(1 - self.beta2**t) ** 0.5 for t in chunk.t], grad)
        denominator = exp_avg_sq.sqrt().div_(debias2).add_(self.eps).mul_(debias1)
        return exp_avg / denominator

    def fused_step(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: State,
        chunk: Chunk,
        *,
        lr: float | Tensor,
        weight_decay: float,
    ) -> bool:
        """Takes the step by torch's fused AdamW."""
        first, second = ([row.view_as(p) for row, p in zip(state[r], params, strict=True)] for r in MOMENTS)
        self.fused(params, grads, first, second, chunk.t, lr=lr, weight_decay=weight_decay)
        return True

    def fused(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        t: Sequence[int],
        *,
        lr: float | Tensor,
        weight_decay: float,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Calls torch's fused kernel, which updates parameters and moments in one pass.

        Args:
            params: Any shapes, changed in place.
            grads: Of the same shapes; divided by ``grad_scale`` in place where that is given.
            exp_avgs: First moments.
            exp_avg_sqs: Second moments.
            t: 1-based number of the update of each.
            lr: Learning rate.
            weight_decay: Decoupled weight decay.
            grad_scale: One number that all gradients are divided by.
        """
        device = params[0].device
        torch._fused_adamw_(
            list(params),
            list(grads),
            list(exp_avgs),
            list(exp_avg_sqs),
            [],
            [torch.full((), float(step), device=device) for step in t],
            amsgrad=False,
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
            grad_scale=grad_scale,
        )


@dataclass(frozen=True, kw_only=True)
class Lion(Rule):
    """The sign of the first moment.

    Attributes:
        beta1: Decay rate of the first moment.

    Source:
        MARS-Lion, arXiv:2411.10438, section 3.2: Lion with one moment, since the correction stands in for the second
        interpolation of arXiv:2302.06675.
    """

    beta1: float

    def allocate(self, layout: Layout, tensors: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Returns a zero first moment."""
        return zeros(layout, tensors, ("exp_avg",), dtype=dtype, device=device)

    def update(self, grad: Tensor, state: State, chunk: Chunk) -> Tensor:
        """Returns sign(M)."""
        return state["exp_avg"].lerp_(grad, 1 - self.beta1).sign()
