"""How many steps a run needs for a loss: a search with few runs, and an interpolation for each seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

UNIT = 6
"""Lengths of runs are multiples of this many steps."""
RATIO = 1.12
"""Two lengths are close enough to interpolate between them if the longer one is at most this times the shorter one."""
SLOPE = 0.3
"""Fall of the loss per factor e of the length, where two runs do not show it."""


def length_for(target: float, steps: float, loss: float, slope: float) -> float:
    """Returns the length of a run that would end with the target loss, at most a factor of two from ``steps``."""
    limit = math.log(2)
    return steps * math.exp(max(-limit, min(limit, (loss - target) / slope)))


def slope_between(points: Mapping[int, float]) -> float:
    """Returns the fall of the loss per factor e of the length, from two lengths and their losses."""
    (short, before), (long, after) = sorted(points.items())
    slope = (before - after) / math.log(long / short)
    return slope if slope > 0 else SLOPE


def search(start: int, loss_of: Callable[[int], float], target: float, longest: int) -> list[int]:
    """Finds how long a run must be to end with a loss.

    Args:
        start: The first length to try, in steps.
        loss_of: Makes a run of some length and returns its final loss.
        target: The loss to reach.
        longest: No longer run is made.

    Returns:
        Two lengths, of which only the longer one reaches the target; or ``longest`` alone, if it does not reach the
        target; or the shortest length alone, if it does.
    """
    losses: dict[int, float] = {}
    steps = start
    while True:
        losses[steps] = loss_of(steps)
        long = min((each for each, loss in losses.items() if loss <= target), default=math.inf)
        short = max((each for each in losses if each < long), default=0)
        if short == longest or long <= UNIT:
            return [steps]
        if long <= RATIO * short or long - short <= UNIT:
            return [short, int(long)]
        steps = min(longest, next_length(losses, target, short, long))


def next_length(losses: Mapping[int, float], target: float, short: int, long: float) -> int:
    """Returns a length between two others, slightly longer than the estimate, or shorter if that is too close."""
    nearest = sorted(losses, key=lambda steps: abs(losses[steps] - target))[:2]
    slope = slope_between({steps: losses[steps] for steps in nearest}) if len(nearest) == 2 else SLOPE
    estimate = length_for(target, nearest[0], losses[nearest[0]], slope)
    margin = RATIO**0.45
    wanted = estimate * margin if estimate * margin < long else estimate / margin
    return int(max(short + UNIT, min(long - UNIT, UNIT * round(wanted / UNIT))))


def steps_to(losses: Mapping[int, list[float]], target: float) -> list[float]:
    """Returns for each seed the length of a run that ends with the target, from runs of two lengths.

    Args:
        losses: Final losses of the seeds at each length. The seeds share a slope, which the noise of one could hide.
            A single length is returned as it is.
        target: The loss to reach.
    """
    if len(losses) == 1:
        return [float(steps) for steps in losses]
    slope = slope_between({steps: statistics.fmean(values) for steps, values in losses.items()})
    middle = math.sqrt(math.prod(losses))
    return [length_for(target, middle, statistics.fmean(pair), slope) for pair in zip(*losses.values(), strict=True)]
