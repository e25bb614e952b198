"""The cost of an optimizer on each rank: state, communication and work, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from hf_soap.distributed import owners
from hf_soap.engine.averages import bytes_of_average
from hf_soap.engine.buckets import LAUNCH_BYTES, state_dtype, temporary_bytes
from hf_soap.engine.optimizer import BlockOptimizer, bytes_of, planned_state
from hf_soap.engine.plan import Plan
from hf_soap.rules.storage import COUNT

Mode = Literal["local", "owner", "ddp", "ddp, owner"]
"""``"local"`` and ``"owner"`` are for parameters sharded along their first dimension, the others for DDP."""


@dataclass
class Cost:
    """The cost on one rank; each figure is that of the rank with the most.

    Attributes:
        state: Bytes of optimizer state.
        factors: Bytes of factors, bases and roots, which are part of the state.
        temporaries: Estimated bytes that a step needs in addition to the state.
        sent: Bytes that a rank sends to other ranks in a step, averaged over refreshes and over ranks.
        work: Floating point operations of preconditioning in a step, averaged over refreshes: matrix products and
            decompositions. Elementwise operations are not counted.
    """

    state: float = 0.0
    factors: float = 0.0
    temporaries: float = 0.0
    sent: float = 0.0
    work: float = 0.0


@dataclass(frozen=True)
class Share:
    """The plan of a parameter: of the largest part of any rank, or of the whole parameter on its owner.

    Attributes:
        group: The settings that hold for it.
        own: What it overrides.
        param: The parameter.
        plan: Its plan.
        owned: Whether it has an owner.
        average: Bytes of the average of the weights of the largest part, which every rank keeps of its own.
    """

    group: dict[str, Any]
    own: Mapping[str, Any]
    param: Tensor
    plan: Plan
    owned: bool
    average: int

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        return planned_state(self.plan, self.param)

    @property
    def state(self) -> int:
        """Bytes of optimizer state without the average."""
        return bytes_of(self._state)

    @property
    def factors(self) -> int:
        """Bytes of factors, bases and roots, which are part of the state."""
        matrices = {role for role, spec in self.plan.state_spec.items() if spec.kind in ("factor", "basis", "root")}
        return bytes_of({role: value for role, value in self._state.items() if role in matrices})


def shares(optimizer: BlockOptimizer, *, ranks: int, mode: Mode) -> Iterator[Share]:
    """Yields the share of each trainable parameter that is not empty; takes the arguments of :func:`cost`."""
    for member in optimizer.members():
        param, settings = member.param, member.settings
        if not param.requires_grad or not param.numel():
            continue
        whole = optimizer.plan(settings, param.shape)
        stays = mode == "owner" and whole.traits.is_elementwise
        owned = mode in ("owner", "ddp, owner") and not stays and ranks > 1
        part = largest_part(param, ranks) if mode in ("local", "owner") else tuple(param.shape)
        stepped = whole if owned or ranks == 1 or mode == "ddp" else optimizer.plan(settings, param.shape, part=part)
        average = bytes_of_average(settings, param, part)
        yield Share(settings, member.own, param, stepped, owned, average)


def largest_part(param: Tensor, ranks: int) -> tuple[int, ...]:
    """Returns the shape of the largest part of a tensor that is sharded along its first dimension."""
    return (-(-param.shape[0] // ranks), *param.shape[1:]) if param.dim() else ()


def cost(optimizer: BlockOptimizer, *, ranks: int, mode: Mode) -> Cost:
    """Estimates the cost of an optimizer on a number of ranks; parameters may be on the meta device.

    The scalar of the finite check is not counted.

    Args:
        optimizer: An optimizer of whole parameters.
        ranks: Number of ranks.
        mode: How parameters and state are distributed.

    Returns:
        The cost on the rank with the most.
    """
    total, owned, kept = Cost(), [], 0
    concurrent = [0, 0]
    for share in shares(optimizer, ranks=ranks, mode=mode):
        param, plan = share.param, share.plan
        num_bytes = state_dtype(param).itemsize
        needs = temporary_bytes(plan, state_dtype(param))
        concurrent = [concurrent[0] + needs, max(concurrent[1], needs)]
        total.state += share.average
        if plan.weight_step.is_relative and ranks > 1 and mode in ("local", "owner"):
            kept += math.prod(largest_part(param, ranks)) * num_bytes  # the direction, until its norm is known
        if share.owned:
            owned.append(share)
            # The gradient goes to the owner and the direction comes back, except for the owner's own part.
            moved = param.numel() * num_bytes * (ranks - 1) / ranks
            total.sent += 2 * moved / ranks if mode == "owner" else moved
            total.state += COUNT.itemsize  # every rank counts the steps
            continue
        total.state += share.state
        total.factors += share.factors
        total.work += plan.work()
        if mode == "ddp" and ranks > 1 and share.group.get("distributed_refresh", False) is not False:
            squares = plan.layout.factor_numel() * 2 * num_bytes  # the rotation and the rotated factor, or the root
            if squares:
                total.sent += squares / share.group.get("precondition_frequency", 1) * (ranks - 1) / ranks
            total.work -= (1 - 1 / ranks) * plan.work(refreshes_only=True)
    of_rank = [Cost() for _ in range(ranks)]
    assigned = owners.assign([(share.plan.work(), share.state) for share in owned], ranks)
    for share, owner in zip(owned, assigned, strict=True):
        of_rank[owner].work += share.plan.work()
        of_rank[owner].state += share.state - COUNT.itemsize
        of_rank[owner].factors += share.factors
    total.work += max(one.work for one in of_rank)
    total.state += max(one.state for one in of_rank)
    total.factors += max(one.factors for one in of_rank)
    total.temporaries = kept + min(concurrent[0], max(concurrent[1], LAUNCH_BYTES))
    return total
