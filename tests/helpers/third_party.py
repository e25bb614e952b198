"""SPlus as somebody else would add it: an optimizer with names of its own for options and state, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import hf_soap
from hf_soap.config.options import DECAY_RATE
from hf_soap.engine.plan import Plan
from hf_soap.linalg import decompositions, matrices
from hf_soap.optimizers.base import plan_factors, plan_options
from hf_soap.rules.base import Rule, State, StateSpec, Traits, moment, square
from hf_soap.rules.context import StepContext
from hf_soap.rules.layout import Layout


@dataclass(frozen=True, kw_only=True)
class SPlusConfig(hf_soap.FactorOptions):
    """Options of SPlus."""

    name: ClassVar[str] = "splus"
    lr: ClassVar[float] = 0.1

    smoothing: float = hf_soap.option(0.9, "Decay rate of the average gradient.", DECAY_RATE)
    covariance_decay: float = hf_soap.option(0.999, "Decay rate of the covariances.", DECAY_RATE)


@dataclass(frozen=True, kw_only=True)
class SPlusRule(Rule):
    """The sign of the average gradient in the eigenbasis of its covariances, without the average of the weights.

    Source:
        SPlus, arXiv:2506.07254, algorithm 1.
    """

    roles = ("average", "covariance", "eigenvectors")

    smoothing: float
    covariance_decay: float
    every: int

    def state_spec(self, layout: Layout) -> dict[str, StateSpec]:
        """Declares the average, and a covariance and its eigenvectors a side."""
        specs = {"average": moment(layout)}
        for side in layout.sides:
            specs[f"covariance_{side}"] = square("factor", layout, side)
            specs[f"eigenvectors_{side}"] = square("basis", layout, side)
        return specs

    def traits(self, layout: Layout) -> Traits:
        """The sign of an entry depends on no other one where there is no basis."""
        return Traits(is_elementwise=not layout.sides)

    def update(self, grad: Tensor, state: State, context: StepContext) -> Tensor:
        """Returns Q sign(Qᵀ M Q) Qᵀ · 2 / (rows + columns), or the sign of M, scaled, without a factored side."""
        sides, shape = context.layout.sides, context.layout.block
        direction = state["average"].lerp_(grad, 1 - self.smoothing)
        for side in sides:
            decay = self.covariance_decay
            matrices.add_gram_(state[f"covariance_{side}"], grad, side, beta=decay, alpha=1 - decay)
        for blocks, due in context.subbatches((t - 1) % self.every == 0 for t in context.t):
            self.rebuild({role: value[blocks] for role, value in state.items()}, due)
        for side in sides:
            direction = matrices.mode_product(direction, state[f"eigenvectors_{side}"], side)
        direction = direction.sign()
        for side in sides:
            direction = matrices.mode_product(direction, state[f"eigenvectors_{side}"].mT, side)
        return direction * (2 / (shape[0] + shape[-1]) if sides else 1e-2)

    def rebuild(self, state: State, context: StepContext) -> None:
        """Computes the eigenvectors."""
        for side in context.layout.sides:
            values, basis = context.decompose(decompositions.eigenbasis, state[f"covariance_{side}"])
            known, finite = state[f"eigenvectors_{side}"], context.finite_mask(values, basis)
            start = torch.where(known.flatten(1).any(1)[:, None, None], known, matrices.eye_like(known))
            known.copy_(torch.where(finite, basis, start))


class SPlus(hf_soap.ConfiguredOptimizer):
    """SPlus."""

    config = SPlusConfig

    def plan(self, group: Mapping[str, Any], shape: Sequence[int], *, part: Sequence[int] | None = None) -> Plan:
        """Returns SPlus for every tensor; one without a factored side follows the sign."""
        rule = SPlusRule(
            smoothing=group["smoothing"],
            covariance_decay=group["covariance_decay"],
            every=group["precondition_frequency"],
        )
        return Plan(rule, plan_factors(group, shape, part=part), **plan_options(group, shape))


hf_soap.register(SPlus)
