"""Measures the cost of diagnostics: each optimizer with a profiler, compared with the same one without.

python scripts/bench_metrics.py                      # gpt256, a log entry every 50 steps
python scripts/bench_metrics.py --only SOAP "MARS adamw" --steps 40

Both make each step on the same gradients, in alternating order. The overhead is the median additional time of a step
that is not logged and of a step that is, including reading the profiler, weighted by their numbers in `--log-every`
steps, relative to the mean step without a profiler.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from bench_step import SHAPES, Shape, optimizers, seconds
from rich.console import Console
from rich.table import Table

from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.engine.profiling import StepProfiler
from hf_soap.trainer.metrics import measurements

DUE_EVERY = 4
"""One in this many steps is measured here, so that few steps suffice to show its cost."""


def measure(
    make: Callable[[Any], torch.optim.Optimizer], shapes: list[Shape], *, steps: int, device: torch.device
) -> tuple[float, float, float] | None:
    """Times pairs of steps.

    Returns:
        Seconds of the mean step without a profiler, and the median seconds that a profiler adds to a step and to a
        logged step. None for an optimizer of another package.
    """
    generator = torch.Generator(device).manual_seed(0)
    params = [[torch.nn.Parameter(torch.ones(shape, device=device)) for shape in shapes] for _ in "ab"]
    plain, probed = (make(one) for one in params)
    if not isinstance(probed, BlockOptimizer):
        return None
    times: dict[str, list[float]] = {"plain": [], "on": [], "due": []}
    probed.profiler = profiler = StepProfiler()

    def step_and_read() -> None:
        probed.step()
        if profiler.due:
            measurements(probed)

    for step in range(-3, steps):
        for pair in zip(*params, strict=True):
            pair[0].grad = torch.randn(pair[0].shape, device=device, generator=generator)
            pair[1].grad = pair[0].grad.clone()
        profiler.due = step % DUE_EVERY == 0
        if step // DUE_EVERY % 2:  # not step % 2: the logged steps would always be first
            without, with_ = seconds(plain.step, device), seconds(step_and_read, device)
        else:
            with_, without = seconds(step_and_read, device), seconds(plain.step, device)
        if step >= 0:  # the first steps allocate the state and warm up
            times["plain"].append(without)
            times["due" if profiler.due else "on"].append(with_ - without)
    return statistics.mean(times["plain"]), statistics.median(times["on"]), statistics.median(times["due"])


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=[*SHAPES], default="gpt256")
    parser.add_argument("--frequency", type=int, default=10, help="steps between two refreshes")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", help="names of optimizers as bench_step.py prints them")
    args = parser.parse_args()
    table = Table(title=f"{args.shapes}, log_every={args.log_every}, torch {torch.__version__}")
    for heading in ("optimizer", "ms/step", "a step more, ms", "a logged step more, ms", "overhead"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for name, make in optimizers(args.frequency).items():
        if args.only and name not in args.only:
            continue
        found = measure(make, SHAPES[args.shapes], steps=args.steps, device=torch.device(args.device))
        if found is not None:
            mean, on, due = found
            overhead = (on * (args.log_every - 1) + due) / args.log_every / mean
            table.add_row(name, *(f"{value * 1e3:.2f}" for value in found), f"{overhead:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
