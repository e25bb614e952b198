"""Diagnostics of an optimizer, as numbers for a log."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from hf_soap.distributed import dtensor
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.engine.plan import Plan
from hf_soap.engine.profiling import Sums
from hf_soap.linalg import eigenbases
from hf_soap.rules.storage import decoded

COLUMNS = (
    *("update", "weight", "entries", "rotation", "rotations", "root_change", "roots", "refresh"),
    *("off_diagonal", "factors", "seeded", "tensors"),
)
"""Measurements of each rule, as sums that can be added over ranks."""


@torch.no_grad()
def diagnostics(optimizer: BlockOptimizer) -> dict[str, float]:
    """Returns the diagnostics that this rank's state gives without a profiler.

    Args:
        optimizer: Any optimizer of this package.

    Returns:
        ``factor_off_diagonal``: mean of ‖L̂ - diag L̂‖_F / ‖L̂‖_F over the factors of SOAP, which is 0 if the bases
        diagonalize the factors exactly. ``seeded_share``: share of the tensors with state that have had a non-zero
        gradient. ``skipped_steps``: steps skipped because of a non-finite gradient. ``failed_refreshes``:
        decompositions that failed, after which the previous basis or root stayed in use. All names have the prefix
        ``optimizer/``.
    """
    failed = optimizer.failed_refreshes  # first: it waits for refreshes in progress
    return _overall(_state_sums(optimizer, plans_of(optimizer)).values(), optimizer, failed)


@torch.no_grad()
def measurements(optimizer: BlockOptimizer) -> dict[str, float]:
    """Returns the diagnostics from an optimizer's profiler and state, and resets the profiler.

    The ranks add up their measurements, so all of them must call this. State that several ranks hold is counted once
    for each.

    Args:
        optimizer: An optimizer with a profiler.

    Returns:
        The diagnostics of :func:`diagnostics`, ``optimizer/step_ms``, and for each rule its measurements as
        ``optimizer/MEASUREMENT/RULE``. Anything that was not measured is omitted.
    """
    if optimizer.profiler is None:
        raise ValueError(
            "got an optimizer without a profiler, wanted one with; set optimizer.profiler = StepProfiler()"
        )
    plans = plans_of(optimizer)
    failed_here = optimizer.failed_refreshes  # first: it waits for refreshes in progress
    timing, measured = optimizer.profiler.take()
    of_state = _state_sums(optimizer, plans)
    # All ranks add up the same columns, even if a rank has no part of any tensor of a rule.
    labels = sorted({plan.label for plan in plans.values()})
    numbers = [timing["steps"], timing["step"], failed_here]
    for label in labels:
        sums = {**measured.get(label, {}), **of_state[label]}
        numbers += [sums.get(column, 0.0) for column in COLUMNS]
    steps, seconds, failed, *rest = dtensor.summed(numbers, next(iter(plans))) if plans else numbers
    table: dict[str, Sums] = {}
    for number, label in enumerate(labels):
        row = rest[number * len(COLUMNS) : (number + 1) * len(COLUMNS)]
        table[label] = dict(zip(COLUMNS, row, strict=True))
    found = _overall(table.values(), optimizer, failed)
    if steps:
        found["optimizer/step_ms"] = seconds / steps * 1e3
    for label, sums in table.items():
        values = _of_rule(sums, steps, seconds)
        found |= {f"optimizer/{what}/{slug(label)}": value for what, value in values.items()}
    return found


def slug(label: str) -> str:
    """Returns a rule's description in the form for names: ``SOAP, 2 sides`` becomes ``soap_2_sides``."""
    return re.sub(r"\W+", "_", label.lower())


def plans_of(optimizer: BlockOptimizer) -> dict[Tensor, Plan]:
    """Returns what is done with each trainable parameter."""
    return {
        member.param: optimizer.plan_of(member.settings, member.param)
        for member in optimizer.members()
        if member.param.requires_grad and member.param.numel()
    }


def _state_sums(optimizer: BlockOptimizer, plans: dict[Tensor, Plan]) -> defaultdict[str, Sums]:
    sums: defaultdict[str, Sums] = defaultdict(lambda: dict.fromkeys(COLUMNS[-4:], 0.0))
    shares: defaultdict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = defaultdict(list)
    for param, plan in plans.items():
        state, label = optimizer.state.get(param, {}), plan.label
        if "step" not in state:
            continue
        seeded = bool(state["step"] > 0)
        sums[label]["tensors"] += 1
        sums[label]["seeded"] += seeded
        # A factor that is not kept in its own basis need not be diagonal.
        specs = plan.state_spec
        own = {role: state[role] for role, spec in specs.items() if spec.in_own_basis and seeded and role in state}
        for factor in decoded(own, specs, torch.float32).values():
            share = eigenbases.off_diagonal_share(factor)
            shares[share.device, share.dtype].append((label, share))
    for pairs in shares.values():
        numbers = iter(torch.cat([share for _, share in pairs]).tolist())  # one host synchronization
        for label, share in pairs:
            sums[label]["off_diagonal"] += sum(itertools.islice(numbers, len(share)))
            sums[label]["factors"] += len(share)
    return sums


def _overall(rules: Iterable[Sums], optimizer: BlockOptimizer, failed: float) -> dict[str, float]:
    total = dict.fromkeys(COLUMNS[-4:], 0.0)
    for sums, column in itertools.product(rules, total):
        total[column] += sums[column]
    found = {
        "optimizer/skipped_steps": float(optimizer.skipped_steps),
        "optimizer/failed_refreshes": float(failed),
    }
    if total["factors"]:
        found["optimizer/factor_off_diagonal"] = total["off_diagonal"] / total["factors"]
    if total["tensors"]:
        found["optimizer/seeded_share"] = total["seeded"] / total["tensors"]
    return found


def _of_rule(sums: Sums, steps: float, seconds: float) -> dict[str, float]:
    found = {}
    if sums["entries"]:
        found["update_rms"] = math.sqrt(sums["update"] / sums["entries"])
    if sums["weight"]:
        found["update_ratio"] = math.sqrt(sums["update"] / sums["weight"])
    if sums["factors"]:
        found["factor_off_diagonal"] = sums["off_diagonal"] / sums["factors"]
    if sums["rotations"]:
        found["rotation_degrees"] = math.degrees(sums["rotation"] / sums["rotations"])
    if sums["roots"]:
        found["root_change"] = sums["root_change"] / sums["roots"]
    if sums["refresh"]:
        found["refresh_ms"] = sums["refresh"] / steps * 1e3
        found["refresh_share"] = sums["refresh"] / seconds
    return found
