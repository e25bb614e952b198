"""The step loop that all optimizers share, and its two ways of stepping: what a rank has, or what it owns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hf_soap.config.members import Member, RateSource
from hf_soap.distributed import dtensor
from hf_soap.distributed.owners import SEEDED, UPDATED, Outcome, Ownership
from hf_soap.engine import averages
from hf_soap.engine.background import Background
from hf_soap.engine.bucketing import Bucketing, PlannedOptimizer
from hf_soap.engine.buckets import Bucket
from hf_soap.engine.failures import Failures
from hf_soap.engine.nonfinite import NonfiniteGuard
from hf_soap.engine.norms import Norms
from hf_soap.engine.plan import Plan
from hf_soap.engine.refresh import Refreshes, Updated
from hf_soap.engine.step import directions_of, split_by_first_grad, stack_gradients, step_tensors
from hf_soap.rules.context import NO_METRICS, StepContext, adjacent


class Engine:
    """Steps the parameters of an optimizer: batches of same-shape blocks, each by its rule.

    Args:
        optimizer: Whose parameters and state these are, and what their plans are.

    Attributes:
        bucketing: Their buckets.
        guard: Checks gradients and counts skipped steps.
        failures: Counts decompositions that failed.
        background: Work beside the training loop.
        refreshes: Refreshes that come after the step.
        norms: Steps that depend on the norm of the weights.
    """

    def __init__(self, optimizer: PlannedOptimizer) -> None:
        self.optimizer = optimizer
        self.bucketing = Bucketing(optimizer)
        self.guard = NonfiniteGuard()
        self.failures = Failures()
        self.background = Background(self.failures)
        self.refreshes = Refreshes()
        self.norms = Norms(optimizer)

    def step(self) -> bool:
        """Takes a step, unless a gradient is not finite; returns whether it did."""
        name = type(self.optimizer).__name__
        if not self.guard.admits(self.optimizer.param_groups, name=name):
            return False
        owners = self.optimizer.find_owners()
        allocate_only = self.is_synthetic()
        averages.allocate(self.optimizer)
        self.refreshes.noted.clear()  # of a step that was broken off
        if not allocate_only:
            self.norms.start()
        LOCAL.take(self, owners, allocate_only=allocate_only)
        if owners is not None:
            OWNED.take(self, owners, allocate_only=allocate_only)
        if not allocate_only:
            self.norms.finish()
            averages.update(self.optimizer)
        if self.refreshes.noted:
            self.refreshes.finish()
        return True

    def is_synthetic(self) -> bool:
        """Whether this step is taken to make the state alone, as torch.distributed.checkpoint does before a load."""
        # State first: a learning rate may be on a GPU, and reading it would wait for the device.
        if any(isinstance(key, Tensor) for key in self.optimizer.state):
            return False
        if any(group["lr"] for group in self.optimizer.param_groups):
            return False
        params = [member.param for member in self.optimizer.roster().trained]
        grads = [dtensor.local_grad(param) for param in params]
        zero = not any(grad is not None and bool(grad.any()) for grad in grads)
        return dtensor.agree(zero, params)  # a warmup starts at 0 too, and the gradient of one part may be zero

    def step_bucket(
        self, bucket: Bucket, grads: Sequence[Tensor | None], outcomes: dict[Tensor, Outcome] | None = None
    ) -> None:
        """Steps the members of a bucket that have a gradient; with ``outcomes`` only says where they should go."""
        plan = bucket.plan
        steps = [int(count) for count in bucket.steps.tolist()]
        fresh, ready = split_by_first_grad(bucket, grads, steps)
        found = {source: self.optimizer.rates_from(source, plan) for source in dict.fromkeys(bucket.rates)}
        rates = [found[source] for source in bucket.rates]
        profiler = self.optimizer.profiler
        metrics = NO_METRICS if profiler is None else profiler.of(plan.label)
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
                        background=self.background,
                        replicas=replicas,
                        metrics=metrics,
                        failures=self.failures,
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
                        step_tensors(bucket, first, last, given, context, rates[first:last], self.norms)
                    else:
                        directions = directions_of(bucket, first, last, given, context)
                    if outcomes is not None:
                        for place, param in enumerate(bucket.params[first:last]):
                            outcomes[param] = (SEEDED, None) if seeding else (UPDATED, directions[place])
                    if not seeding and plan.refreshes_later:
                        self.refreshes.noted.append(Updated(bucket, first, last, context))
                    under_way[:] = 0, 0


class LocalStep:
    """Every rank steps what it has: its parts of sharded parameters, and whole parameters."""

    def take(self, engine: Engine, owners: Ownership | None, *, allocate_only: bool) -> None:
        """Takes the step of all parameters that have no owner; ``allocate_only`` makes their state alone."""
        cache = engine.bucketing.of(0, lambda member: owners is None or member.param not in owners.owner)
        if allocate_only:
            return
        for param in cache.empty:  # a checkpoint may take any rank's count
            step = engine.bucketing.count_of(param)
            if param.grad is not None and dtensor.is_sharded(param):
                step += 1
        for bucket in cache.buckets:
            engine.step_bucket(bucket, bucket.grads())


class OwnerStep:
    """Every rank steps whole matrices that it owns, and sends the directions to the ranks that have the weights."""

    def take(self, engine: Engine, owners: Ownership, *, allocate_only: bool) -> None:
        """Steps the parameters that have owners, round by round, with the next round's gradients under way."""
        for param in owners.owner:
            if not owners.owns(param):
                engine.bucketing.count_of(param)
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
            cache = engine.bucketing.of(1 + number, partial(_among, mine), whole=True)
            if not allocate_only:
                for bucket in cache.buckets:
                    engine.step_bucket(bucket, [grads.get(param) for param in bucket.params], outcomes)
                if leaving is not None:
                    self._follow(engine, owners, owners.finish_directions(*leaving))
                leaving = params, owners.start_directions(params, outcomes)
        if leaving is not None:
            self._follow(engine, owners, owners.finish_directions(*leaving))

    def _follow(self, engine: Engine, owners: Ownership, outcomes: dict[Tensor, Outcome]) -> None:
        """Takes the step that owners have decided on, on this rank's parts of the parameters."""
        alike: dict[tuple[RateSource, Plan], list[tuple[Tensor, Tensor]]] = {}
        for member in engine.optimizer.roster().trained:
            param = member.param
            happened, direction = outcomes.get(param, (0, None))
            if happened and not owners.owns(param):
                engine.optimizer.state[param]["step"] += 1
            if happened == UPDATED and direction is not None and direction.numel():
                plan = engine.optimizer.plan_of(member.settings, param)
                if plan.weight_step.summed:
                    engine.norms.keep([param], [direction])
                else:
                    alike.setdefault((member.rates, plan), []).append((dtensor.local(param), direction))
        for (source, plan), pairs in alike.items():
            weights, directions = ([pair[i] for pair in pairs] for i in (0, 1))
            rates = [engine.optimizer.rates_from(source, plan)] * len(pairs)
            profiler = engine.optimizer.profiler
            metrics = NO_METRICS if profiler is None else profiler.of(plan.label)
            with metrics.watching(weights):
                plan.weight_step.apply_(weights, directions, rates)


LOCAL, OWNED = LocalStep(), OwnerStep()


def _among(params: set[Tensor], member: Member) -> bool:
    return member.param in params
