"""The stacks that keep the state of many tensors together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_soap.checkpoint.checks import check_state
from hf_soap.config.members import Member, Roster
from hf_soap.distributed import dtensor
from hf_soap.engine.plan import Plan
from hf_soap.linalg.precision import float32_products
from hf_soap.rules.context import StepContext
from hf_soap.rules.layout import Layout
from hf_soap.rules.storage import COUNT, is_own, step_keys

logger = logging.getLogger(__name__)

CHUNK_BYTES = {"cpu": 8 * 2**20}
LAUNCH_BYTES = 2**30
"""Budgets for the temporaries of one step of one bucket; a larger bucket is worked through in chunks of whole tensors.

What a CPU works on stays in its cache. Other devices want few launches.
"""


Kind = tuple[Plan, torch.dtype, torch.device]
"""What tensors of a bucket have in common: plan, dtype of the state, and device."""


class Bucket:
    """The stacked state of all tensors with the same blocks, handed out to ``optimizer.state[p]`` as views.

    A cache, never the truth: :meth:`intact` tells whether it is still valid. Where it was replaced (a load, a
    deepcopy, a swapped parameter) the optimizer rebuilds the bucket from the state.
    """

    def __init__(
        self,
        plan: Plan,
        members: Sequence[tuple[Member, torch.Size]],
        state: MutableMapping[Tensor, dict[str, Any]],
        *,
        dtype: torch.dtype,
    ) -> None:
        """Takes over the state of its members.

        ``fuses`` says whether the rule's fused kernels take their gradients as they are; ``each`` is their state then,
        by role a tensor each.

        Args:
            plan: What happens to each of them.
            members: Parameters, of any groups, and the shape of what is stepped: the parameter, or a part of it.
            state: The optimizer's state, which gets the views.
            dtype: Dtype of the state.
        """
        self.plan = plan
        self.dtype = dtype
        self.index = [member.place for member, _ in members]
        self.rates = [member.rates for member, _ in members]
        self.params = [member.param for member, _ in members]
        self.shapes = [shape for _, shape in members]
        self._kinds = [(param.shape, param.dtype, param.device) for param in self.params]
        self._cut = any(map(dtensor.is_sharded, self.params))
        device = self.params[0].device
        self.stacks = plan.allocate(len(members), dtype=dtype, device=device)
        self.steps = torch.zeros(len(members), dtype=COUNT, device="cpu")
        self._bytes_of_step = max(1, temporary_bytes(plan, dtype))
        fuses = plan.traits.has_fused_step and plan.keeps_as_computed and plan.weight_step.fuses
        parts = self.weights(0, len(members)) if fuses else []
        self.fuses = bool(parts) and all(
            part.shape == plan.layout.block and part.dtype == dtype and part.is_contiguous() for part in parts
        )
        self.each = {role: list(stack.unbind()) for role, stack in self.stacks.items()} if self.fuses else {}
        self._roles = (*self.stacks, "step")
        self._pointers: list[list[int]] = []
        for place, (member, _) in enumerate(members):
            views = self.rows(place, place + 1)
            views["step"] = self.steps[place]
            self._take_over(member, state.setdefault(member.param, {}), views)
            self._pointers.append([views[role].data_ptr() for role in self._roles])

    def _take_over(self, member: Member, known: dict[str, Any], views: dict[str, Tensor]) -> None:
        """Copies the family's state of a parameter into its views; other state is not changed."""
        own = {role: value for role, value in known.items() if is_own(role)}
        if own.keys() - {"step"} or own.get("step", 0) > 0:
            own = self.plan.state_format.converted(own, views, self.plan.state_spec)
            check_state(own, views, member.name, tuple(member.param.shape))
        for role, view in views.items():
            if role in own:
                view.copy_(own[role] if isinstance(own[role], Tensor) else torch.tensor(own[role], device="cpu"))
            known[role] = view
        for role in [role for role in known if is_own(role) and role not in views]:
            del known[role]

    def serves(self, kind: Kind, members: Mapping[Tensor, Member]) -> bool:
        """Whether the bucket is what would be built of its parameters now, which are all among these members."""
        if kind != (self.plan, self.dtype, self.params[0].device):
            return False
        found = [members.get(param) for param in self.params]
        return [(m.place, m.rates) for m in found if m is not None] == list(zip(self.index, self.rates, strict=True))

    def takes(self, plan: Plan) -> bool:
        """Whether the bucket as it is, state and all, would be built for another plan too."""
        old, same = self.plan, ("layout", "state_format", "weight_step")
        if any(getattr(old, name) != getattr(plan, name) for name in same):
            return False
        wanted = plan.allocate(len(self.params), dtype=self.dtype, device=torch.device("meta"))
        form = {role: (value.shape, value.dtype) for role, value in wanted.items()}
        fits = form == {role: (value.shape, value.dtype) for role, value in self.stacks.items()}
        return fits and old.traits.has_fused_step == plan.traits.has_fused_step

    def rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Views of the state of the tensors first..last-1, by role."""
        b = self.plan.layout.blocks
        return {role: stack[first * b : last * b] for role, stack in self.stacks.items()}

    def weights(self, first: int, last: int) -> list[Tensor]:
        """This rank's parts of the parameters first..last-1."""
        params = self.params[first:last]
        return [dtensor.local(param) for param in params] if self._cut else params

    def grads(self) -> list[Tensor | None]:
        """Their gradients."""
        return [dtensor.local_grad(param) if self._cut else param.grad for param in self.params]

    @contextmanager
    def working(self, first: int, last: int, context: StepContext) -> Iterator[dict[str, Tensor]]:
        """State of the tensors first..last-1 to compute with, which is put back as it is kept on leaving."""
        kept, storage = self.rows(first, last), self.plan.state_format
        if self.plan.keeps_as_computed:
            yield kept
            return
        specs = self.plan.state_spec
        state = storage.decode(kept, specs, self.dtype)
        versions = {role: value._version for role, value in state.items()}
        yield state
        changed = {role: value for role, value in state.items() if value._version != versions[role]}
        storage.encode_(kept, changed, specs, step_keys(context.t, context.index))

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
        """Resets the tensors whose step fails: their state may be half changed, and their step has been counted.

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

    def kinds(self) -> Iterator[tuple[Tensor, tuple[torch.Size, torch.dtype, torch.device]]]:
        """Yields each parameter with the shape, dtype and device that it had when the bucket was made."""
        return zip(self.params, self._kinds, strict=True)

    def intact(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether the parameters are as they were, and the state of each is still the view that was handed out."""
        # model.double() keeps the parameters.
        if self._kinds != [(param.shape, param.dtype, param.device) for param in self.params]:
            return False
        nothing: dict[str, Any] = {}  # and none for a defaultdict to make
        try:
            known = [state.get(param, nothing) for param in self.params]
            return all(
                [entry[role].data_ptr() for role in self._roles] == pointers
                for entry, pointers in zip(known, self._pointers, strict=True)
            )
        except (KeyError, AttributeError):  # something else than a tensor
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
    if not plan.keeps_as_computed:
        computed = plan.computed(1, dtype=dtype, device=torch.device("meta"))
        needs += sum(value.numel() * value.element_size() for value in computed.values())
    return needs


