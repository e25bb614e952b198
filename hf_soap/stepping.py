"""The step loop that all optimizers share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, overload

import torch
from torch import Tensor

from hf_soap import sharding
from hf_soap.blocks import Chunk, Plan, adjacent
from hf_soap.buckets import Bucket, GroupCache, state_dtype, warn_if_flattened
from hf_soap.chunks import apply_, directions_of, stack_gradients, stages, step_tensors
from hf_soap.owners import SEEDED, UPDATED, Outcome, Ownership
from hf_soap.probe import IDLE, Gauge, Probe
from hf_soap.refreshes import Updated
from hf_soap.state import PlannedOptimizer
from hf_soap.storage import COUNT


def unwrapped(optimizer: Any) -> Any:
    """Returns the optimizer in accelerate's wrapper, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


class BlockOptimizer(PlannedOptimizer):
    """The step loop: batches of same-shape blocks, each stepped by its rule."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ValueError: If a gradient is sparse or complex, before anything changed.
            FloatingPointError: If ``max_skipped_in_a_row`` steps in a row were skipped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._settle()
        self._guard.refuse_to_skip_for_ever(self.param_groups)  # a device's verdict on the step before
        device = next((param.device for group in self.param_groups for param in group["params"]), torch.device("cpu"))
        with nullcontext() if self._measuring is None else self._measuring.stepping(device):
            if self._gradients_usable():
                self._consolidated = None
                self._refreshes.start()
                self._step_all(allocate_only=self._is_synthetic())
                self._refreshes.finish()
        self._guard.refuse_to_skip_for_ever(self.param_groups)
        return loss

    def _gradients_usable(self) -> bool:
        return self._guard.admits(
            self.param_groups,
            defers=self._find_owners() is None,
            name=type(self).__name__,
        )

    @property
    def _measuring(self) -> Probe | None:
        """Who measures this step."""
        return self.probe

    def _step_all(self, *, allocate_only: bool) -> None:
        owners = self._find_owners()
        for number, group, places in self._trainable():
            own = places if owners is None else {i: p for i, p in places.items() if p not in owners.owner}
            if not allocate_only:
                self._count_empty_parts(own.values())
            for bucket in self._group_buckets((number, 0), group, own):
                if not allocate_only:
                    self._step_bucket(group, bucket, bucket.grads())
        if owners is not None:
            self._step_owned(owners, allocate_only=allocate_only)

    def _count_empty_parts(self, params: Iterable[Tensor]) -> None:
        """Counts a step of the parameters of which this rank has nothing: a checkpoint may take any rank's count."""
        for param in params:
            if sharding.is_sharded(param) and param.numel() and not sharding.local(param).numel():
                step = self._count_of_nothing(param)
                if param.grad is not None:
                    step += 1
                    self._guard.counted(step)

    def _count_of_nothing(self, param: Tensor) -> Tensor:
        """Returns the count of steps of a parameter of which this rank has nothing: a checkpoint asks every rank."""
        step: Tensor | None = self.state[param].get("step")
        if step is None:
            step = self.state[param]["step"] = torch.zeros((), dtype=COUNT, device="cpu")
        return step

    def _is_synthetic(self) -> bool:
        """Whether this step is taken to make the state alone, as torch.distributed.checkpoint does before a load."""
        if self.state:
            return False
        if any(group["lr"] for group in self.param_groups):
            return False
        params = [param for group in self.param_groups for param in group["params"] if param.requires_grad]
        grads = [sharding.local_grad(param) for param in params]
        zero = not any(grad is not None and bool(grad.any()) for grad in grads)
        return sharding.agree(zero, params)  # a warmup starts at 0 too, and the gradient of one part may be zero

    def _group_buckets(
        self, key: tuple[int, int], group: dict[str, Any], places: dict[int, Tensor], *, whole: bool = False
    ) -> list[Bucket]:
        """Returns buckets of a group, built anew where parameters or state were replaced since the last step.

        Args:
            key: Number of the group and of the exchange with owners.
            group: The group.
            places: Parameters by their place in the optimizer.
            whole: Whether whole parameters are stepped, as their owner does, or this rank's parts.
        """
        settings = {
            key: group[key] for key in self.defaults.keys() & group.keys() if key not in ("lr", "weight_decay")
        }
        cached, params = self._buckets.get(key), list(places.values())
        fits = cached is not None and cached.fits(params, self.state)
        if cached is not None and fits and cached.settings != settings:
            fits = cached.replan(lambda param: self.plan_of(group, param))
            cached.settings = settings
        if cached is not None and fits:
            return cached.buckets
        self._check_shapes(key[0], group)
        members: dict[tuple[Plan, torch.dtype, torch.device], list[tuple[int, Tensor, torch.Size]]] = {}
        for place, param in places.items():
            part = sharding.local(param)
            if not part.numel() and not (whole and param.numel()):
                if sharding.is_sharded(param):  # torch takes no state at all for a new run
                    self._count_of_nothing(param)
                continue
            kind = (self.plan_of(group, param), state_dtype(param), param.device)
            warn_if_flattened(kind[0].layout, param)
            members.setdefault(kind, []).append((place, param, param.shape if whole else part.shape))
        buckets = [Bucket(plan, entries, self.state, dtype=dtype) for (plan, dtype, _), entries in members.items()]
        self._buckets[key] = GroupCache(settings, params, buckets)
        return buckets

    def _check_shapes(self, number: int, group: dict[str, Any]) -> None:
        """Refuses parameters that took the place of those of other shapes since the group was added."""
        for param in group["params"]:
            sharding.check_placements(param)
        now = [param.shape for param in group["params"]]
        before = self._made_for.get(number, now)
        if now != before:
            got, want = next(pair for pair in itertools.zip_longest(now, before) if pair[0] != pair[1])
            raise ValueError(
                f"got a parameter of shape {got and tuple(got)} in the place of one of shape {want and tuple(want)}, "
                "wanted the parameters that the optimizer was made for: DeepSpeed and FSDP1 put flat vectors there, "
                "on which it could only be Adam; use FSDP2 (fully_shard) or DDP"
            )

    def _step_bucket(
        self,
        group: dict[str, Any],
        bucket: Bucket,
        grads: Sequence[Tensor | None],
        outcomes: dict[Tensor, Outcome] | None = None,
    ) -> None:
        """Steps the members of a bucket that have a gradient; with ``outcomes`` only says where they should go."""
        plan = bucket.plan
        steps = [int(count) for count in bucket.steps.tolist()]
        fresh, ready = stages(bucket, grads, steps)
        decay = group["weight_decay"] if plan.weight_decay is None else plan.weight_decay
        gauge = self._gauge(plan)
        size = bucket.tensors_per_chunk(watched=gauge.watches)
        alike = outcomes is None and not sharding.is_sharded(bucket.params[0])
        device = bucket.params[0].device
        usable = (
            None if self._guard.usable is None else self._guard.usable.to(device, non_blocking=device.type != "cpu")
        )
        team = sharding.Team() if group["distributed_refresh"] and alike and sharding.ranks() > 1 else None
        with bucket.exact_arithmetic(), bucket.stepping() as under_way:
            for seeding, flags in ((True, fresh), (False, ready)):
                for first, last in adjacent(flags, size):
                    under_way[:] = first, last
                    t = tuple(step + 1 - plan.rule.seeds for step in steps[first:last])
                    count = bucket.steps[first:last].add_(1)
                    chunk = Chunk(
                        plan.layout,
                        t,
                        tuple(bucket.index[first:last]),
                        self._background,
                        team,
                        usable,
                        gauge,
                        self._failures,
                        plan.refreshes_later,
                    )
                    given = [grad for grad in grads[first:last] if grad is not None]
                    if seeding:
                        grad = stack_gradients(given, bucket, chunk)
                        with bucket.working(first, last, chunk) as state:
                            plan.rule.seed(grad, state, chunk)
                        directions: list[Tensor] = []
                    elif outcomes is None:
                        lr = group["lr"] * plan.lr_scale
                        step_tensors(bucket, first, last, given, chunk, lr=lr, weight_decay=decay)
                    else:
                        directions = directions_of(bucket, first, last, given, chunk)
                    if outcomes is not None:
                        for place, param in enumerate(bucket.params[first:last]):
                            outcomes[param] = (SEEDED, None) if seeding else (UPDATED, directions[place])
                    self._guard.counted(count)
                    if not seeding and plan.refreshes_later:
                        self._refreshes.note(Updated(bucket, first, last, chunk))
                    under_way[:] = 0, 0

    def _gauge(self, plan: Plan) -> Gauge:
        return IDLE if self._measuring is None else self._measuring.of(plan.rule.describe(plan.layout))

    def _step_owned(self, owners: Ownership, *, allocate_only: bool) -> None:
        """Steps the parameters that have owners, round by round, with the next round's gradients under way."""
        for param in owners.owner:
            if not owners.owns(param):
                self.state[param].setdefault("step", torch.zeros((), dtype=COUNT))
        coming = leaving = None
        for number, params in enumerate(owners.rounds):
            grads: dict[Tensor, Tensor] = {}
            if not allocate_only:
                coming = coming or owners.start_gradients(params)
                grads, coming = owners.finish_gradients(params, coming), None
                if number + 1 < len(owners.rounds):
                    coming = owners.start_gradients(owners.rounds[number + 1])
            outcomes: dict[Tensor, Outcome] = {}
            here = set(params)
            for place, group, places in self._trainable():
                mine = {i: p for i, p in places.items() if p in here and owners.owns(p)}
                for bucket in self._group_buckets((place, 1 + number), group, mine, whole=True):
                    if not allocate_only:
                        self._step_bucket(group, bucket, [grads.get(param) for param in bucket.params], outcomes)
            if not allocate_only:
                if leaving is not None:
                    self._follow(owners.finish_directions(*leaving), owners)
                leaving = params, owners.start_directions(params, outcomes)
        if leaving is not None:
            self._follow(owners.finish_directions(*leaving), owners)

    def _follow(self, outcomes: dict[Tensor, Outcome], owners: Ownership) -> None:
        """Takes the step that owners have decided on, on this rank's parts of the parameters."""
        for _, group, places in self._trainable():
            alike: dict[tuple[float, float, bool, Gauge], list[tuple[Tensor, Tensor]]] = {}
            for param in places.values():
                happened, direction = outcomes.get(param, (0, None))
                if happened and not owners.owns(param):
                    self.state[param]["step"] += 1
                if happened == UPDATED and direction is not None and direction.numel():
                    plan = self.plan_of(group, param)
                    decay = group["weight_decay"] if plan.weight_decay is None else plan.weight_decay
                    kind = plan.lr_scale, decay, plan.decay_last, self._gauge(plan)
                    alike.setdefault(kind, []).append((sharding.local(param), direction))
            for (scale, decay, last, gauge), pairs in alike.items():
                weights, directions = ([pair[i] for pair in pairs] for i in (0, 1))
                with gauge.watching(weights):
                    apply_(weights, directions, lr=group["lr"] * scale, weight_decay=decay, decay_last=last)
