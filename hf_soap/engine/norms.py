"""Steps that depend on the norm of the weights: of matrices of which several ranks have parts, and of zero ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_soap.config.members import Member, Roster
from hf_soap.distributed import dtensor
from hf_soap.engine.bucketing import PlannedOptimizer
from hf_soap.engine.buckets import state_dtype
from hf_soap.engine.plan import Plan
from hf_soap.engine.weight_step import WeightStep
from hf_soap.rules.context import NO_METRICS


class Norms:
    """The parameters of an optimizer whose step depends on the norm of their weights.

    The directions of parts are kept until all parameters have been stepped. The ranks then sum the inner products of
    all parameters at once, in the order of the roster, whatever parts and gradients each of them has.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: PlannedOptimizer) -> None:
        self._optimizer = optimizer
        self._roster: Roster | None = None
        self._relative: list[tuple[Member, Plan]] = []
        self._nonzero: set[Tensor] = set()
        self._kept: dict[Tensor, Tensor] = {}

    def _planned(self) -> list[tuple[Member, Plan]]:
        roster = self._optimizer.roster()
        if roster is not self._roster:
            full = [member for member in roster.trained if member.param.numel()]
            plans = [self._optimizer.plan_of(member.settings, member.param) for member in full]
            pairs = zip(full, plans, strict=True)
            self._relative = [(member, plan) for member, plan in pairs if plan.weight_step.is_relative]
            self._nonzero.clear()
            self._roster = roster
        return self._relative

    def start(self) -> None:
        """Refuses matrices that are zero, before their first step; all ranks must call this.

        Raises:
            ValueError: On all ranks, if one is zero and has a gradient: it would stay zero.
        """
        self._kept.clear()  # of a step that was broken off
        new = [(member, plan.weight_step) for member, plan in self._planned() if member.param not in self._nonzero]
        if not new:
            return
        params = [member.param for member, _ in new]
        found = [_of_whole(member.param, step, _nonzero_and_stepped(member.param, step)) for member, step in new]
        for (member, step), total in zip(new, dtensor.summed_parts(params, found), strict=True):
            nonzero, stepped = total.unbind(1)
            if nonzero.all():
                self._nonzero.add(member.param)
            elif stepped.any():
                what = "a matrix of zeros in" if step.stacked else "only zeros in"
                raise ValueError(
                    f"norm={step.norm!r} got {what} {member.name} of shape {tuple(member.param.shape)}, wanted "
                    "weights that are not zero: steps in proportion to their norm would leave them zero; initialize "
                    "them differently, or exclude them: by norm=none in `modules` under the Trainer, by a param group "
                    "with norm=None elsewhere"
                )

    def keep(self, params: Sequence[Tensor], directions: Sequence[Tensor]) -> None:
        """Keeps directions of this rank's parts until :meth:`finish`."""
        self._kept.update(zip(params, directions, strict=True))

    def finish(self) -> None:
        """Takes the steps of all parts; all ranks must call this, also those that have kept no direction."""
        parts = [(member, plan) for member, plan in self._planned() if plan.weight_step.summed]
        params, steps = [member.param for member, _ in parts], [plan.weight_step for _, plan in parts]
        weights = [dtensor.local(param) for param in params]
        directions = [
            self._kept[param] if param in self._kept else torch.zeros_like(weight, dtype=state_dtype(param))
            for param, weight in zip(params, weights, strict=True)
        ]
        products = [
            _of_whole(param, step, *step.inner_products([weight], [direction]))
            for param, step, weight, direction in zip(params, steps, weights, directions, strict=True)
        ]
        totals = dtensor.summed_parts(params, products)
        for (member, plan), weight, direction, total in zip(parts, weights, directions, totals, strict=True):
            if not weight.numel():
                continue
            lr, weight_decay = self._optimizer.rates_from(member.rates, plan)
            here, profiler = member.param in self._kept, self._optimizer.profiler
            metrics = NO_METRICS if profiler is None or not here else profiler.of(plan.label)
            rate = lr, weight_decay if here else 0.0
            own = total[_place(member.param, plan.weight_step)]
            with metrics.watching([weight]):
                plan.weight_step.apply_([weight], [direction], [rate], products=[own])
        self._kept.clear()


def _nonzero_and_stepped(param: Tensor, step: WeightStep) -> Tensor:
    """Returns for each matrix of this rank's part whether it has a nonzero entry, and whether it has a gradient."""
    nonzero = [matrix.any() for matrix in step.matrices([dtensor.local(param)])]
    flags = torch.stack(nonzero).double() if nonzero else torch.zeros(0, dtype=torch.float64)
    return torch.stack([flags, torch.full_like(flags, param.grad is not None)], dim=1)


def _of_whole(param: Tensor, step: WeightStep, values: Tensor) -> Tensor:
    """Puts values of the matrices of this rank's part, (matrices, k), among zeros for those of the whole parameter."""
    if not step.stacked:
        return values
    whole = values.new_zeros(param.shape[0], values.shape[1], device=dtensor.local(param).device)
    whole[_place(param, step)] = values
    return whole


def _place(param: Tensor, step: WeightStep) -> slice:
    """Returns the place of the matrices of this rank's part among those of the whole parameter."""
    if not step.stacked:
        return slice(None)
    shard = dtensor.shard_of(param)
    return slice(shard.offset[0], shard.offset[0] + shard.size[0])
