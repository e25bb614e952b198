"""What an optimizer takes of every rank: state, communication and work, from shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from hf_soap import owners
from hf_soap.blocks import Plan
from hf_soap.buckets import state_dtype
from hf_soap.stepping import BlockOptimizer

Mode = Literal["local", "owner", "ddp", "ddp, owner"]
"""``"local"`` and ``"owner"`` of parameters sharded along their first dimension, or whole parameters on every rank."""


@dataclass
class Cost:
    """What the rank with the most of it has to bear.

    Attributes:
        state: Bytes of optimizer state.
        sent: Bytes that it sends to other ranks in a step, averaged over refreshes and over ranks.
        work: Floating point operations of preconditioning in a step, refreshes at a frequency of 10 included.
    """

    state: float = 0.0
    sent: float = 0.0
    work: float = 0.0


def cost(optimizer: BlockOptimizer, *, ranks: int, mode: Mode) -> Cost:
    """Projects an optimizer on a number of ranks; parameters may be on the meta device.

    The scalar that says whether gradients are finite is not counted.

    Args:
        optimizer: Made for whole parameters.
        ranks: Number of ranks.
        mode: Where parameters and state lie.

    Returns:
        The cost of the rank that has the most.
    """
    total, loads = Cost(), []
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not param.requires_grad or not param.numel():
                continue
            whole = optimizer.plan(group, param.shape)
            octets = state_dtype(param).itemsize
            own = whole.rule.elementwise(whole.layout) and mode == "owner"
            if mode in ("owner", "ddp, owner") and not own and ranks > 1:
                loads.append((whole.layout.work(), _bytes(whole, octets)))
                # A gradient goes to its owner, a direction comes back, each but for the part that stays where it is.
                moved = param.numel() * octets * (ranks - 1) / ranks
                total.sent += 2 * moved / ranks if mode == "owner" else moved
                continue
            largest = (-(-param.shape[0] // ranks), *param.shape[1:]) if param.dim() else ()
            cut = mode in ("local", "owner") and ranks > 1
            plan = optimizer.plan(group, largest, sharded=True) if cut else whole
            total.state += _bytes(plan, octets)
            if mode == "ddp" and ranks > 1:
                squares = plan.layout.factor_numel() * 2 * octets  # the rotation and the factor in it, or the root
                total.sent += squares / group["precondition_frequency"] * (ranks - 1) / ranks
                total.work += plan.layout.work() - (1 - 1 / ranks) * plan.layout.work(refreshes_only=True)
            else:
                total.work += plan.layout.work()
    held = [[0.0, 0.0] for _ in range(ranks)]
    for (work, memory), owner in zip(loads, owners.assign(loads, ranks), strict=True):
        held[owner][0] += work
        held[owner][1] += memory
    total.work += max(work for work, _ in held)
    total.state += max(memory for _, memory in held)
    return total


def _bytes(plan: Plan, octets: int) -> float:
    dtype = torch.float64 if octets == 8 else torch.float32
    state = plan.allocate(1, dtype=dtype, device=torch.device("meta"))
    return sum(math.prod(value.shape) * value.element_size() for value in state.values()) + torch.float32.itemsize
