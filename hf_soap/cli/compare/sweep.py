"""The runs of one optimizer in ``hf-soap compare``: learning rates, then seeds at the best of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hf_soap.cli.compare.results import RunResult, RunSettings

MAX_WIDER = 4
"""Learning rates that a sweep may try in addition to the requested ones."""

Train = Callable[[RunSettings], RunResult]


@dataclass(frozen=True)
class Case:
    """One optimizer at one number of steps.

    Attributes:
        sweep: The runs of the first seed, in order of learning rate.
        runs: The run of the sweep with the lowest loss, then the runs of the other seeds at its learning rate.
    """

    sweep: list[RunResult]
    runs: list[RunResult]

    @property
    def best(self) -> RunResult:
        """The best run of the sweep."""
        return self.runs[0]

    @property
    def label(self) -> str:
        """The optimizer and its options."""
        return self.best.settings.label

    @property
    def steps(self) -> int:
        """Training steps of each run."""
        return self.best.settings.steps

    @property
    def mean_loss(self) -> float:
        """Held-out loss at the end, averaged over seeds."""
        return sum(run.final_loss for run in self.runs) / len(self.runs)

    @property
    def edge(self) -> Literal["smallest", "largest"] | None:
        """The edge of the sweep at which the best learning rate is; a better one may lie beyond."""
        if len(self.sweep) == 1:
            return None
        if self.best is self.sweep[0]:
            return "smallest"
        return "largest" if self.best is self.sweep[-1] else None


def run_case(base: RunSettings, train: Train, *, rates: int, widen: bool, seeds: Sequence[int]) -> Case:
    """Make all runs of one optimizer at one number of steps.

    Args:
        base: Their common settings; its learning rate is the middle of the sweep.
        train: Makes one run.
        rates: Number of learning rates to try, each twice the previous one.
        widen: Whether to extend the sweep while the best is at its edge, by at most ``MAX_WIDER``.
        seeds: The first one chooses the learning rate.

    Returns:
        The runs.
    """
    tried = {
        lr: train(replace(base, lr=lr, seed=seeds[0]))
        for lr in (base.lr * 2.0**power for power in range(-(rates // 2), rates - rates // 2))
    }
    while True:
        sweep = [tried[lr] for lr in sorted(tried)]
        best = min(sweep, key=lambda run: run.final_loss)
        case = Case(sweep, [best])
        if not widen or case.edge is None or len(tried) == rates + MAX_WIDER:
            break
        lr = best.settings.lr * (2 if case.edge == "largest" else 0.5)
        tried[lr] = train(replace(base, lr=lr, seed=seeds[0]))
    return Case(sweep, [best, *(train(replace(best.settings, seed=seed)) for seed in seeds[1:])])
