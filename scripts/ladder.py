"""Measures by how much each addition to SOAP shortens training: how many steps are needed for AdamW's loss.

python scripts/ladder.py --out ladder                    # the rungs of the presets
python scripts/ladder.py --out ladder --time             # milliseconds per step, on an otherwise idle machine
python scripts/ladder.py --out ladder --only-report      # the table of the runs so far
python scripts/ladder.py --out ladder4 --layers 4 --rungs "SOAP, official" "+ KL" --workers 2

A small GPT-2 learns the bytes of Python's standard library, in batches of 64 × 64, with the real Trainer. AdamW trains
for --steps at the best learning rate of a sweep in factors of two. Its held-out loss, the mean over seeds, is the
target. Every other rung is swept at a first guess of its length. Then the first seed looks for two lengths, at most
12 % apart, of which the longer run reaches the target. Each run has a complete schedule. All seeds make runs of both
lengths, and each seed's number of steps is interpolated over the logarithm of the length.

Every finished run is added to OUT/runs.jsonl, with the commit that made it. Runs are not repeated, even with other
code: after a change of an optimizer's results, use another folder. Times are in OUT/times.jsonl; delete it to measure
them again. The results are in OUT/ladder.json and OUT/ladder.md, and
`python scripts/update_readme.py --ladder OUT/ladder.json` writes the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _ladder_runs import MissingRun, Runs, text
from _ladder_search import UNIT, search, steps_to
from _ladder_table import ladder_table

import hf_soap
from hf_soap.cli.compare.contenders import DEFAULT_BETA2
from hf_soap.cli.compare.results import RunLog, RunSettings, finite, machine, versions
from hf_soap.cli.compare.summary import Spread
from hf_soap.cli.compare.sweep import run_case
from hf_soap.cli.compare.training import check_settings
from hf_soap.linalg import processor


@dataclass(frozen=True)
class Rung:
    """An optimizer, the middle of its sweep, and a guess of the steps that it needs, as a fraction of AdamW's.

    ``betas`` are those of the Trainer's arguments; None takes the published ones of ours, and 0.9 and 0.95 for AdamW.
    """

    optimizer: str
    optim_args: str = ""
    lr: float = 2e-2
    guess: float = 0.5
    betas: tuple[float, float] | None = None


def others_at(**settings: Any) -> str:
    """Returns options that give embeddings, head and vectors settings of their own, such as a learning rate."""
    return f"modules={json.dumps(dict.fromkeys(('@embeddings', '@head', '@vectors'), settings))}"


ADAMW_AT_2E_2 = others_at(rule="adam", beta1=0.9, beta2=0.95, lr=2e-2)
"""As in ``frontier``, but the learning rate of a sweep is that of matrices alone, since its meaning is another."""

OTHERS_AT_1E_2 = others_at(lr=1e-2)

RUNGS = {
    "AdamW": Rung("adamw_torch_fused", lr=1e-2, guess=1),
    "SOAP, official": Rung("soap", "preset=official"),
    "+ β₁ and β₂ 0.9": Rung("soap", "refresh_growth=0,beta1=0.9,beta2=0.9", guess=0.42),
    "+ early refreshes": Rung("soap", "beta1=0.9,beta2=0.9", guess=0.4),
    "with f = 1": Rung("soap", "precondition_frequency=1,beta1=0.9,beta2=0.9", guess=0.4),
    "+ AdamW for embeddings and vectors": Rung("soap", "preset=frontier,kl=false", guess=0.37),
    "+ KL": Rung("soap", "preset=frontier", guess=0.36),
    "+ small state": Rung("soap", "preset=small", guess=0.37),
    "frontier, cautious decay": Rung("soap", "preset=frontier,cautious_weight_decay=true", guess=0.36),
    "frontier, averages of 24 steps": Rung("soap", "preset=frontier,average_horizon=24", guess=0.36),
    "frontier, V rotated": Rung("soap", "preset=frontier,rotate_second_moment=true", guess=0.36),
    "frontier, hyperball": Rung("soap", f"preset=frontier,norm=hyperball,{ADAMW_AT_2E_2}", lr=8e-2, guess=0.42),
    "frontier, relative steps": Rung("soap", f"preset=frontier,norm=relative,{ADAMW_AT_2E_2}", lr=8e-2, guess=0.42),
    "SOAP, then Newton–Schulz": Rung("soap_muon", "lr_1d=2e-2", lr=8e-2, guess=0.5),
    "Muon": Rung("muon", "lr_1d=2e-2", lr=4e-2, guess=0.5),
    "official, hyperball": Rung("soap", f"preset=official,norm=hyperball,{OTHERS_AT_1E_2}", lr=8e-2),
    "official, relative steps": Rung("soap", f"preset=official,norm=relative,{OTHERS_AT_1E_2}", lr=8e-2),
    "official, cautious decay": Rung("soap", "preset=official,cautious_weight_decay=true", lr=1e-2),
    "official, averages of 24 steps": Rung("soap", "preset=official,average_horizon=24", lr=1e-2),
    "official, V rotated": Rung("soap", "preset=official,rotate_second_moment=true", lr=1e-2),
    "AdamW, β₁ 0.8 and β₂ 0.9": Rung("adamw_torch_fused", lr=5e-3, guess=1, betas=(0.8, 0.9)),
    "Muon, momentum 0.9": Rung("muon", "momentum=0.9,lr_1d=2e-2", lr=4e-2, guess=0.45),
}
"""AdamW, then SOAP with one more addition in each row, then single changes to the last but one and to other rows."""

LADDER = list(RUNGS)[:8]
"""The additions that are kept; the others are compared with them on request."""

TIMED_ROUNDS = 3

Json = dict[str, Any]


def settings_of(rung: Rung, base: RunSettings) -> RunSettings:
    """Returns the settings of a rung's first run."""
    steps = max(UNIT, UNIT * round(rung.guess * base.steps / UNIT))
    beta1, beta2 = rung.betas or (0.9, DEFAULT_BETA2.get(rung.optimizer, 0.999))
    own = replace(base, optimizer=rung.optimizer, optim_args=rung.optim_args, lr=rung.lr)
    return with_steps(replace(own, adam_beta1=beta1, adam_beta2=beta2), steps)


