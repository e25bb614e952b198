"""The step loop that all optimizers share."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_soap import checkpoint, schema, sharding, updates
from hf_soap.background import Background
from hf_soap.blocks import PREV_PARAM, Bucket, Chunk, Layout, Plan, adjacent

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
        self._buckets: dict[int, GroupCache] = {}
        self._background = Background()
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
        """Returns rule and layout of this rank's part of a parameter, all of it where it is not sharded.

        Ranks decide alike, by the largest part: a smaller one is padded to the same blocks.
        """
        shard = sharding.shard_of(param)
        if math.prod(sharding.stack_sizes(param)) == 1:
            return self.plan(group, shard.whole)
        plan = self.plan(group, shard.largest, sharded=True)
        if plan.rule.entrywise(plan.layout):
            return self.plan(group, shard.size, sharded=True)
        return replace(plan, layout=plan.layout.fitted(shard.largest, shard.size))

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
            synthetic = self._is_synthetic()
            first = 0
            for number, group in enumerate(self.param_groups):
                # Counted with the frozen ones: thawing one must move no other's refreshes and background work.
                places = {first + i: p for i, p in enumerate(group["params"]) if p.requires_grad}
                for bucket in self._group_buckets(number, group, places):
                    with torch.autocast(bucket.params[0].device.type, enabled=False):
                        if not synthetic:
                            self._step_bucket(group, bucket)
                first += len(group["params"])
        return loss

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

    def _group_buckets(self, number: int, group: dict[str, Any], places: dict[int, Tensor]) -> list[Bucket]:
        """Returns the buckets of a group, built anew where parameters or state were replaced since the last step."""
        settings = {key: value for key, value in group.items() if key not in ("params", "lr", "weight_decay")}
        cached, params = self._buckets.get(number), list(places.values())
        if cached is not None and cached.settings == settings and cached.fits(params, self.state):
            return cached.buckets
        members: dict[tuple[Plan, torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
        for place, param in places.items():
            if not sharding.local(param).numel():
                if sharding.is_sharded(param):  # saving asks every rank for state, and torch takes none for a new run
                    self.state[param].setdefault("step", torch.zeros(()))
                continue
            key = (self.plan_of(group, param), state_dtype(param), param.device)
            warn_if_flattened(key[0].layout, param)
            members.setdefault(key, []).append((place, param))
        buckets = [Bucket(plan, entries, self.state, dtype=dtype) for (plan, dtype, _), entries in members.items()]
        self._buckets[number] = GroupCache(settings, params, buckets)
        return buckets

    def _step_bucket(self, group: dict[str, Any], bucket: Bucket) -> None:
        plan = bucket.plan
        fresh, ready = _stages(bucket)
        decay = group["weight_decay"] if plan.weight_decay is None else plan.weight_decay
        steps, size = bucket.steps.tolist(), bucket.tensors_per_chunk()
        for seeding, flags in ((True, fresh), (False, ready)):
            for first, last in adjacent(flags, size):
                bucket.steps[first:last] += 1
                t = tuple(int(step) + 1 - plan.rule.seeds for step in steps[first:last])
                chunk = Chunk(plan.layout, t, tuple(bucket.index[first:last]), self._background)
                if seeding:
                    grad = stack_gradients(gradients(bucket.params[first:last]), plan.layout, bucket.dtype)
                    plan.rule.seed(grad, bucket.rows(first, last), chunk)
                else:
                    step_tensors(bucket, first, last, chunk, lr=group["lr"] * plan.lr_scale, weight_decay=decay)

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
        plain = super().state_dict()
        state = {}
        for saved, group in zip(plain["param_groups"], self.param_groups, strict=True):
            for key, param in zip(saved["params"], group["params"], strict=True):
                if key in plain["state"]:
                    plan, wanted = self.plan_of(group, param), self._wanted_state(group, param)
                    state[key] = checkpoint.packed(param, plan, plain["state"][key], wanted)
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
            restored[param], guessed = checkpoint.restored(param, plan, saved, wanted)
            estimated += guessed
        super().load_state_dict(groups)
        self.state.update(restored)
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
            checkpoint.packed_shapes(param, self.plan_of(group, param), self._wanted_state(group, param))
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
        """Returns the bytes that the state of all trainable parameters takes, whether it was made already or not."""
        return sum(
            value.numel() * value.element_size()
            for group in self.param_groups
            for param in group["params"]
            if param.requires_grad and sharding.local(param).numel()
            for value in self._wanted_state(group, param).values()
        )


def _stages(bucket: Bucket) -> tuple[list[bool], list[bool]]:
    """Says which tensors of a bucket have the gradient that seeds them, and which have one to be updated with."""
    rule = bucket.plan.rule
    grads = [sharding.local_grad(param) for param in bucket.params]
    present = [grad is not None for grad in grads]
    if not rule.waits:
        return [], present
    new = [here and not step for here, step in zip(present, bucket.steps.tolist(), strict=True)]
    if any(new):
        # An all-zero gradient (a LoRA matrix behind a zero one, a synthetic step) shapes no preconditioner.
        unseen = [grad for grad, is_new in zip(grads, new, strict=True) if is_new and grad is not None]
        nonzero = iter(torch.stack([grad.count_nonzero() for grad in unseen]).tolist())
        fresh = [is_new and next(nonzero) > 0 for is_new in new]
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


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Returns the gradients of this rank's parts of parameters that all have one."""
    return [grad for param in params if (grad := sharding.local_grad(param)) is not None]


