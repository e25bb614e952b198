"""Summaries of the runs of ``hf-soap compare``: rows of the table, spreads over seeds, steps to equal loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hf_soap.cli.compare.results import finite
from hf_soap.cli.compare.sweep import Case

Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation, smallest and largest of one value per seed; None where one is not finite."""

    mean: float | None
    std: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of the values."""
        if not all(map(math.isfinite, values)):
            return cls(None, None, None, None)
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), std, min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One line of the table: one optimizer at one number of steps.

    Attributes:
        optimizer: Its name, with its options.
        lr: Peak learning rate, the best of those tried.
        lr_edge: The edge of the sweep at which it is; None if it is not at an edge, or without a sweep.
        swept: Learning rates tried and the losses of the first seed.
        steps: Steps trained.
        seeds: The seeds.
        final_loss: Loss on the held-out text at the end.
        steps_to_first: Steps until the loss with which the first optimizer ended; None if it was not reached.
        seconds: Time of the training steps of the first seed.
        optimizer_seconds: The part of that time spent in ``optimizer.step``.
        state_bytes_per_parameter: Optimizer state, per trained parameter.
        checkpoint: Folder of the final checkpoint of the first seed.
    """

    optimizer: str
    lr: float
    lr_edge: str | None
    swept: list[tuple[float, float | None]]
    steps: int
    seeds: list[int]
    final_loss: Spread
    steps_to_first: float | None
    seconds: float
    optimizer_seconds: float
    state_bytes_per_parameter: float
    checkpoint: str


@dataclass(frozen=True)
class EqualLoss:
    """How many steps one optimizer needs for the loss that the first one has at a horizon.

    Attributes:
        optimizer: Its name, with its options.
        horizon: Steps of the first optimizer.
        loss: Its final loss, averaged over seeds.
        steps: Length of the run that ends with the same loss.
        bound: Empty if ``steps`` is exact; "<" or ">" if the true number is smaller or larger than all horizons.
        percent: ``steps`` as a percentage of ``horizon``.
        percent_by_seed: The same for each seed separately, if all are within the horizons.
    """

    optimizer: str
    horizon: int
    loss: float
    steps: float
    bound: Literal["", "<", ">"]
    percent: float
    percent_by_seed: Spread | None


def summarize(cases: Sequence[Case]) -> list[Row]:
    """Summarize runs as the numbers that are compared.

    Args:
        cases: The runs; those of the first optimizer come first, and set the losses for the others to reach.

    Returns:
        One row per case, in the same order.
    """
    first = [case for case in cases if case.label == cases[0].label]
    place: dict[str, int] = {}
    rows = []
    for case in cases:
        place[case.label] = place.get(case.label, -1) + 1
        target = first[place[case.label]]
        rows.append(_row(case, target.best.final_loss))
    return rows


def _row(case: Case, target: float) -> Row:
    best = case.best
    return Row(
        optimizer=case.label,
        lr=best.settings.lr,
        lr_edge=case.edge,
        swept=[(run.settings.lr, finite(run.final_loss)) for run in case.sweep],
        steps=case.steps,
        seeds=[run.settings.seed for run in case.runs],
        final_loss=Spread.of([run.final_loss for run in case.runs]),
        steps_to_first=best.steps_to(target),
        seconds=best.seconds,
        optimizer_seconds=best.optimizer_seconds,
        state_bytes_per_parameter=best.state_bytes / best.parameters,
        checkpoint=str(best.checkpoint),
    )


def equal_loss(cases: Sequence[Case]) -> list[EqualLoss]:
    """Compare complete runs: how long must a run be to end with the loss of the first optimizer?

    Args:
        cases: Each optimizer at the same horizons, those of the first one first.

    Returns:
        One entry per horizon and optimizer; horizons at which the first one diverged are omitted.
    """
    grouped = by_label(cases)
    reference, *_ = grouped.values()
    return [
        _equal_loss(own, reference, place)
        for place, target in enumerate(reference)
        if math.isfinite(target.mean_loss)
        for own in grouped.values()
    ]


def _equal_loss(own: Sequence[Case], reference: Sequence[Case], place: int) -> EqualLoss:
    horizon, loss = reference[place].steps, reference[place].mean_loss
    steps, bound = crossing([(case.steps, case.mean_loss) for case in own], loss)
    targets = [run.final_loss for run in reference[place].runs]
    by_seed = [
        crossing([(case.steps, case.runs[seed].final_loss) for case in own], target)
        for seed, target in enumerate(targets)
    ]
    inside = not any(seed_bound for _, seed_bound in by_seed)
    return EqualLoss(
        optimizer=own[0].label,
        horizon=horizon,
        loss=loss,
        steps=steps,
        bound=bound,
        percent=100 * steps / horizon,
        percent_by_seed=Spread.of([100 * own_steps / horizon for own_steps, _ in by_seed]) if inside else None,
    )


def crossing(curve: Curve, loss: float) -> tuple[float, Literal["", "<", ">"]]:
    """Find the length of a run that ends with a loss, from runs of some lengths.

    Args:
        curve: Lengths in rising order, and the losses at the end.
        loss: The loss to reach.

    Returns:
        The length at which the loss, interpolated linearly over the logarithm of the length, first reaches the target,
        and an empty string. If that is not between two lengths, the shortest and "<", or the longest and ">".
    """
    reached = next((i for i, (_, value) in enumerate(curve) if value <= loss), None)
    if reached is None:
        return curve[-1][0], ">"
    if reached == 0:
        return curve[0][0], "" if curve[0][1] == loss else "<"
    (short, before), (long, after) = curve[reached - 1], curve[reached]
    if math.isinf(before):  # that run diverged, so there is nothing to interpolate
        return long, "<" if after < loss else ""
    return short * (long / short) ** ((before - loss) / (before - after)), ""


def by_label(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Group cases by optimizer, in their order."""
    grouped: dict[str, list[Case]] = {}
    for case in cases:
        grouped.setdefault(case.label, []).append(case)
    return grouped
