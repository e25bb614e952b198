"""Which buckets the parameters of an optimizer are in, and when these are built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from hf_soap.checkpoint import state_dict
from hf_soap.config.members import Member, RateSource, Roster
from hf_soap.distributed import dtensor
from hf_soap.distributed.owners import Ownership
from hf_soap.engine.buckets import Bucket, BucketCache, Kind, state_dtype, warn_if_flattened
from hf_soap.engine.plan import Plan
from hf_soap.engine.profiling import StepProfiler
from hf_soap.linalg.elementwise import Rate
from hf_soap.rules.base import LAYOUT
from hf_soap.rules.storage import COUNT, is_own


class PlannedOptimizer(Protocol):
    """What the engine asks of the optimizer that it steps."""

    @property
    def state(self) -> Any:
        """State by parameter and role."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Param groups."""

    @property
    def profiler(self) -> StepProfiler | None:
        """What measures the steps."""

    def roster(self) -> Roster:
        """Returns the parameters as they are now."""

    def find_owners(self) -> Ownership | None:
        """Returns who preconditions what, or None where every rank steps what it has."""

    def plan_of(self, settings: Mapping[str, Any], param: Tensor) -> Plan:
        """Returns rule and layout of what this rank steps of a parameter."""

    def rates_from(self, source: RateSource, plan: Plan) -> Rate:
        """Returns learning rate and weight decay."""

    def wanted_state(self, member: Member) -> dict[str, Tensor]:
        """Returns shapes and dtypes of the state of a parameter."""

    def bare_plan(self, member: Member) -> Plan:
        """Returns the plan of a parameter if no side had a factor."""


class Bucketing:
    """The buckets of an optimizer's parameters: one cache for those that this rank steps, one for each owner's round.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: PlannedOptimizer) -> None:
        self._optimizer = optimizer
        self._caches: dict[int, BucketCache] = {}

    def clear(self) -> None:
        """Forgets all buckets; they are rebuilt from the state."""
        self._caches.clear()

    def caches(self) -> list[BucketCache]:
        """Returns all caches that there are."""
        return list(self._caches.values())

    def count_of(self, param: Tensor) -> Tensor:
        """Returns the count of steps of a parameter of which this rank has nothing: a checkpoint asks every rank."""
        state = self._optimizer.state.setdefault(param, {})
        if not isinstance(state.get("step"), Tensor):
            state["step"] = torch.full((), float(state.get("step", 0)), dtype=COUNT, device="cpu")
        return cast(Tensor, state["step"])

    def of(self, key: int, belongs: Callable[[Member], bool], *, whole: bool = False) -> BucketCache:
        """Returns buckets of parameters. They are rebuilt where parameters or state were replaced since the last step.

        Args:
            key: 0, or the number of the exchange with owners.
            belongs: Says which trained parameters are meant.
            whole: Whether whole parameters are stepped, as by their owner, or this rank's parts.
        """
        roster, cache = self._optimizer.roster(), self._caches.get(key)
        kept = cache is not None and cache.fits(self._optimizer.state)
        if cache is not None and kept and (cache.roster is roster or cache.roster.same_settings(roster)):
            return cache
        # Settings changed on all ranks: each must learn what does not fit the state of one of them.
        together = (
            cache is not None and roster.same_parameters(cache.roster) and not roster.same_settings(cache.roster)
        )
        error = None
        if cache is None or not kept or not cache.replan(roster, self._optimizer.plan_of):
            try:
                self._caches[key] = self._new_buckets(cache, roster, belongs, whole=whole)
                if cache is not None:
                    cache.release(self._caches[key], self._optimizer.state)
            except Exception as caught:
                error = caught
        if together and self._shares_parameters():
            (wrong,) = dtensor.summed([float(error is not None)], roster.trained[0].param)
            if wrong:
                dtensor.raise_together(error)
        if error is not None:
            raise error
        return self._caches[key]

    def _shares_parameters(self) -> bool:
        """Whether other ranks have parts or state of the same parameters; all ranks say the same."""
        if dtensor.ranks() == 1:
            return False
        sharded = any(dtensor.is_sharded(member.param) for member in self._optimizer.roster().trained)
        return sharded or self._optimizer.find_owners() is not None

    def _new_buckets(
        self, cache: BucketCache | None, roster: Roster, belongs: Callable[[Member], bool], *, whole: bool
    ) -> BucketCache:
        """Builds what :meth:`of` returns. Old buckets that still serve are kept."""
        shapes = {} if cache is None else cache.shapes()
        dormant, empty = [], []
        kinds: dict[Kind, list[tuple[Member, torch.Size]]] = {}
        for member in filter(belongs, roster.trained):
            param, part = member.param, dtensor.local(member.param)
            known = self._optimizer.state.get(param, {})
            # Ranks save together what they share: its state is made at once. All else waits for its first gradient.
            if not (whole or "step" in known or param.grad is not None or dtensor.is_sharded(param)):
                dormant.append(member)
                continue
            if not part.numel() and not (whole and param.numel()):
                self.count_of(param)
                empty.append(param)
                continue
            self._refuse_other_shape(member, shapes.get(param, param.shape), known)
            plan = self._optimizer.plan_of(member.settings, param)
            if LAYOUT in known:  # an entry of a state dict
                self._adopt(member, plan)
            warn_if_flattened(plan.layout, param)
            kind = plan, state_dtype(param), param.device
            kinds.setdefault(kind, []).append((member, param.shape if whole else part.shape))
        buckets = [] if cache is None else cache.still_serving(kinds, self._optimizer.state)
        # The rest gets new stacks: growing the old ones would hold them twice for a moment.
        buckets += [
            Bucket(plan, rest, self._optimizer.state, dtype=dtype) for (plan, dtype, _), rest in kinds.items() if rest
        ]
        return BucketCache(roster, dormant, empty, buckets)

    def _refuse_other_shape(self, member: Member, before: torch.Size, known: Mapping[str, Any]) -> None:
        if member.param.shape != before and any(map(is_own, known)):
            raise ValueError(
                f"{member.name} has changed its shape from {tuple(before)} to {tuple(member.param.shape)} since its "
                "state was made, wanted the same shape: the state would be scrambled; delete optimizer.state[param] "
                "to let it start again, or put another parameter in its place"
            )

    def _adopt(self, member: Member, plan: Plan) -> None:
        """Converts an entry of a state dict that was put into the state unchanged."""
        known = self._optimizer.state[member.param]
        saved = {role: value for role, value in known.items() if is_own(role)}
        job = state_dict.Saved(
            member, plan, saved, self._optimizer.wanted_state(member), None, self._optimizer.bare_plan(member)
        )
        states, _ = state_dict.restored([job], together=False, ours=True)
        for role in saved:
            del known[role]
        known.update(states[member.param])