@dataclass
class BucketCache:
    """The buckets of some parameters, and what they were made from.

    Attributes:
        roster: The optimizer's parameters.
        dormant: Parameters that have had no gradient yet, and so have no state.
        empty: Parameters of which this rank has nothing.
        buckets: The buckets of all others.
    """

    roster: Roster
    dormant: list[Member]
    empty: list[Tensor]
    buckets: list[Bucket]

    def fits(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether parameters and state are still those that the buckets were made from."""
        if any(member.param.grad is not None for member in self.dormant):
            return False
        return all(bucket.intact(state) for bucket in self.buckets)

    def still_serving(
        self, kinds: Mapping[Kind, list[tuple[Member, torch.Size]]], state: Mapping[Tensor, dict[str, Any]]
    ) -> list[Bucket]:
        """Returns the buckets that can be kept, and takes their members off the lists.

        Args:
            kinds: Members to be stepped and their shapes, by what happens to them; changed in place.
            state: The optimizer's state.
        """
        intact = [bucket for bucket in self.buckets if bucket.intact(state)]
        kept = []
        for kind, entries in kinds.items():
            members = {member.param: member for member, _ in entries}
            for bucket in intact:
                if bucket.serves(kind, members):
                    kept.append(bucket)
                    taken = set(bucket.params)
                    entries[:] = [entry for entry in entries if entry[0].param not in taken]
        return kept

    def release(self, new: BucketCache, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Copies state out of stacks that no bucket has any more, which it would keep in memory.

        Args:
            new: The buckets in the place of these.
            state: The optimizer's state, changed in place: that of parameters which are frozen or gone.
        """
        kept, stepped = set(map(id, new.buckets)), {param for bucket in new.buckets for param in bucket.params}
        for bucket in self.buckets:
            for param in () if id(bucket) in kept else bucket.params:
                known = state.get(param)
                if known is not None and param not in stepped:
                    known.update({k: v.clone() for k, v in known.items() if is_own(k) and isinstance(v, Tensor)})

    def shapes(self) -> dict[Tensor, torch.Size]:
        """Returns the shapes that the parameters had when the buckets were made."""
        return {param: kind[0] for bucket in self.buckets for param, kind in bucket.kinds()}

    def replan(self, roster: Roster, plan_of: Callable[[dict[str, Any], Tensor], Plan]) -> bool:
        """Gives the buckets the plans of other settings, if they are cut alike and their state has the same form.

        A scheduler that cycles betas changes them at every step, and state need not be copied each time for that.

        Args:
            roster: The parameters with their present settings.
            plan_of: Says what happens to a parameter, from its settings.

        Returns:
            Whether that was possible; if not, nothing has changed.
        """
        if not roster.same_parameters(self.roster):
            return False
        members = {member.param: member for member in roster.trained}
        found = [{plan_of(members[param].settings, param) for param in bucket.params} for bucket in self.buckets]
        pairs = zip(found, self.buckets, strict=True)
        kinds = {(plan, bucket.dtype, bucket.params[0].device) for plans, bucket in pairs for plan in plans}
        if not len(kinds) == len(self.buckets) == sum(map(len, found)):
            return False
        plans = [plan for (plan,) in found]
        if not all(bucket.takes(plan) for bucket, plan in zip(self.buckets, plans, strict=True)):
            return False
        for bucket, plan in zip(self.buckets, plans, strict=True):
            bucket.plan, bucket.rates = plan, [members[param].rates for param in bucket.params]
        self.roster = roster
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
