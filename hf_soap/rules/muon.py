"""Muon: Nesterov momentum, orthogonalized."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_soap.rules.base import State, StateSpec, moment
from hf_soap.rules.context import StepContext
from hf_soap.rules.layout import Layout
from hf_soap.rules.orthogonal import OrthogonalRule, orthogonalized


@dataclass(frozen=True, kw_only=True)
class MuonRule(OrthogonalRule):
    """Newton-Schulz of the Nesterov momentum of a matrix, scaled by its shape.

    Attributes:
        beta1: Decay rate of the momentum.
        eps: Added to the Frobenius norm that the momentum is divided by.
        scale: ``"aspect"`` multiplies by √max(1, rows/cols); ``"rms"`` by 0.2·√max(rows, cols), which gives updates
            the root mean square of Adam's.
        nesterov: Look one momentum step ahead.

    Source:
        K. Jordan, Muon (2024); the scale of Adam's updates, arXiv:2502.16982.
    """

    roles = ("momentum_buffer",)

    nesterov: bool

    def state_spec(self, layout: Layout) -> dict[str, StateSpec]:
        """Declares the momentum."""
        return {"momentum_buffer": moment(layout)}

    def describe(self, layout: Layout) -> str:
        """Returns Muon."""
        return "Muon"

    def update(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        """Returns the scaled orthogonal factor of each matrix, (blocks, ..., rows, cols)."""
        momentum = state["momentum_buffer"].lerp_(grad, 1 - self.beta1)
        ahead = grad.lerp(momentum, self.beta1) if self.nesterov else momentum
        return orthogonalized(ahead, eps=self.eps, scale=self.scale)
