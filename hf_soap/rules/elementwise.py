"""Rules that update every entry by itself: AdamW and Lion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_soap.linalg import elementwise
from hf_soap.linalg.elementwise import Rate
from hf_soap.rules.base import Rule, State, StateSpec, Traits, moment
from hf_soap.rules.context import StepContext
from hf_soap.rules.layout import Layout


@dataclass(frozen=True, kw_only=True)
class AdamWRule(Rule):
    """Adam, with ε added to the debiased root of the second moment, from the first gradient on.

    Attributes:
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Added to √(V / (1-β₂ᵗ)).

    Source:
        Adam, arXiv:1412.6980, algorithm 1; the step loop decays the weights, arXiv:1711.05101.
    """

    roles = ("exp_avg", "exp_avg_sq")

    beta1: float
    beta2: float
    eps: float

    def state_spec(self, layout: Layout) -> dict[str, StateSpec]:
        """Declares both moments."""
        return {"exp_avg": moment(layout), "exp_avg_sq": moment(layout)}

    def traits(self, layout: Layout) -> Traits:
        """Elementwise, with a fused kernel."""
        return Traits(is_elementwise=True, has_fused_step=True)

    def update(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        """Returns M̂ / (√V̂ + ε)."""
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        exp_avg.lerp_(grad, 1 - self.beta1)
        exp_avg_sq.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        debias1 = context.per_block(lambda t: 1 - self.beta1**t, grad)
        debias2 = context.per_block(lambda t: (1 - self.beta2**t) ** 0.5, grad)
        denominator = exp_avg_sq.sqrt().div_(debias2).add_(self.eps).mul_(debias1)
        return exp_avg / denominator

    def fused_step(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        state: Mapping[str, list[Tensor]],
        t: Sequence[int],
        *,
        rates: Sequence[Rate],
        divisors: list[Tensor] | None = None,
    ) -> None:
        """Takes the step with torch's fused AdamW, which updates weights and moments in one pass."""
        device, divisor = params[0].device, None
        if divisors is not None and len(divisors) == 1 and divisors[0].dtype == torch.float32:
            (divisor,) = divisors  # the kernel divides in the same pass, but only by a single float32 number
        elif divisors is not None:
            torch._foreach_div_(grads, divisors)
        counts = [elementwise.step_count(number, device) for number in t]
        for run, (lr, weight_decay) in elementwise.equal_rates(rates):
            torch._fused_adamw_(
                params[run],
                grads[run],
                state["exp_avg"][run],
                state["exp_avg_sq"][run],
                [],
                counts[run],
                amsgrad=False,
                lr=lr,
                beta1=self.beta1,
                beta2=self.beta2,
                weight_decay=weight_decay,
                eps=self.eps,
                maximize=False,
                grad_scale=divisor,
            )
        for changed in (state["exp_avg"], state["exp_avg_sq"]):
            elementwise.changed_by_kernel(changed)


@dataclass(frozen=True, kw_only=True)
class LionRule(Rule):
    """The sign of the first moment.

    Attributes:
        beta1: Decay rate of the first moment.

    Source:
        MARS-Lion, arXiv:2411.10438, section 3.2: Lion with one moment, since the correction replaces the second
        interpolation of arXiv:2302.06675.
    """

    roles = ("exp_avg",)

    beta1: float

    def state_spec(self, layout: Layout) -> dict[str, StateSpec]:
        """Declares the first moment."""
        return {"exp_avg": moment(layout)}

    def traits(self, layout: Layout) -> Traits:
        """Elementwise, with a fused kernel."""
        return Traits(is_elementwise=True, has_fused_step=True)

    def update(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        """Returns sign(M)."""
        return state["exp_avg"].lerp_(grad, 1 - self.beta1).sign()

    def fused_step(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        state: Mapping[str, list[Tensor]],
        t: Sequence[int],
        *,
        rates: Sequence[Rate],
        divisors: list[Tensor] | None = None,
    ) -> None:
        """Takes the step with torch's multi-tensor kernels."""
        if divisors is not None:
            torch._foreach_div_(grads, divisors)
        torch._foreach_lerp_(state["exp_avg"], grads, 1 - self.beta1)
        signs = torch._foreach_sign(state["exp_avg"])
        for run, (lr, weight_decay) in elementwise.equal_rates(rates):
            elementwise.take_step_(params[run], signs[run], lr=lr, weight_decay=weight_decay)
