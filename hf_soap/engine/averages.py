"""Averages of the weights, beside the weights that are trained, and the exchange of both.

An average has the shape of this rank's part of its parameter, so that it needs no communication, even if another rank
preconditions the parameter. The optimizer's state has the averages and, while the parameters hold these, the raw
weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_soap.distributed import dtensor
from hf_soap.engine.bucketing import PlannedOptimizer
from hf_soap.engine.buckets import state_dtype
from hf_soap.rules.base import AT_AVERAGE, AVERAGE, AVERAGED, RAW_PARAM

logger = logging.getLogger(__name__)


def allocate(optimizer: PlannedOptimizer) -> None:
    """Makes the averages that the groups ask for, before the step of the parameters; existing ones stay."""
    for group in optimizer.param_groups:
        for param in group["params"] if group["average_horizon"] else ():
            if param.requires_grad and AVERAGE not in optimizer.state.get(param, {}):
                part = dtensor.local(param).detach()
                optimizer.state[param][AVERAGE] = part.to(state_dtype(param), copy=True)


def update(optimizer: PlannedOptimizer) -> None:
    """Adds the weights after a step to the averages of the groups whose start has passed.

    The average a of n weights w is their mean while n is at most the horizon h, and then an exponential moving
    average: a ← a + (w - a)/min(n, h).
    """
    for group in optimizer.param_groups:
        if group["average_horizon"] and (group.get(AVERAGED) or _steps(optimizer, group) > group["average_start"]):
            group[AVERAGED] = group.get(AVERAGED, 0) + 1
            share = 1 / min(group[AVERAGED], group["average_horizon"])
            for param, known in _averaged(optimizer, group):
                known[AVERAGE].lerp_(dtensor.local(param).to(known[AVERAGE]), share)


def exchange(optimizer: PlannedOptimizer, *, average: bool, warns: bool = True) -> None:
    """Puts the averages into the parameters and keeps the raw weights, or puts these back, bit for bit.

    Nothing happens where the parameters already hold what is asked for, or nothing has been averaged yet. A parameter
    that no longer holds its average has got other weights since: it keeps them, and its average goes on from there,
    with a warning unless state is about to be loaded.
    """
    changed = 0
    for group in optimizer.param_groups:
        if average and group["average_horizon"] and group.get(AVERAGED) and not group.get(AT_AVERAGE):
            group[AT_AVERAGE] = True
            for param, known in _averaged(optimizer, group):
                weight = dtensor.local(param)
                known[RAW_PARAM] = weight.clone()
                weight.copy_(known[AVERAGE])
        elif not average and group.get(AT_AVERAGE):
            group[AT_AVERAGE] = False
            changed += sum(_put_back(param, optimizer.state.get(param, {})) for param in group["params"])
    if changed and warns:
        logger.warning(
            "%d parameters were changed while they held their averages. They keep these weights, from which training "
            "and averaging go on.",
            changed,
        )


def _put_back(param: Tensor, known: dict[str, Any]) -> bool:
    """Puts the raw weights into a parameter, unless it was changed since it got its average; says whether it was."""
    weight, raw, kept = dtensor.local(param), known.pop(RAW_PARAM, None), known.get(AVERAGE)
    if raw is None:
        return False
    if kept is not None and not torch.equal(weight, kept.to(weight.dtype)):
        kept.copy_(weight)
        return True
    weight.copy_(raw)
    return False


def forget(optimizer: PlannedOptimizer) -> None:
    """Drops averages and raw weights; the parameters stay as they are, and averaging starts again from them."""
    for group in optimizer.param_groups:
        group.pop(AVERAGED, None)
        group.pop(AT_AVERAGE, None)
        for param in group["params"]:
            for role in (AVERAGE, RAW_PARAM):
                optimizer.state.get(param, {}).pop(role, None)


def bytes_of_average(settings: Mapping[str, Any], param: Tensor, part: Sequence[int]) -> int:
    """Returns the bytes of the average of a part of a parameter, of which the shape is given."""
    return math.prod(part) * state_dtype(param).itemsize if settings["average_horizon"] else 0


def _averaged(optimizer: PlannedOptimizer, group: Mapping[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yields the parameters of a group that have an average, and their state."""
    for param in group["params"]:
        known = optimizer.state.get(param, {})
        if AVERAGE in known:
            yield param, known


def _steps(optimizer: PlannedOptimizer, group: Mapping[str, Any]) -> float:
    """Returns how many steps a group has taken."""
    return max((float(optimizer.state.get(param, {}).get("step", 0)) for param in group["params"]), default=0.0)
