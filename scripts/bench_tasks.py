"""Counts how often optimizers solve the tasks of LightBench on which SOAP and AdamW differ, on a CPU.

python scripts/bench_tasks.py --out tasks                    # all tasks and optimizers
python scripts/bench_tasks.py --out tasks --only-report  # the table of the trials so far

It needs the packages lightbench and heavyball, which this package does not install.

Each task trains a small recurrent network to compute an exclusive or. Model, data, loss and goal are those of
LightBench. One sampler, the same for all optimizers, draws learning rate, β₁ and β₂ of each trial. A trial is won if
the loss of a batch reaches the goal within `--steps` steps. LightBench itself searches with 1000 trials of 100,000
steps on a GPU, so these counts cannot be compared with its own.

Every trial is added to OUT/trials.jsonl when it ends, and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_soap import SOAP, Muon

TASKS = {
    "xor_digit_rnn-easy": "xor_digit_rnn",
    "xor_spot_rnn-easy": "xor_spot_rnn",
    "xor_spot_rnn-medium": "xor_spot_rnn",
    "xor_sequence_rnn-extreme": "xor_sequence_rnn",
}

SPACE = {
    "lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
    "1-beta1": optuna.distributions.FloatDistribution(1e-2, 0.5, log=True),
    "1-beta2": optuna.distributions.FloatDistribution(1e-3, 0.3, log=True),
}


def heavyball_soap(params: list[nn.Parameter], *, lr: float, betas: tuple[float, float]) -> Any:
    """Makes heavyball's SOAP, without its compilation."""
    import heavyball

    heavyball.utils.compile_mode = None
    return heavyball.SOAP(params, lr=lr, betas=betas, shampoo_beta=betas[1], precondition_frequency=10)


def muon(params: list[nn.Parameter], *, lr: float, betas: tuple[float, float]) -> Muon:
    """Makes Muon, whose momentum is β₁ and whose vectors take AdamW with the same learning rate and betas."""
    return Muon(params, lr=lr, momentum=betas[0], betas_1d=betas)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.0),
    "SOAP": SOAP,
    "SOAP, refresh_growth=0": partial(SOAP, refresh_growth=0.0),
    "Muon": muon,
    "heavyball SOAP": heavyball_soap,
}


@dataclass(frozen=True)
class Task:
    """What LightBench passes to its own search."""

    model: nn.Module
    data: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    is_won: Callable[[nn.Module, float], tuple[bool, Any]]


@dataclass(frozen=True)
class Trial:
    """One training run: what was drawn, the step that reached the goal (None for none), and the lowest loss."""

    task: str
    optimizer: str
    number: int
    lr: float
    beta1: float
    beta2: float
    steps: int
    won_at: int | None
    lowest: float


class OnCpu(TorchFunctionMode):
    """Makes tensors on the CPU where a program asks for CUDA."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@contextmanager
def stays_on_cpu() -> Iterator[None]:
    """Lets LightBench's tasks, which are written for CUDA, run on a CPU."""
    original = nn.Module.cuda
    nn.Module.cuda = lambda self, *args: self  # type: ignore[method-assign]
    try:
        with OnCpu():
            yield
    finally:
        nn.Module.cuda = original  # type: ignore[method-assign]


def task(name: str) -> Task:
    """Returns a task as LightBench defines it."""
    module, found = import_module(f"lightbench.{TASKS[name]}"), []

    def take(model: nn.Module, data: Any, loss: Any, is_won: Any, *args: Any, **kwargs: Any) -> None:
        found.append(Task(model, data, loss, is_won))

    module.trial = take  # its search
    with stays_on_cpu():
        module.main(dtype="float32", config=name.partition("-")[2], opt="", steps=1, trials=1)
    return found[0]


def draws(count: int) -> list[dict[str, float]]:
    """Returns what the sampler draws for each trial, the same for all tasks and optimizers."""
    study = optuna.create_study(sampler=optuna.samplers.QMCSampler(seed=0))
    return [study.ask(SPACE).params for _ in range(count)]


def run(name: str, optimizer: str, number: int, drawn: dict[str, float], steps: int) -> Trial:
    """Makes one trial."""
    torch.manual_seed(number)
    found = task(name)
    betas = (1 - drawn["1-beta1"], 1 - drawn["1-beta2"])
    stepped = OPTIMIZERS[optimizer](list(found.model.parameters()), lr=drawn["lr"], betas=betas)
    lowest, won_at = math.inf, None
    for step in range(1, steps + 1):
        with stays_on_cpu():
            inputs, targets = found.data()
        loss = found.loss(found.model(inputs), targets)
        value = loss.item()
        if not math.isfinite(value):
            break
        lowest = min(lowest, value)
        if found.is_won(found.model, value)[0]:
            won_at = step
            break
        loss.backward()
        stepped.step()
        stepped.zero_grad()
    return Trial(name, optimizer, number, drawn["lr"], *betas, steps, won_at, lowest)


def read(file: Path) -> list[Trial]:
    """Returns the finished trials."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [Trial(**json.loads(line)) for line in lines]


def report(trials: list[Trial]) -> str:
    """Returns a Markdown table: trials won of those made, and the fewest steps."""
    tasks, names = ([*dict.fromkeys(getattr(trial, key) for trial in trials)] for key in ("task", "optimizer"))
    lines = [f"| optimizer | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for name in names:
        cells = []
        for each in tasks:
            own = [trial for trial in trials if (trial.task, trial.optimizer) == (each, name)]
            won = [trial.won_at for trial in own if trial.won_at is not None]
            cells.append(f"{len(won)} of {len(own)}" + (f", {min(won)} steps" if won else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Makes the missing trials and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tasks"), help="folder of the trials")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--trials", type=int, default=12, help="draws for each task and optimizer")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only-report", action="store_true", help="only print the table")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "trials.jsonl"
    done = {(each.task, each.optimizer, each.number, each.steps) for each in read(file)}
    for number, drawn in enumerate([] if args.only_report else draws(args.trials)):
        for name in args.tasks:
            for optimizer in args.optimizers:
                if (name, optimizer, number, args.steps) not in done:
                    trial = run(name, optimizer, number, drawn, args.steps)
                    with file.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(asdict(trial)) + "\n")
    print(f"lightbench {version('lightbench')}, heavyball {version('heavyball')}, torch {torch.__version__}")
    print(report(read(file)))


if __name__ == "__main__":
    main()
