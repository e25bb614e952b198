"""Makes the runs of ``hf-soap compare``: each only once, with a log and a display of progress."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hf_soap.cli.compare.corpus import Corpus
from hf_soap.cli.compare.results import RunLog, RunResult, RunSettings, present_conditions
from hf_soap.cli.compare.sweep import Case, run_case
from hf_soap.cli.compare.training import train_once


def run_cases(
    bases: Sequence[RunSettings],
    corpus: Corpus,
    output_dir: Path,
    console: Console,
    *,
    rates: int,
    widen: bool,
    seeds: Sequence[int],
) -> list[Case]:
    """Make all runs of a comparison, or read those that an earlier call made.

    Args:
        bases: The settings, one for each optimizer and number of steps.
        corpus: Text to train and to evaluate on.
        output_dir: Folder for ``runs.jsonl`` and, for each case, the checkpoint of its best run.
        console: Console for the progress.
        rates: Number of learning rates to try; see :func:`run_case`.
        widen: Whether to extend a sweep beyond its edge.
        seeds: The seeds.

    Returns:
        One case per base.
    """
    log = RunLog(output_dir / "runs.jsonl", present_conditions(corpus.digest, bases[0].model))
    if len(log):
        console.print(f"{log.path} has runs of this code on this text: {len(log)}. They are not repeated.")
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    cases = []
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:

        def train(settings: RunSettings) -> RunResult:
            if (done := log.get(settings)) is not None:
                return done
            name = f"{settings.label}, lr {settings.lr:g}, seed {settings.seed}"
            task = progress.add_task(name, total=settings.steps)
            folder = run_folder(output_dir, settings)
            result = train_once(settings, corpus, folder, lambda step: progress.update(task, completed=step))
            log.add(result)
            return result

        for base in bases:
            case = run_case(base, train, rates=rates, widen=widen, seeds=seeds)
            keep_best_checkpoint(case)
            cases.append(case)
    return cases


def run_folder(output_dir: Path, settings: RunSettings) -> Path:
    """Return the folder of one run, named by the settings in which the runs of a command differ."""
    label = re.sub(r"[^\w.=-]+", "_", settings.label)
    return output_dir / label / f"{settings.steps}-steps-lr-{settings.lr:g}-seed-{settings.seed}"


def keep_best_checkpoint(case: Case) -> None:
    """Delete the checkpoints of runs that are not shown; those of a sweep would fill the disk."""
    for run in (*case.sweep, *case.runs):
        if run is not case.best:
            shutil.rmtree(run.checkpoint.parent, ignore_errors=True)
