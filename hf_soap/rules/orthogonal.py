"""The momentum's nearest orthogonal matrix, by Newton–Schulz: what MARS-Shampoo and MARS-M apply."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hf_soap.linalg import inverse_roots
from hf_soap.rules.base import Rule, State, StateSpec, moment
from hf_soap.rules.context import StepContext
from hf_soap.rules.layout import Layout


@dataclass(frozen=True, kw_only=True)
class OrthogonalRule(Rule):
    """Newton–Schulz of the first moment of a matrix, scaled by its shape.

    Attributes:
        beta1: Decay rate of the first moment.
        eps: Added to the Frobenius norm that the moment is divided by.
        scale: ``"aspect"`` multiplies by √max(1, rows/cols), MARS-Shampoo's choice; ``"rms"`` by 0.2·√max(rows, cols),
            which gives updates the root mean square of Adam's, MARS-M's choice.

    Source:
        MARS-Shampoo, arXiv:2411.10438, section 3.3; MARS-M, arXiv:2510.21800.
    """

    roles = ("exp_avg",)

    beta1: float
    eps: float
    scale: Literal["aspect", "rms"]

    def state_spec(self, layout: Layout) -> dict[str, StateSpec]:
        """Declares the first moment."""
        return {"exp_avg": moment(layout)}

    def describe(self, layout: Layout) -> str:
        """Returns Newton–Schulz."""
        return "Newton-Schulz"

    def work(self, layout: Layout, *, refreshes_only: bool = False) -> float:
        """Five iterations of three products each."""
        *stack, rows, cols = layout.block
        short, long = sorted((rows, cols))
        matrices = layout.blocks * math.prod(stack)
        return 0.0 if refreshes_only else matrices * 5 * (4.0 * short**2 * long + 2.0 * short**3)

    def workspace(self, layout: Layout) -> int:
        """The iterate, the next one, and three Gram matrices of the shorter side, with the corrected gradient."""
        *stack, rows, cols = layout.block
        short, long = sorted((rows, cols))
        return math.prod(stack) * (5 * short * long + 3 * short**2)

    def update(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        """Returns the scaled orthogonal factor of M for each matrix, (blocks, ..., rows, cols)."""
        exp_avg = state["exp_avg"].lerp_(grad, 1 - self.beta1)
        rows, cols = exp_avg.shape[-2:]
        if self.scale == "aspect":
            return inverse_roots.newton_schulz(exp_avg / (1 - self.beta1), eps=self.eps).mul_(
                max(1.0, rows / cols) ** 0.5
            )
        return inverse_roots.newton_schulz(exp_avg, eps=self.eps).mul_(0.2 * max(rows, cols) ** 0.5)
