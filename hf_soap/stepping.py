"""The step loop that all optimizers share."""

from __future__ import annotations

import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_soap import checkpoint, schema, sharding, updates
from hf_soap.background import Background
from hf_soap.blocks import PREV_PARAM, Bucket, Chunk, Layout, Plan, adjacent
from hf_soap.owners import SEEDED, UPDATED, Outcome, Ownership

logger = logging.getLogger(__name__)


class BlockOptimizer(torch.optim.Optimizer):
    """A torch optimizer that steps batches of same-shape blocks by a rule.

    Subclasses say by which rule a tensor is updated and how it is cut (:meth:`plan`). State is made at the first step,
    so that parameters may be moved or replaced after construction.
    """

    config: type[schema.OptimizerConfig]

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._reset_cache()
        super().__init__(params, defaults)

    def _reset_cache(self) -> None:
        self._buckets: dict[tuple[int, int], GroupCache] = {}
        self._background = Background()
        self._made_for: dict[int, list[torch.Size]] = {}
        self._owners: Ownership | None = None
        self._consolidated: dict[str, Any] | None = None
        self.skipped_steps = 0
        """Steps that were left out because a gradient was not finite, since construction or load."""

    def plan(self, group: dict[str, Any], shape: Sequence[int], *, sharded: bool = False) -> Plan:
        """Returns rule and layout of a tensor in this param group, made from the current settings.

        Args:
            group: The param group.
            shape: Shape of the tensor, or of the largest part that a rank has of it.
            sharded: Whether it is such a part.
        """
        raise TypeError(f"{type(self).__name__} plans nothing; use SOAP or another subclass of BlockOptimizer")

    def plan_of(self, group: dict[str, Any], param: Tensor) -> Plan:
        """Returns rule and layout of what this rank steps of a parameter: its part, or all where it has an owner.

        Ranks decide alike, by the largest part: a smaller one is padded to the same blocks.
        """
        shard = sharding.shard_of(param)
        if math.prod(sharding.stack_sizes(param)) == 1 or self.owned(group, param):
            return self.plan(group, shard.whole)
        plan = self.plan(group, shard.largest, sharded=True)
        if plan.rule.entrywise(plan.layout):
            return self.plan(group, shard.size, sharded=True)
        return replace(plan, layout=plan.layout.fitted(shard.largest, shard.size))

    def owned(self, group: dict[str, Any], param: Tensor) -> bool:
        """Whether one rank preconditions the whole of a parameter for all."""
        if group["shard_mode"] != "owner" or sharding.ranks() == 1 or not param.numel():
            return False
        plan = self.plan(group, param.shape)
        return not (sharding.is_sharded(param) and plan.rule.elementwise(plan.layout))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, also after the first step; its settings are checked like the constructor's.

        Raises:
            ValueError: If a setting is wrong, or a parameter is complex.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._made_for[len(self.param_groups) - 1] = [param.shape for param in group["params"]]

    def _check_group(self, group: dict[str, Any]) -> None:
        check_learning_rate(group["lr"])
        check_number("weight_decay", group["weight_decay"])
        beta1, beta2 = check_pair("betas", group["betas"])
        names = schema.option_fields(self.config)
        values = {key: value for key, value in group.items() if key in names}
        schema.check_values(self.config, {**values, "beta1": beta1, "beta2": beta2})
        for param in group["params"]:
            sharding.check_placements(param)
            # Frozen weights of a quantised model may be integers; they never reach a step.
            if param.is_complex() or (param.requires_grad and not param.is_floating_point()):
                raise ValueError(
                    f"parameters must be real floating point, got {param.dtype} of shape {tuple(param.shape)}; "
                    "hold a complex weight as torch.view_as_real(weight)"
                )

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
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._gradients_usable():
            self._consolidated = None
            self._step_all(allocate_only=self._is_synthetic())
        return loss

    def _step_all(self, *, allocate_only: bool) -> None:
        owners = self._find_owners()
        for number, group, places in self._trainable():
            own = {i: p for i, p in places.items() if owners is None or p not in owners.owner}
            if not allocate_only:
                self._count_empty_parts(own.values())
            for bucket in self._group_buckets((number, 0), group, own):
                if not allocate_only:
                    self._step_bucket(group, bucket, [sharding.local_grad(param) for param in bucket.params])
        if owners is not None:
            self._step_owned(owners, allocate_only=allocate_only)

    def _count_empty_parts(self, params: Iterable[Tensor]) -> None:
        """Counts a step of the parameters of which this rank has nothing: a checkpoint may take any rank's count."""
        for param in params:
            if sharding.is_sharded(param) and param.numel() and not sharding.local(param).numel():
                self.state[param].setdefault("step", torch.zeros(()))
                self.state[param]["step"] += param.grad is not None

    def _trainable(self) -> Iterator[tuple[int, dict[str, Any], dict[int, Tensor]]]:
        """Yields (number, group, trainable parameters by their place in the optimizer)."""
        first = 0
        for number, group in enumerate(self.param_groups):
            # Counted with the frozen ones: thawing one must move no other's refreshes and background work.
            yield number, group, {first + i: p for i, p in enumerate(group["params"]) if p.requires_grad}
            first += len(group["params"])

    def _is_synthetic(self) -> bool:
        """Whether this step is taken to make the state alone, as torch.distributed.checkpoint does before a load."""
        if self.state or any(group["lr"] for group in self.param_groups):
            return False
        params = [param for group in self.param_groups for param in group["params"] if param.requires_grad]
        grads = [sharding.local_grad(param) for param in params]
        return not any(grad is not None and bool(grad.any()) for grad in grads)

    def _gradients_usable(self) -> bool:
        """Refuses sparse gradients, and says whether all gradients are finite where a group wants to know."""
        checked: list[Tensor] = []
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None or not param.requires_grad:
                    continue
                if param.grad.is_sparse or param.grad.layout != torch.strided:
                    raise ValueError(
                        f"{type(self).__name__} needs dense gradients, got {param.grad.layout} for a parameter of "
                        f"shape {tuple(param.shape)}; build the embedding with sparse=False"
                    )
                grad = sharding.local_grad(param)
                if group["nonfinite"] == "skip" and grad is not None and grad.numel():
                    checked.append(grad)
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for grad in checked:
            kinds.setdefault((grad.device, state_dtype(grad)), []).append(grad)
        fine = all(norms_are_sane(grads, dtype) for (_, dtype), grads in kinds.items())
        guarded = [p for group in self.param_groups if group["nonfinite"] == "skip" for p in group["params"]]
        if sharding.agree(fine, guarded):
            return True
        if not self.skipped_steps:
            logger.warning(
                "A gradient holds NaN, Inf or an entry too large to square: the whole step is skipped, parameters and "
                "state stay as they are."
            )
        self.skipped_steps += 1
        return False

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
        settings = _settings(group)
        cached, params = self._buckets.get(key), list(places.values())
        if cached is not None and cached.settings == settings and cached.fits(params, self.state):
            return cached.buckets
        self._check_shapes(key[0], group)
        members: dict[tuple[Plan, torch.dtype, torch.device], list[tuple[int, Tensor, torch.Size]]] = {}
        for place, param in places.items():
            part = sharding.local(param)
            if not part.numel() and not (whole and param.numel()):
                if sharding.is_sharded(param):  # saving asks every rank for state, and torch takes none for a new run
                    self.state[param].setdefault("step", torch.zeros(()))
                continue
            kind = (self.plan_of(group, param), state_dtype(param), param.device)
            warn_if_flattened(kind[0].layout, param)
            members.setdefault(kind, []).append((place, param, param.shape if whole else part.shape))
        buckets = [Bucket(plan, entries, self.state, dtype=dtype) for (plan, dtype, _), entries in members.items()]
        self._buckets[key] = GroupCache(settings, params, buckets)
        return buckets

    def _check_shapes(self, number: int, group: dict[str, Any]) -> None:
        """Refuses parameters that took the place of those of other shapes since the group was added."""
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
        fresh, ready = _stages(bucket, grads)
        decay = group["weight_decay"] if plan.weight_decay is None else plan.weight_decay
        steps, size = bucket.steps.tolist(), bucket.tensors_per_chunk()
        alike = outcomes is None and not sharding.is_sharded(bucket.params[0])
        team = sharding.Team() if group["distributed_refresh"] and alike and sharding.ranks() > 1 else None
        with torch.autocast(bucket.params[0].device.type, enabled=False):
            for seeding, flags in ((True, fresh), (False, ready)):
                for first, last in adjacent(flags, size):
                    bucket.steps[first:last] += 1
                    t = tuple(int(step) + 1 - plan.rule.seeds for step in steps[first:last])
                    chunk = Chunk(plan.layout, t, tuple(bucket.index[first:last]), self._background, team)
                    given = [grad for grad in grads[first:last] if grad is not None]
                    if seeding:
                        grad = stack_gradients(given, plan.layout, bucket.dtype)
                        plan.rule.seed(grad, bucket.rows(first, last), chunk)
                        directions: list[Tensor] = []
                    elif outcomes is None:
                        lr = group["lr"] * plan.lr_scale
                        step_tensors(bucket, first, last, given, chunk, lr=lr, weight_decay=decay)
                    else:
                        directions = directions_of(bucket, first, last, given, chunk)
                    if outcomes is not None:
                        for place, param in enumerate(bucket.params[first:last]):
                            outcomes[param] = (SEEDED, None) if seeding else (UPDATED, directions[place])

    def _find_owners(self) -> Ownership | None:
        """Says who preconditions what; None where every rank steps what it has."""
        if sharding.ranks() == 1 or all(group["shard_mode"] != "owner" for group in self.param_groups):
            return None
        listed = [(group, param) for _, group, places in self._trainable() for param in places.values()]
        if self._owners is None or not self._owners.fits([param for _, param in listed]):
            params, loads = [], []
            for group, param in listed:
                if self.owned(group, param):
                    params.append(param)
                    loads.append((self.plan_of(group, param).layout.work(), self._bytes_of(group, param)))
            dtypes = [state_dtype(param) for param in params]
            self._owners = Ownership(params, loads, dtypes, among=[param for _, param in listed])
        return self._owners

    def _step_owned(self, owners: Ownership, *, allocate_only: bool) -> None:
        """Steps the parameters that have owners, round by round, with the next round's gradients under way."""
        for param in owners.owner:
            if not owners.owns(param):
                self.state[param].setdefault("step", torch.zeros(()))
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
            alike: dict[tuple[float, float, bool], list[tuple[Tensor, Tensor]]] = {}
            for param in places.values():
                happened, direction = outcomes.get(param, (0, None))
                if happened and not owners.owns(param):
                    self.state[param]["step"] += 1
                if happened == UPDATED and direction is not None and direction.numel():
                    plan = self.plan_of(group, param)
                    decay = group["weight_decay"] if plan.weight_decay is None else plan.weight_decay
                    pair = sharding.local(param), direction
                    alike.setdefault((plan.lr_scale, decay, plan.decay_last), []).append(pair)
            for (scale, decay, last), pairs in alike.items():
                weights, directions = ([pair[i] for pair in pairs] for i in (0, 1))
                apply_(weights, directions, lr=group["lr"] * scale, weight_decay=decay, decay_last=last)

    def __getstate__(self) -> dict[str, Any]:
        # A view is pickled with its whole stack, once for each parameter in it.
        state = checkpoint.detach_state(super().__getstate__())
        return {**state, "state": defaultdict(dict, state["state"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_cache()

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the state: flat tensors by role for each parameter, and the param groups.

        The tensors are copies: the optimizer holds views of stacks, and saving one would write its whole stack.
        """
        if self._consolidated is not None:
            return self._consolidated
        if self.state and self._owned_whole():
            raise RuntimeError(
                "the state of whole parameters lies with their owners, wanted on one rank: call consolidate() on all "
                "ranks before state_dict(), as SoapTrainer does; the plain Trainer cannot save shard_mode='owner' "
                "under DDP"
            )
        return self._packed_state(to_first=False)

    def consolidate(self) -> None:
        """Brings the state that owners hold to rank 0, whose next :meth:`state_dict` returns it; a step drops it.

        Only for ``shard_mode="owner"`` with whole parameters (DDP); all ranks must call it.
        """
        if self._owned_whole():
            self._consolidated = self._packed_state(to_first=True)

    def _owned_whole(self) -> bool:
        """Whether owners hold state of parameters that are not sharded."""
        owners = self._find_owners()
        return owners is not None and any(not sharding.is_sharded(param) for param in owners.owner)

    def _packed_state(self, *, to_first: bool) -> dict[str, Any]:
        plain = super().state_dict()
        owners, state = self._find_owners(), {}
        for saved, group in zip(plain["param_groups"], self.param_groups, strict=True):
            for key, param in zip(saved["params"], group["params"], strict=True):
                if key not in plain["state"]:
                    continue
                plan, wanted, known = self.plan_of(group, param), self._wanted_state(group, param), plain["state"][key]
                if owners is None or param not in owners.owner:
                    state[key] = checkpoint.packed(param, plan, known, wanted)
                else:
                    owner = owners.owner[param]
                    state[key] = checkpoint.packed_of_owner(param, plan, known, wanted, owner, to_first=to_first)
        return {**plain, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads state by copying it, in the dtype it was saved in.

        The learning rate comes from the checkpoint, as a scheduler expects; all other settings stay as they are now.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the groups, a parameter's roles or a shape differ from what the current settings need.
        """
        # torch casts loaded state to the parameter's dtype, which would round float32 factors of a bf16 model.
        groups = checkpoint.groups_to_load(self.param_groups, state_dict)
        restored, estimated = {}, 0
        for group, param, saved in checkpoint.saved_state(self.param_groups, state_dict):
            plan, wanted = self.plan_of(group, param), self._wanted_state(group, param)
            whole = self.owned(group, param)
            restored[param], guessed = checkpoint.restored(param, plan, saved, wanted, whole=whole)
            estimated += guessed
        super().load_state_dict(groups)
        self.state.update(restored)
        owners = self._find_owners()
        for param in owners.owner if owners is not None else ():
            if not owners.owns(param) and param in restored:  # type: ignore[union-attr]
                self.state[param] = {"step": restored[param]["step"]}
        if estimated and sharding.is_first_rank():
            logger.warning(
                "%d parameters were saved in other parts (another number of ranks or block size). Momentum carries "
                "over; factors are put together from the old parts, and second moments estimated from them.",
                estimated,
            )

    def fits(self, saved: Mapping[str, Mapping[str, tuple[int, ...]]]) -> bool:
        """Whether state of these shapes was saved by as many ranks and in the same parts as there are now.

        Args:
            saved: Shapes by name of the parameter and role.
        """
        own = [
            checkpoint.packed_shapes(
                param, self.plan_of(group, param), self._wanted_state(group, param), whole=self.owned(group, param)
            )
            for group in self.param_groups
            for param in group["params"]
            if param.requires_grad
        ]
        return sorted(sorted(one.items()) for one in own) == sorted(sorted(one.items()) for one in saved.values())

    def _wanted_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        """Shapes and dtypes of the state of this rank's part of a parameter, on the meta device."""
        device = torch.device("meta")
        state = self.plan_of(group, param).allocate(1, dtype=state_dtype(param), device=device)
        return {**state, "step": torch.zeros((), device=device)}

    def state_bytes(self) -> int:
        """Returns the bytes of state of all trainable parameters on this rank, whether it was made already or not."""
        owners = self._find_owners()
        total = 0.0
        for _, group, places in self._trainable():
            for param in places.values():
                if owners is not None and param in owners.owner:
                    total += self._bytes_of(group, param) if owners.owns(param) else torch.float32.itemsize
                elif sharding.local(param).numel():
                    total += self._bytes_of(group, param)
        return int(total)

    def _bytes_of(self, group: dict[str, Any], param: Tensor) -> float:
        return sum(value.numel() * value.element_size() for value in self._wanted_state(group, param).values())


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of a group that buckets are made from."""
    return {key: value for key, value in group.items() if key not in ("params", "lr", "weight_decay")}


def _stages(bucket: Bucket, grads: Sequence[Tensor | None]) -> tuple[list[bool], list[bool]]:
    """Says which tensors of a bucket have the gradient that seeds them, and which have one to be updated with."""
    rule = bucket.plan.rule
    present = [grad is not None for grad in grads]
    if not rule.waits:
        return [], present
    new = [here and not step for here, step in zip(present, bucket.steps.tolist(), strict=True)]
    if any(new):
        # An all-zero gradient (a LoRA matrix behind a zero one, a synthetic step) shapes no preconditioner.
        unseen = [grad for grad, is_new in zip(grads, new, strict=True) if is_new and grad is not None]
        nonzero = iter(torch.stack([grad.count_nonzero() for grad in unseen]).tolist())
        # A rank's part may be zero where another's is not; what needs no factors is then counted alike by all.
        parts = rule.elementwise(bucket.plan.layout) and sharding.is_sharded(bucket.params[0])
        fresh = [is_new and (next(nonzero) > 0 or parts) for is_new in new]
    else:
        fresh = new
    old = [here and not is_new for here, is_new in zip(present, new, strict=True)]
    return (fresh, old) if rule.seeds else ([], [a or b for a, b in zip(fresh, old, strict=True)])


@dataclass
class GroupCache:
    """The buckets of a param group, and what they were made from."""

    settings: dict[str, Any]
    params: list[Tensor]
    buckets: list[Bucket]

    def fits(self, params: list[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether parameters and state are still those that the buckets were made from."""
        same = len(self.params) == len(params) and all(a is b for a, b in zip(self.params, params, strict=True))
        return same and all(bucket.intact(state) for bucket in self.buckets)


def warn_if_flattened(layout: Layout, param: Tensor) -> None:
    """Warns about a tensor that merging made one long vector, whose factor then has the square of its entries."""
    if layout.sides and len(layout.view) == 1 and param.dim() > 2:
        n = layout.block[0]
        logger.warning(
            "merge_dims makes one vector of %d entries of a tensor of shape %s: %d factors of %d x %d, %.0f MiB; "
            "lower max_precond_dim to keep its dimensions apart.",
            param.numel(),
            tuple(param.shape),
            layout.blocks,
            n,
            n,
            2 * layout.factor_numel() * state_dtype(param).itemsize / 2**20,
        )


def state_dtype(param: Tensor) -> torch.dtype:
    """Returns the dtype of a parameter's state: float32 for bf16 and fp16 parameters, else the parameter's own."""
    return param.dtype if param.dtype in (torch.float32, torch.float64) else torch.float32


def norms_are_sane(grads: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Says whether all gradients are finite and small enough for sums of their squares, with a margin of 100.

    Larger ones would make factors and second moments infinite for good.

    Args:
        grads: Any shapes, on one device.
        dtype: What the state is computed in: float32 or float64.
    """
    norms = torch.stack(torch._foreach_norm(list(grads), 2, dtype))
    return bool((norms < math.sqrt(torch.finfo(dtype).max / 100)).all())  # NaN compares false


def stack_gradients(grads: Sequence[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    """Returns gradients as one batch of blocks (tensors * blocks, d_1, ..., d_k) in ``dtype``."""
    cut = [layout.to_blocks(grad) for grad in grads]
    return (cut[0] if len(cut) == 1 else torch.cat(cut)).to(dtype)


def step_tensors(
    bucket: Bucket,
    first: int,
    last: int,
    grads: Sequence[Tensor],
    chunk: Chunk,
    *,
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    """Updates the tensors first..last-1 of a bucket: by the rule's fused kernels where they apply, else its direction.

    Args:
        bucket: Their parameters and state.
        first: The first of them.
        last: One after the last.
        grads: Their gradients.
        chunk: What the rule needs to know of them.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
    """
    plan, state = bucket.plan, bucket.rows(first, last)
    weights = [sharding.local(param) for param in bucket.params[first:last]]
    if plan.keep_weights:
        before = torch.cat([plan.layout.to_blocks(weight) for weight in weights])
    alike = plan.layout.blocks == 1 and all(t.dtype == bucket.dtype and t.is_contiguous() for t in (*weights, *grads))
    if plan.rule.fuses and alike and not plan.decay_last:
        pieces = bucket.pieces(first, last)
        plan.rule.fused_step(weights, grads, pieces, chunk.t, lr=lr, weight_decay=weight_decay)
    else:
        directions = directions_of(bucket, first, last, grads, chunk)
        apply_(weights, directions, lr=lr, weight_decay=weight_decay, decay_last=plan.decay_last)
    if plan.keep_weights:
        state[PREV_PARAM].copy_(before)


def directions_of(bucket: Bucket, first: int, last: int, grads: Sequence[Tensor], chunk: Chunk) -> list[Tensor]:
    """Updates the state of the tensors first..last-1 of a bucket and returns their directions, in their shapes."""
    plan = bucket.plan
    direction = plan.rule.update(stack_gradients(grads, plan.layout, bucket.dtype), bucket.rows(first, last), chunk)
    pieces = zip(direction.split(plan.layout.blocks), bucket.shapes[first:last], strict=True)
    return [plan.layout.from_blocks(piece, shape) for piece, shape in pieces]


def apply_(
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    decay_last: bool,
) -> None:
    """Takes a step as :func:`hf_soap.updates.take_step_` does, rounding low-precision weights once.

    Args:
        weights: Changed in place.
        directions: Of the same shapes, used up.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        decay_last: Whether the weights decay after the update, or both are taken from the same weights.
    """
    exact = [w if w.dtype == d.dtype else w.to(d.dtype) for w, d in zip(weights, directions, strict=True)]
    updates.take_step_(exact, directions, lr=lr, weight_decay=weight_decay, decay_last=decay_last)
    for weight, value in zip(weights, exact, strict=True):
        if weight is not value:
            weight.copy_(value)


def check_learning_rate(lr: Any) -> None:
    """Checks a learning rate: a number >= 0, or a tensor of one element.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(
                f"lr must be a number or a tensor of one element, got a tensor of shape {tuple(lr.shape)}"
            )
        lr = lr.item()
    check_number("lr", lr)


def check_number(name: str, value: Any) -> None:
    """Checks a setting that must be a finite number >= 0.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def check_pair(name: str, value: Any) -> tuple[Any, Any]:
    """Returns the two items of a setting such as betas.

    Raises:
        ValueError: If it does not have two.
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be two numbers, got {value!r}; for example (0.9, 0.95)")
    return value[0], value[1]


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Checks a setting that must be one of a few words.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
