"""MARS: gives a variance-reduced gradient to any other rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_soap.linalg import elementwise
from hf_soap.rules.base import Rule, State, StateSpec, Traits, moment
from hf_soap.rules.context import StepContext
from hf_soap.rules.layout import Layout
from hf_soap.rules.wrapping import WrappingRule

CACHED_BYTES = 2**18
"""On a CPU, gradients of this many bytes go through all kernels together, so that they stay in its cache."""


@dataclass(frozen=True, kw_only=True)
class MarsRule(WrappingRule):
    """Gives c̃ = clip(g + γ·β₁/(1-β₁)·(g - g')) to another rule instead of the gradient g.

    Attributes:
        inner: The rule that gets c̃.
        beta1: Decay rate of the inner rule's first moment.
        gamma: Strength of the correction; with 0 the gradient is only clipped.
        exact: g' is the gradient of the current minibatch at the previous weights. A rule cannot compute it, so the
            gradients that it gets are corrected already. Otherwise g' is the previous step's gradient.

    Source:
        MARS, arXiv:2411.10438, algorithm 1 (exact) and 2 (approximate).
    """

    roles = ("prev_grad",)

    inner: Rule
    beta1: float
    gamma: float
    exact: bool

    def state_spec(self, layout: Layout) -> dict[str, StateSpec]:
        """Declares the inner rule's state and, unless exact, the previous gradient."""
        specs = self.inner.state_spec(layout)
        return specs if self.exact else {**specs, "prev_grad": moment(layout)}

    def traits(self, layout: Layout) -> Traits:
        """As the inner rule, with its fused step. It is not elementwise: it clips to the norm of the whole tensor."""
        return replace(super().traits(layout), has_fused_step=self.inner.traits(layout).has_fused_step)

    def describe(self, layout: Layout) -> str:
        """Returns the inner rule with MARS before it."""
        return f"MARS {self.inner.describe(layout)}"

    def workspace(self, layout: Layout) -> int:
        """As the inner rule, plus the corrected gradient and its square."""
        return self.inner.workspace(layout) + 2 * math.prod(layout.block)

    def seed(self, grad: Tensor, state: State, context: StepContext) -> None:
        """Seeds the inner rule with the corrected gradient."""
        self.inner.seed(self._corrected(grad, state, context), state, context)

    def update(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        """Returns the inner rule's direction for the corrected gradient."""
        return self.inner.update(self._corrected(grad, state, context), state, context)

    def fused_step(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        state: Mapping[str, list[Tensor]],
        t: Sequence[int],
        *,
        rates: Sequence[elementwise.Rate],
        divisors: list[Tensor] | None = None,
    ) -> None:
        """Corrects the gradients in the buffer of the previous ones and passes them to the inner rule's kernels."""
        each = len(params)
        if params[0].device.type == "cpu":
            each = max(1, CACHED_BYTES // (params[0].numel() * params[0].element_size()))
        for first in range(0, len(params), each):
            part = slice(first, first + each)
            fresh, own = grads[part], {role: tensors[part] for role, tensors in state.items()}
            corrected = [grad.clone() for grad in fresh] if self.exact else own["prev_grad"]
            if not self.exact:
                torch._foreach_lerp_(corrected, fresh, 1 + self.gamma * self.beta1 / (1 - self.beta1))
            norms = elementwise.norms(corrected, corrected[0].dtype)
            torch._foreach_clamp_min_(norms, 1.0)
            self.inner.fused_step(params[part], corrected, own, t[part], rates=rates[part], divisors=norms)
            if not self.exact:
                torch._foreach_copy_(corrected, fresh)

    def _corrected(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        if self.exact:
            corrected = grad
        else:
            corrected = elementwise.mars_correction(grad, state["prev_grad"], beta1=self.beta1, gamma=self.gamma)
            state["prev_grad"].copy_(grad)
        norm = context.tensor_square_sum(corrected).sqrt_().clamp_(min=1.0)
        return corrected / norm