def stack_gradients(grads: Sequence[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    """Returns gradients as one batch of blocks (tensors * blocks, d_1, ..., d_k) in ``dtype``."""
    cut = [layout.to_blocks(grad) for grad in grads]
    return (cut[0] if len(cut) == 1 else torch.cat(cut)).to(dtype)


def step_tensors(
    bucket: Bucket, first: int, last: int, chunk: Chunk, *, lr: float | Tensor, weight_decay: float
) -> None:
    """Updates the tensors first..last-1 of a bucket: by the rule's fused kernels where they apply, else its direction.

    Args:
        bucket: Their parameters and state.
        first: The first of them.
        last: One after the last.
        chunk: What the rule needs to know of them.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
    """
    plan, state = bucket.plan, bucket.rows(first, last)
    params = [sharding.local(param) for param in bucket.params[first:last]]
    grads = gradients(bucket.params[first:last])
    if plan.keep_weights:
        before = torch.cat([plan.layout.to_blocks(param) for param in params])
    alike = plan.layout.blocks == 1 and all(t.dtype == bucket.dtype and t.is_contiguous() for t in (*params, *grads))
    if plan.rule.fuses and alike and not plan.decay_last:
        pieces = bucket.pieces(first, last)
        plan.rule.fused_step(params, grads, pieces, chunk.t, lr=lr, weight_decay=weight_decay)
    else:
        direction = plan.rule.update(stack_gradients(grads, plan.layout, bucket.dtype), state, chunk)
        apply_(params, direction, plan, lr=lr, weight_decay=weight_decay)
    if plan.keep_weights:
        state[PREV_PARAM].copy_(before)


def apply_(
    params: Sequence[Tensor], direction: Tensor, plan: Plan, *, lr: float | Tensor, weight_decay: float
) -> None:
    """Takes the step W ← W − lr·direction with decoupled weight decay, rounding low-precision weights once.

    Args:
        params: Tensors of one layout, changed in place.
        direction: (tensors * blocks, d_1, ..., d_k), used up.
        plan: Their layout, and whether W ← (1 − lr·weight_decay)·W comes before the update (decay and update are then
            taken from the same weights) or after it.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
    """
    pieces = direction.split(plan.layout.blocks)
    directions = [plan.layout.from_blocks(piece, param.shape) for piece, param in zip(pieces, params, strict=True)]
    exact = [param if param.dtype == direction.dtype else param.to(direction.dtype) for param in params]
    updates.take_step_(exact, directions, lr=lr, weight_decay=weight_decay, decay_last=plan.decay_last)
    for param, value in zip(params, exact, strict=True):
        if param is not value:
            param.copy_(value)


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
