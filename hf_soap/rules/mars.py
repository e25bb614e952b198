"""MARS: a variance-reduced gradient in front of any other rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_soap import updates
from hf_soap.blocks import Chunk, Layout
from hf_soap.rules.base import MOMENTS, Rule, State, zeros
from hf_soap.rules.elementwise import AdamW


@dataclass(frozen=True, kw_only=True)
class Mars(Rule):
    """Hands c̃ = clip(g + γ·β₁/(1-β₁)·(g - g')) to another rule in place of the gradient g.

    Attributes:
        inner: The rule that gets c̃.
        beta1: Decay rate of the inner rule's first moment.
        gamma: Strength of the correction; 0 leaves the gradient as it is but for the clipping.
        exact: g' is the gradient of the current minibatch at the previous weights, which a rule cannot compute: the
            gradient that arrives was corrected with it already. Otherwise g' is the previous step's gradient.

    Source:
        MARS, arXiv:2411.10438, algorithm 1 (exact) and 2 (approximate).
    """

    inner: Rule
    beta1: float
    gamma: float
    exact: bool

    @property
    def seeds(self) -> bool:
        """As the inner rule."""
        return self.inner.seeds

    @property
    def waits(self) -> bool:
        """As the inner rule."""
        return self.inner.waits

    def allocate(self, layout: Layout, tensors: int, *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Returns the inner rule's state and, unless exact, the previous gradient."""
        state = self.inner.allocate(layout, tensors, dtype=dtype, device=device)
        return state if self.exact else {**state, **zeros(layout, tensors, ("prev_grad",), dtype=dtype, device=device)}

    def describe(self, layout: Layout) -> str:
        """Returns the inner rule with MARS before it."""
        return f"MARS {self.inner.describe(layout)}"

    def seed(self, grad: Tensor, state: State, chunk: Chunk) -> None:
        """Seeds the inner rule with the corrected gradient."""
        self.inner.seed(self._corrected(grad, state, chunk), state, chunk)

    def update(self, grad: Tensor, state: State, chunk: Chunk) -> Tensor:
        """Returns the inner rule's direction for the corrected gradient."""
        return self.inner.update(self._corrected(grad, state, chunk), state, chunk)

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
        """Takes the step of MARS-AdamW, one tensor at a time so that it stays in the cache between the kernels."""
        if not isinstance(self.inner, AdamW):
            return False
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            first, second = (state[role][i].view_as(param) for role in MOMENTS)
            # The buffer of the previous gradient holds c while the kernel needs it, and the gradient behind it.
            buffer = torch.empty_like(grad) if self.exact else state["prev_grad"][i].view_as(param)
            if self.exact:
                buffer.copy_(grad)
            else:
                buffer.lerp_(grad, 1 + self.gamma * self.beta1 / (1 - self.beta1))
            norm = torch.linalg.vector_norm(buffer).clamp_(min=1.0)
            if buffer.dtype != torch.float32:  # the kernel reads its scale as float32
                buffer.div_(norm)
                norm = torch.ones((), device=norm.device)
            self.inner.fused(
                [param],
                [buffer],
                [first],
                [second],
                chunk.t[i : i + 1],
                lr=lr,
                weight_decay=weight_decay,
                grad_scale=norm,
            )
            if not self.exact:
                buffer.copy_(grad)
        return True

    def _corrected(self, grad: Tensor, state: State, chunk: Chunk) -> Tensor:
        if self.exact:
            corrected = grad
        else:
            corrected = updates.mars_correction(grad, state["prev_grad"], beta1=self.beta1, gamma=self.gamma)
            state["prev_grad"].copy_(grad)
        norm = chunk.tensor_square_sum(corrected).sqrt_().clamp_(min=1.0)
        return corrected / norm
