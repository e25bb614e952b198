"""Nearest orthogonal matrices by Newton–Schulz: of the momentum, and of the direction of another rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from hf_soap.linalg import inverse_roots
from hf_soap.rules.base import Rule, State, StateSpec, Traits, moment
from hf_soap.rules.context import StepContext
from hf_soap.rules.layout import Layout
from hf_soap.rules.wrapping import WrappingRule

Scale = Literal["aspect", "rms"]


def orthogonalized(matrix: Tensor, *, eps: float, scale: Scale) -> Tensor:
    """Returns Newton–Schulz of matrices (..., rows, cols), scaled by their shape, as a new tensor.

    Args:
        matrix: (..., rows, cols).
        eps: Added to the Frobenius norm that a matrix is divided by.
        scale: ``"aspect"`` multiplies by √max(1, rows/cols); ``"rms"`` by 0.2·√max(rows, cols), which gives updates
            the root mean square of Adam's.
    """
    rows, cols = matrix.shape[-2:]
    factor = max(1.0, rows / cols) ** 0.5 if scale == "aspect" else 0.2 * max(rows, cols) ** 0.5
    return inverse_roots.newton_schulz(matrix, eps=eps).mul_(factor)


def newton_schulz_work(layout: Layout) -> float:
    """Returns the floating point operations of five iterations of three products each, for all matrices."""
    *stack, rows, cols = layout.block
    short, long = sorted((rows, cols))
    return layout.blocks * math.prod(stack) * 5 * (4.0 * short**2 * long + 2.0 * short**3)


def newton_schulz_workspace(layout: Layout) -> int:
    """Returns the entries of the iterate, the next one, and three Gram matrices of the shorter side, for one block."""
    *stack, rows, cols = layout.block
    short, long = sorted((rows, cols))
    return math.prod(stack) * (4 * short * long + 3 * short**2)


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
    scale: Scale

    def state_spec(self, layout: Layout) -> dict[str, StateSpec]:
        """Declares the first moment."""
        return {"exp_avg": moment(layout)}

    def traits(self, layout: Layout) -> Traits:
        """Spectral, unless the scale is that of Adam's updates."""
        return Traits(is_spectral=self.scale == "aspect")

    def describe(self, layout: Layout) -> str:
        """Returns Newton–Schulz."""
        return "Newton-Schulz"

    def work(self, layout: Layout, *, refreshes_only: bool = False) -> float:
        """Newton–Schulz at each step."""
        return 0.0 if refreshes_only else newton_schulz_work(layout)

    def workspace(self, layout: Layout) -> int:
        """Newton–Schulz, with the corrected gradient."""
        return newton_schulz_workspace(layout) + math.prod(layout.block)

    def update(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        """Returns the scaled orthogonal factor of M for each matrix, (blocks, ..., rows, cols)."""
        exp_avg = state["exp_avg"].lerp_(grad, 1 - self.beta1)
        momentum = exp_avg / (1 - self.beta1) if self.scale == "aspect" else exp_avg
        return orthogonalized(momentum, eps=self.eps, scale=self.scale)


@dataclass(frozen=True, kw_only=True)
class OrthogonalizingRule(WrappingRule):
    """Newton–Schulz of the direction of another rule, scaled by the shape of each block, which is a matrix.

    Attributes:
        inner: The rule whose direction it is.
        eps: Added to the Frobenius norm that the direction is divided by.
        scale: As in :func:`orthogonalized`.
    """

    inner: Rule
    eps: float
    scale: Scale

    def traits(self, layout: Layout) -> Traits:
        """As the inner rule, and spectral unless the scale is that of Adam's updates."""
        return replace(super().traits(layout), is_spectral=self.scale == "aspect")

    def describe(self, layout: Layout) -> str:
        """Returns the inner rule, then Newton–Schulz."""
        return f"{self.inner.describe(layout)}, Newton-Schulz"

    def work(self, layout: Layout, *, refreshes_only: bool = False) -> float:
        """As the inner rule, plus Newton–Schulz at each step."""
        own = 0.0 if refreshes_only else newton_schulz_work(layout)
        return self.inner.work(layout, refreshes_only=refreshes_only) + own

    def workspace(self, layout: Layout) -> int:
        """As the inner rule, or Newton–Schulz if that needs more: one comes after the other."""
        return max(self.inner.workspace(layout), newton_schulz_workspace(layout) + math.prod(layout.block))

    def update(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        """Returns the scaled orthogonal factor of the inner direction for each matrix, (blocks, ..., rows, cols)."""
        direction = context.layout.trim(self.inner.update(grad, state, context))
        return orthogonalized(direction, eps=self.eps, scale=self.scale)
