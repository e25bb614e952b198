"""The stacks that keep the state of many tensors together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_soap import sharding
from hf_soap.blocks import Chunk, Layout, Plan
from hf_soap.precision import float32_products
from hf_soap.storage import COUNT, SCALE, step_keys

logger = logging.getLogger(__name__)

CHUNK_BYTES = {"cpu": 8 * 2**20}
LAUNCH_BYTES = 256 * 2**20
"""Budgets for the temporaries of one step of one bucket; a larger bucket is worked through in chunks of whole tensors.

What a CPU works on stays in its cache. Other devices want few launches.
"""


class Bucket:
    """The stacked state of all tensors with the same blocks, handed out to ``optimizer.state[p]`` as views.

    A cache, never the truth: :meth:`intact` tells whether the state still lives here. Where it was replaced (a load, a
    deepcopy, a swapped parameter) the optimizer builds the bucket anew from what it finds in the state.
    """

    def __init__(
        self,
        plan: Plan,
        members: Sequence[tuple[int, Tensor, torch.Size]],
        state: Mapping[Tensor, dict[str, Any]],
        *,
        dtype: torch.dtype,
    ) -> None:
        """Takes over the state of its members.

        ``fuses`` says whether the rule's fused kernels take their gradients as they are; ``each`` is their state then,
        by role a tensor each.

        Args:
            plan: What happens to each of them.
            members: Place in the optimizer, parameter, and shape of what is stepped: the parameter, or a part of it.
            state: The optimizer's state, which gets the views.
            dtype: Dtype of the state.
        """
        self.plan = plan
        self.dtype = dtype
        self.index = [index for index, _, _ in members]
        self.params = [param for _, param, _ in members]
        self.shapes = [shape for _, _, shape in members]
        self._cut = any(map(sharding.is_sharded, self.params))
        device = self.params[0].device
        self.stacks = plan.allocate(len(members), dtype=dtype, device=device)
        self.steps = torch.zeros(len(members), dtype=COUNT, device="cpu")
        self._bytes_of_step = max(1, temporary_bytes(plan, dtype))
        fuses = plan.rule.fuses and plan.kept.plain and not plan.decay_last
        parts = self.weights(0, len(members)) if fuses else []
        self.fuses = bool(parts) and all(
            part.shape == plan.layout.block and part.dtype == dtype and part.is_contiguous() for part in parts
        )
        self.each = {role: list(stack.unbind()) for role, stack in self.stacks.items()} if self.fuses else {}
        self._pointers: list[list[int]] = []
        for place, param in enumerate(self.params):
            views = self.rows(place, place + 1)
            views["step"] = self.steps[place]
            known = state[param]
            if known.keys() - {"step"} or known.get("step", 0) > 0:
                known.update(plan.kept.converted(known, views))
                for role in known.keys() - views.keys():
                    if role.endswith(SCALE):
                        del known[role]
                check_state(known, views, tuple(param.shape))
            for role, view in views.items():
                if role in known:
                    view.copy_(known[role] if isinstance(known[role], Tensor) else torch.tensor(known[role]))
                known[role] = view
            self._pointers.append([view.data_ptr() for view in known.values()])

    def takes(self, plan: Plan) -> bool:
        """Whether the bucket as it is, state and all, would be built for another plan too."""
        old, same = self.plan, ("layout", "kept", "decay_last")
        if any(getattr(old, name) != getattr(plan, name) for name in same):
            return False
        wanted = plan.allocate(len(self.params), dtype=self.dtype, device=torch.device("meta"))
        form = {role: (value.shape, value.dtype) for role, value in wanted.items()}
        fits = form == {role: (value.shape, value.dtype) for role, value in self.stacks.items()}
        return fits and old.rule.fuses == plan.rule.fuses

    def rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Views of the state of the tensors first..last-1, by role."""
        b = self.plan.layout.blocks
        return {role: stack[first * b : last * b] for role, stack in self.stacks.items()}

    def weights(self, first: int, last: int) -> list[Tensor]:
        """This rank's parts of the parameters first..last-1."""
        params = self.params[first:last]
        return [sharding.local(param) for param in params] if self._cut else params

    def grads(self) -> list[Tensor | None]:
        """Their gradients."""
        return [sharding.local_grad(param) if self._cut else param.grad for param in self.params]

    @contextmanager
    def working(self, first: int, last: int, chunk: Chunk) -> Iterator[dict[str, Tensor]]:
        """State of the tensors first..last-1 to compute with, which is put back as it is kept on leaving."""
        kept, storage = self.rows(first, last), self.plan.kept
        if storage.plain and chunk.usable is None:
            yield kept
            return
        before = {role: value.clone() for role, value in kept.items()} if chunk.usable is not None else {}
        state = storage.decode(kept, self.dtype)
        versions = {role: value._version for role, value in state.items()}
        yield state
        changed = {role: value for role, value in state.items() if value._version != versions[role]}
        if not storage.plain:
            storage.encode_(kept, changed, step_keys(chunk.t, chunk.index))
        for role, value in before.items():
            if role.removesuffix(SCALE) in changed:
                kept[role].copy_(torch.where(chunk.usable, kept[role], value))  # type: ignore[arg-type]

    def exact_arithmetic(self) -> ExitStack:
        """Keeps what the program has set for its model's arithmetic away from the step."""
        contexts, device = ExitStack(), self.params[0].device
        if torch.is_autocast_enabled(device.type):
            contexts.enter_context(torch.autocast(device.type, enabled=False))
        if not self.fuses:  # fused kernels multiply no matrices
            layout = self.plan.layout
            contexts.enter_context(float32_products(layout.block, device, sides=layout.sides))
        return contexts

    @contextmanager
    def stepping(self) -> Iterator[list[int]]:
        """Lets the tensors whose step fails start anew: their state may be half changed, and their step is counted.

        Yields:
            To be filled with the first of the tensors that are being stepped, and one after the last.
        """
        under_way = [0, 0]
        try:
            yield under_way
        except BaseException as error:
            first, last = under_way
            if last > first:
                for stack in self.rows(first, last).values():
                    stack.zero_()  # as allocated; memory may be what was missing
                self.steps[first:last].zero_()
                logger.warning(
                    "A step was broken off by %s: %d tensors start without state.", type(error).__name__, last - first
                )
            raise

    def intact(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether every tensor's state is still the view that was handed out."""
        try:
            return all(
                list(map(Tensor.data_ptr, state.get(param, {}).values())) == pointers
                for param, pointers in zip(self.params, self._pointers, strict=True)
            )
        except TypeError:  # something else than a tensor
            return False

    def tensors_per_chunk(self, *, watched: bool = False) -> int:
        """How many tensors fit into the byte budget of temporaries, at least one.

        Args:
            watched: Whether weights are compared with what they were, which takes temporaries of fused kernels too.
        """
        in_cache = CHUNK_BYTES.get(self.params[0].device.type, LAUNCH_BYTES)
        budget = LAUNCH_BYTES if self.fuses and not watched else in_cache
        return max(1, budget // self._bytes_of_step)


def temporary_bytes(plan: Plan, dtype: torch.dtype) -> int:
    """Estimates what the step of one tensor needs beside its state, for as long as it takes."""
    needs = plan.layout.blocks * dtype.itemsize * plan.rule.workspace(plan.layout)
    if not plan.kept.plain:
        computed = plan.computed(1, dtype=dtype, device=torch.device("meta"))
        needs += sum(value.numel() * value.element_size() for value in computed.values())
    return needs


def check_state(known: Mapping[str, Any], wanted: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """Checks that saved state has the roles and shapes that the current settings need.

    Args:
        known: State of one parameter as found, by role.
        wanted: Tensors of the right shapes, by role; ``step`` included.
        shape: Shape of the parameter, for the message.

    Raises:
        ValueError: If a role is missing, unknown or has another shape.
    """
    got = {role: tuple(torch.as_tensor(value).shape) for role, value in known.items()}
    want = {role: tuple(value.shape) for role, value in wanted.items()}
    if got != want:
        differ = sorted(role for role in got.keys() | want.keys() if got.get(role) != want.get(role))
        raise ValueError(
            f"the optimizer state of a parameter of shape {shape} does not fit the current settings: "
            + "; ".join(
                f"{role} got {got.get(role, 'nothing')}, wanted {want.get(role, 'nothing')}" for role in differ
            )
            + ". Resume with the optimizer and the optim_args that wrote the checkpoint, or start without its state."
        )


@dataclass
class GroupCache:
    """The buckets of a param group, and what they were made from."""

    settings: dict[str, Any]
    params: list[Tensor]
    buckets: list[Bucket]

    def __post_init__(self) -> None:
        self._kinds = [(param.dtype, param.device) for param in self.params]

    def fits(self, params: list[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether parameters and state are still those that the buckets were made from."""
        same = len(self.params) == len(params) and all(a is b for a, b in zip(self.params, params, strict=True))
        same = same and self._kinds == [(param.dtype, param.device) for param in params]  # model.double() keeps them
        return same and all(bucket.intact(state) for bucket in self.buckets)

    def replan(self, plan_of: Callable[[Tensor], Plan]) -> bool:
        """Gives the buckets the plans of other settings, if they are cut alike and their state has the same form.

        A scheduler that cycles betas changes them at every step, and state need not be copied each time for that.

        Args:
            plan_of: Says what now happens to a parameter.

        Returns:
            Whether that was possible; if not, nothing has changed.
        """
        found = [{plan_of(param) for param in bucket.params} for bucket in self.buckets]
        pairs = zip(found, self.buckets, strict=True)
        kinds = {(plan, bucket.dtype, bucket.params[0].device) for plans, bucket in pairs for plan in plans}
        if not len(kinds) == len(self.buckets) == sum(map(len, found)):
            return False
        plans = [plan for (plan,) in found]
        if not all(bucket.takes(plan) for bucket, plan in zip(self.buckets, plans, strict=True)):
            return False
        for bucket, plan in zip(self.buckets, plans, strict=True):
            bucket.plan = plan
        return True


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