def with_steps(settings: RunSettings, steps: int) -> RunSettings:
    """Returns the settings of a run of another length."""
    return replace(settings, steps=steps, eval_every=max(1, steps // UNIT))


def spread(values: list[float]) -> Json:
    """Returns mean, deviation and range over the seeds, and the values."""
    return asdict(Spread.of(values)) | {"by_seed": [finite(value) for value in values]}


def climb(
    first: RunSettings, runs: Runs, *, seeds: int, at: int, longest: int, target: Callable[[], float] | None
) -> Json:
    """Measures one rung, as far as its runs are there or can be made.

    Args:
        first: Settings of the middle of the sweep.
        runs: Makes the runs.
        seeds: Number of seeds.
        at: Length at which the losses of the rungs are compared; 0 skips this.
        longest: AdamW's length.
        target: Returns the loss to reach; None if this rung is AdamW, which sets it.
    """
    found: Json = {"optimizer": first.optimizer, "optim_args": first.optim_args}
    with suppress(MissingRun):
        for lr in (first.lr, first.lr / 2, first.lr * 2):
            runs.start(replace(first, lr=lr))
        case = run_case(first, runs, rates=3, widen=True, seeds=[first.seed])
        best = case.best.settings
        found |= {"lr": best.lr, "edge": case.edge}
        found["swept"] = [(run.settings.lr, finite(run.final_loss)) for run in case.sweep]

        def losses(*lengths: int) -> dict[int, list[float]]:
            each_seed = [replace(best, seed=seed) for seed in range(seeds)]
            started = {steps: [runs.start(with_steps(own, steps)) for own in each_seed] for steps in lengths}
            return {steps: [future.result().final_loss for future in futures] for steps, futures in started.items()}

        if at:
            found["loss_at"] = spread(losses(at)[at])
        if target is None:
            found["losses"] = losses(longest)
            goal = found["target"] = statistics.fmean(found["losses"][longest])
        else:
            goal = target()
            lengths = search(first.steps, lambda steps: runs(with_steps(best, steps)).final_loss, goal, longest)
            found["losses"] = losses(*lengths)
            found["reached"] = lengths != [longest]
        by_seed = steps_to(found["losses"], goal)
        found |= {"steps": spread(by_seed), "percent": spread([100 * steps / longest for steps in by_seed])}
    return found


def ladder(rungs: Mapping[str, Rung], base: RunSettings, runs: Runs, *, workers: int = 1, **options: int) -> Json:
    """Measures all rungs, as many at a time as there are workers, and returns the results by name."""
    with ThreadPoolExecutor(workers) as pool:
        climbs: dict[str, Future[Json]] = {}

        def target() -> float:
            found = climbs["AdamW"].result()
            if "target" not in found:
                raise MissingRun
            goal: float = found["target"]
            return goal

        for name, rung in rungs.items():
            goal = None if name == "AdamW" else target
            climbs[name] = pool.submit(
                climb, settings_of(rung, base), runs, target=goal, longest=base.steps, **options
            )
    return {name: each.result() for name, each in climbs.items()}


def costs(first: RunSettings, log: RunLog) -> Json:
    """Returns what a rung's runs have cost: how many there are, and their medians.

    Args:
        first: Settings of one of them; learning rate, steps and seed do not matter.
        log: The runs.

    Returns:
        ``runs``; and if there are any, ``ms`` and ``optimizer_ms`` per step, and ``state_bytes`` per parameter.
    """
    own = []
    for run, _ in log:
        ran = run.settings
        if ran == replace(first, lr=ran.lr, steps=ran.steps, eval_every=ran.eval_every, seed=ran.seed):
            own.append(run)
    if not own:
        return {"runs": 0}
    return {
        "runs": len(own),
        "ms": statistics.median(1000 * run.seconds / run.settings.steps for run in own),
        "optimizer_ms": statistics.median(1000 * run.optimizer_seconds / run.settings.steps for run in own),
        "state_bytes": own[0].state_bytes / own[0].parameters,
    }


def commit() -> str:
    """Returns the commit of this checkout, marked if files differ from it; empty without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, check=False, text=True
    ).stdout.strip()


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("ladder"), help="folder of the runs and results")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=LADDER, help="AdamW is always one of them")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=600, help="AdamW's; a multiple of 6")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at", type=int, default=240, help="steps at which all losses are compared; 0 for none")
    parser.add_argument("--data", type=Path, help="a text file or a folder of them, instead of the standard library")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; several have one thread each")
    parser.add_argument("--time", action="store_true", help="only measure the time of a step")
    parser.add_argument("--only-report", action="store_true", help="only write the table")
    args = parser.parse_args()
    if args.steps < UNIT or args.steps % UNIT:
        parser.error(f"--steps must be a multiple of {UNIT}, got {args.steps}; use {UNIT * (args.steps // UNIT + 1)}")
    return args


def main() -> None:
    """Makes the missing runs and writes the results."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # workers end with this process, and a repeated command goes on
    args = parse()
    corpus = text(args.data)
    base = RunSettings(
        optimizer="", optim_args="", lr=0, adam_beta2=0, steps=args.steps, batch_size=64, model="", lora_r=0,
        layers=args.layers, width=args.width, heads=4, schedule="cosine", warmup=0.1, weight_decay=0.01,
        max_grad_norm=1.0, eval_every=1, seed=0,
    )  # fmt: skip
    rungs = {name: RUNGS[name] for name in ("AdamW", *args.rungs)}
    for rung in rungs.values():
        check_settings(settings_of(rung, base), corpus)
    workers = 1 if args.time else args.workers
    threads = 1 if workers > 1 else torch.get_num_threads()
    conditions = {"data": corpus.digest, "hf_soap": hf_soap.__version__, **versions()}
    notes = {**machine(), "commit": commit(), "processor": processor.name(torch.device("cpu")), "threads": threads}
    log, times = (RunLog(args.out / name, conditions, notes) for name in ("runs.jsonl", "times.jsonl"))
    options = {"seeds": args.seeds, "at": args.at}
    if not args.only_report:
        runs = Runs(times if args.time else log, args.data, workers, threads)
        if args.time:
            for seed, rung in itertools.product(range(TIMED_ROUNDS), rungs.values()):
                runs(replace(settings_of(rung, base), seed=seed))  # whole runs: early steps take longer
        else:
            ladder(rungs, base, runs, workers=workers, **options)
        runs.close()
    found = ladder(rungs, base, Runs(log, args.data), **options)
    for name, rung in rungs.items():
        first = settings_of(rung, base)
        found[name] |= {"cost": costs(first, log), "time": costs(first, times)}
    report = {
        **{name: getattr(args, name) for name in ("layers", "width", "steps", "seeds", "at")},
        "text": corpus.source,
        "versions": versions(),
        "made_with": [json.loads(each) for each in dict.fromkeys(json.dumps(notes) for _, notes in log)],
        "target": found["AdamW"].get("target"),
        "rungs": found,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "ladder.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = ladder_table(report)
    (args.out / "ladder.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
