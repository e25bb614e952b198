"""The step loop that all optimizers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast, overload

import torch
from torch import Tensor

from hf_soap.checkpoint import state_dict
from hf_soap.config.members import Member, Roster
from hf_soap.distributed import dtensor
from hf_soap.distributed.owners import SEEDED, UPDATED, Outcome, Ownership
from hf_soap.engine.buckets import Bucket, BucketCache, Kind, state_dtype, warn_if_flattened
from hf_soap.engine.plan import Plan
from hf_soap.engine.refresh import Updated
from hf_soap.engine.state import PlannedOptimizer
from hf_soap.engine.step import apply_, directions_of, split_by_first_grad, stack_gradients, step_tensors
from hf_soap.rules.base import LAYOUT
from hf_soap.rules.context import NO_METRICS, RuleMetrics, StepContext, adjacent
from hf_soap.rules.storage import COUNT, is_own


def unwrapped(optimizer: Any) -> Any:
    """Returns the optimizer in accelerate's wrapper, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


def _among(params: set[Tensor], member: Member) -> bool:
    return member.param in params


class BlockOptimizer(PlannedOptimizer):
    """The step loop: batches of same-shape blocks, each stepped by its rule."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ValueError: If a gradient is sparse or complex, or a parameter has changed its shape since its state was
                made, before anything changed.
            FloatingPointError: If ``max_skipped_in_a_row`` steps in a row were skipped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refreshes.join()
        device = next((param.device for group in self.param_groups for param in group["params"]), torch.device("cpu"))
        with nullcontext() if self.profiler is None else self.profiler.stepping(device):
            if self._guard.admits(self.param_groups, name=type(self).__name__):
                self._consolidated = None
                self._refreshes.start()
                self._step_all(allocate_only=self._is_synthetic())
                self._refreshes.finish()
        self._guard.raise_after_too_many(self.param_groups)
        return loss

    def _step_all(self, *, allocate_only: bool) -> None:
        owners = self._find_owners()
        cache = self._bucket_cache(0, lambda member: owners is None or member.param not in owners.owner)
        if not allocate_only:
            self._count_empty_parts(cache.empty)
            for bucket in cache.buckets:
                self._step_bucket(bucket, bucket.grads())
        if owners is not None:
            self._step_owned(owners, allocate_only=allocate_only)

    def _count_empty_parts(self, params: Iterable[Tensor]) -> None:
        """Counts a step of the parameters of which this rank has nothing: a checkpoint may take any rank's count."""
        for param in params:
            step = self._count_of_nothing(param)
            if param.grad is not None and dtensor.is_sharded(param):
                step += 1

    def _count_of_nothing(self, param: Tensor) -> Tensor:
        """Returns the count of steps of a parameter of which this rank has nothing: a checkpoint asks every rank."""
        state = self.state.setdefault(param, {})
        if not isinstance(state.get("step"), Tensor):
            state["step"] = torch.full((), float(state.get("step", 0)), dtype=COUNT, device="cpu")
        return cast(Tensor, state["step"])

    def _is_synthetic(self) -> bool:
        """Whether this step is taken to make the state alone, as torch.distributed.checkpoint does before a load."""
        if any(isinstance(key, Tensor) for key in self.state) or any(group["lr"] for group in self.param_groups):
            return False
        params = [member.param for member in self._roster().trained]
        grads = [dtensor.local_grad(param) for param in params]
        zero = not any(grad is not None and bool(grad.any()) for grad in grads)
        return dtensor.agree(zero, params)  # a warmup starts at 0 too, and the gradient of one part may be zero

    def _bucket_cache(self, key: int, belongs: Callable[[Member], bool], *, whole: bool = False) -> BucketCache:
        """Returns buckets of parameters, built anew where parameters or state were replaced since the last step.

        Args:
            key: 0, or the number of the exchange with owners.
            belongs: Says which trained parameters are meant.
            whole: Whether whole parameters are stepped, as their owner does, or this rank's parts.
        """
        roster, cache = self._roster(), self._buckets.get(key)
        kept = cache is not None and cache.fits(self.state)
        if cache is not None and kept and (cache.roster is roster or cache.roster.same_settings(roster)):
            return cache
        # Settings changed, and for all ranks: then each must hear of what does not fit the state of one of them.
        together = (
            cache is not None and roster.same_parameters(cache.roster) and not roster.same_settings(cache.roster)
        )
        error = None
        if cache is None or not kept or not cache.replan(roster, self.plan_of):
            try:
                self._buckets[key] = self._new_buckets(cache, roster, belongs, whole=whole)
                if cache is not None:
                    cache.release(self._buckets[key], self.state)
            except Exception as caught:
                error = caught
        if together and self._shares_parameters():
            (wrong,) = dtensor.summed([float(error is not None)], roster.trained[0].param)
            if wrong:
                dtensor.raise_together(error)
        if error is not None:
            raise error
        return self._buckets[key]

    def _shares_parameters(self) -> bool:
        """Whether other ranks have parts or state of the same parameters; all ranks say the same."""
        if dtensor.ranks() == 1:
            return False
        sharded = any(dtensor.is_sharded(member.param) for member in self._roster().trained)
        return sharded or self._find_owners() is not None

    def _new_buckets(
        self, cache: BucketCache | None, roster: Roster, belongs: Callable[[Member], bool], *, whole: bool
    ) -> BucketCache:
        """Builds what :meth:`_bucket_cache` returns; what is left of the old buckets is kept."""
        shapes = {} if cache is None else cache.shapes()
        dormant, empty = [], []
        kinds: dict[Kind, list[tuple[Member, torch.Size]]] = {}
        for member in filter(belongs, roster.trained):
            param, part = member.param, dtensor.local(member.param)
            known = self.state.get(param, {})
            # Ranks save together what they share: its state is made at once. All else waits for its first gradient.
            if not (whole or "step" in known or param.grad is not None or dtensor.is_sharded(param)):
                dormant.append(member)
                continue
            if not part.numel() and not (whole and param.numel()):
                self._count_of_nothing(param)
                empty.append(param)
                continue
            self._refuse_other_shape(member, shapes.get(param, param.shape), known)
            plan = self.plan_of(member.settings, param)
            if LAYOUT in known:  # an entry of a state dict
                self._adopt(member, plan)
            warn_if_flattened(plan.layout, param)
            kind = plan, state_dtype(param), param.device
            kinds.setdefault(kind, []).append((member, param.shape if whole else part.shape))
        buckets = [] if cache is None else cache.still_serving(kinds, self.state)
        # What is left gets stacks of its own: growing the old ones would hold them twice for a moment.
        buckets += [Bucket(plan, rest, self.state, dtype=dtype) for (plan, dtype, _), rest in kinds.items() if rest]
        return BucketCache(roster, dormant, empty, buckets)

    def _refuse_other_shape(self, member: Member, before: torch.Size, known: Mapping[str, Any]) -> None:
        if member.param.shape != before and any(map(is_own, known)):
            raise ValueError(
                f"{member.name} has changed its shape from {tuple(before)} to {tuple(member.param.shape)} since its "
                "state was made, wanted the same shape: the state would be scrambled; delete optimizer.state[param] "
                "to let it start anew, or put another parameter in its place"
            )

    def _adopt(self, member: Member, plan: Plan) -> None:
        """Takes over an entry of a state dict that was put into the state as it is."""
        known = self.state[member.param]
        saved = {role: value for role, value in known.items() if is_own(role)}
        job = state_dict.Saved(member, plan, saved, self._wanted_state(member), None, self._bare_plan(member))
        states, _ = state_dict.restored([job], together=False, ours=True)
        for role in saved:
            del known[role]
        known.update(states[member.param])

    def _step_bucket(
        self, bucket: Bucket, grads: Sequence[Tensor | None], outcomes: dict[Tensor, Outcome] | None = None
    ) -> None:
        """Steps the members of a bucket that have a gradient; with ``outcomes`` only says where they should go."""
        plan = bucket.plan
        steps = [int(count) for count in bucket.steps.tolist()]
        fresh, ready = split_by_first_grad(bucket, grads, steps)
        of_group = {number: self.rates(self.param_groups[number], plan) for number in dict.fromkeys(bucket.groups)}
        rates = [of_group[number] for number in bucket.groups]
        metrics = self._metrics_of(plan)
        size = bucket.tensors_per_chunk(watched=metrics.watches)
        alike = outcomes is None and not dtensor.is_sharded(bucket.params[0])
        replicas = dtensor.ReplicaGroup() if plan.splits_refreshes and alike and dtensor.ranks() > 1 else None
        with bucket.exact_arithmetic(), bucket.stepping() as under_way:
            for seeding, flags in ((True, fresh), (False, ready)):
                for first, last in adjacent(flags, size):
                    under_way[:] = first, last
                    t = tuple(step + 1 - plan.traits.first_grad_seeds for step in steps[first:last])
                    bucket.steps[first:last].add_(1)
                    context = StepContext(
                        layout=plan.layout,
                        t=t,
                        index=tuple(bucket.index[first:last]),
                        background=self._background,
                        replicas=replicas,
                        metrics=metrics,
                        failures=self._failures,
                        later=plan.refreshes_later,
                    )
                    given = [grad for grad in grads[first:last] if grad is not None]
                    if plan.maximize:
                        given = list(torch._foreach_neg(given))
                    directions: list[Tensor] = []
                    if seeding:
                        grad = stack_gradients(given, bucket, context)
                        with bucket.working(first, last, context) as state:
                            plan.rule.seed(grad, state, context)
                    elif outcomes is None:
                        step_tensors(bucket, first, last, given, context, rates[first:last])
                    else:
                        directions = directions_of(bucket, first, last, given, context)
                    if outcomes is not None:
                        for place, param in enumerate(bucket.params[first:last]):
                            outcomes[param] = (SEEDED, None) if seeding else (UPDATED, directions[place])
                    if not seeding and plan.refreshes_later:
                        self._refreshes.note(Updated(bucket, first, last, context))
                    under_way[:] = 0, 0

    def _metrics_of(self, plan: Plan) -> RuleMetrics:
        return NO_METRICS if self.profiler is None else self.profiler.of(plan.label)

    def _step_owned(self, owners: Ownership, *, allocate_only: bool) -> None:
        """Steps the parameters that have owners, round by round, with the next round's gradients under way."""
        for param in owners.owner:
            if not owners.owns(param):
                self._count_of_nothing(param)
        coming = leaving = None
        for number, params in enumerate(owners.rounds):
            grads: dict[Tensor, Tensor] = {}
            if not allocate_only:
                coming = coming or owners.start_gradients(params)
                grads, coming = owners.finish_gradients(params, coming), None
                if number + 1 < len(owners.rounds):
                    coming = owners.start_gradients(owners.rounds[number + 1])
            outcomes: dict[Tensor, Outcome] = {}
            mine = {param for param in params if owners.owns(param)}
            cache = self._bucket_cache(1 + number, partial(_among, mine), whole=True)
            if not allocate_only:
                for bucket in cache.buckets:
                    self._step_bucket(bucket, [grads.get(param) for param in bucket.params], outcomes)
                if leaving is not None:
                    self._follow(owners.finish_directions(*leaving), owners)
                leaving = params, owners.start_directions(params, outcomes)
        if leaving is not None:
            self._follow(owners.finish_directions(*leaving), owners)

    def _follow(self, outcomes: dict[Tensor, Outcome], owners: Ownership) -> None:
        """Takes the step that owners have decided on, on this rank's parts of the parameters."""
        alike: dict[tuple[int, Plan], list[tuple[Tensor, Tensor]]] = {}
        for member in self._roster().trained:
            param = member.param
            happened, direction = outcomes.get(param, (0, None))
            if happened and not owners.owns(param):
                self.state[param]["step"] += 1
            if happened == UPDATED and direction is not None and direction.numel():
                kind = member.number, self.plan_of(member.settings, param)
                alike.setdefault(kind, []).append((dtensor.local(param), direction))
        for (number, plan), pairs in alike.items():
            weights, directions = ([pair[i] for pair in pairs] for i in (0, 1))
            rates = [self.rates(self.param_groups[number], plan)] * len(pairs)
            with self._metrics_of(plan).watching(weights):
                apply_(weights, directions, rates, decay_last=plan.decay_last)
