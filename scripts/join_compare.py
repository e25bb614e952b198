"""Joins runs of `hf-soap compare`, a sweep of learning rates say, into one Markdown table and one plot.

    for lr in 5e-3 1e-2 2e-2; do hf-soap compare soap --lr $lr --steps 300 --output-dir sweep/soap-$lr; done
    python scripts/join_compare.py sweep/*/compare.json --plot family.png

Of each optimizer the run with the lowest held-out loss stands in the table and the plot, with the other learning rates
and their losses behind it. Times are left out: runs made apart are not comparable in time.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

FREE = {"optimizer", "optim_args", "lr", "adam_beta2", "eval_every"}
"""Settings in which joined runs may differ."""


def read_runs(paths: list[Path]) -> list[dict[str, Any]]:
    """Reads the runs of several reports.

    Args:
        paths: Files that `hf-soap compare` wrote.

    Returns:
        One dictionary a run: settings, evals, loss, bytes of state per parameter.

    Raises:
        typer.BadParameter: If runs differ in data, model or length, so that their losses say nothing of each other.
    """
    runs = []
    for path in paths:
        report = json.loads(path.read_text())
        for run, row in zip(report["runs"], report["table"], strict=True):
            fixed = {key: value for key, value in run["settings"].items() if key not in FREE}
            problem = {**fixed, "data": report["corpus"]["sha256"]}
            loss = math.inf if row["final_loss"] is None else row["final_loss"]
            bytes_of_state = row["state_bytes_per_parameter"]
            runs.append({**run, "problem": problem, "loss": loss, "bytes": bytes_of_state, "path": path})
    for run in runs:
        if run["problem"] != runs[0]["problem"]:
            differ = [key for key, value in run["problem"].items() if value != runs[0]["problem"][key]]
            raise typer.BadParameter(f"{run['path']} differs in {', '.join(differ)} from the first; join it apart")
    return runs


def table(best: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """Returns a Markdown table: optimizer, best learning rate and loss, the others tried, bytes of state."""
    head = ["optimizer", "learning rate", "held-out loss", "others tried", "state bytes / parameter"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for run in best:
        name = run["settings"]["optimizer"]
        others = {setting(r): r for r in runs if r["settings"]["optimizer"] == name and setting(r) != setting(run)}
        tried = ", ".join(f"{key}: {other['loss']:.3f}" for key, other in sorted(others.items(), key=by_rate))
        lines.append(f"| `{name}` | {setting(run)} | {run['loss']:.3f} | {tried or '–'} | {run['bytes']:.1f} |")
    return "\n".join(lines)


def setting(run: dict[str, Any]) -> str:
    """Names what runs of one optimizer differ in: the learning rate and its options."""
    options = run["settings"]["optim_args"]
    return f"{run['settings']['lr']:g}{f' ({options})' if options else ''}"


def by_rate(item: tuple[str, dict[str, Any]]) -> tuple[float, str]:
    """Sorts settings by their learning rate."""
    return item[1]["settings"]["lr"], item[0]


def plot(path: Path, best: list[dict[str, Any]]) -> None:
    """Draws held-out loss over steps, one line an optimizer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for run in best:
        label = f"{run['settings']['optimizer']}, lr {setting(run)}"
        axes.plot([e["step"] for e in run["evals"]], [e["loss"] for e in run["evals"]], marker=".", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss on held-out text")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(
    reports: Annotated[list[Path], typer.Argument(help="compare.json files", exists=True)],
    plot_to: Annotated[Path | None, typer.Option("--plot", help="write a PNG there")] = None,
) -> None:
    """Print the table; write the plot if asked to."""
    runs = read_runs(reports)
    names = {run["settings"]["optimizer"] for run in runs}
    best = [min((r for r in runs if r["settings"]["optimizer"] == name), key=lambda r: r["loss"]) for name in names]
    best.sort(key=lambda run: run["loss"])
    typer.echo(table(best, runs))
    if plot_to is not None:
        plot(plot_to, best)


if __name__ == "__main__":
    typer.run(main)
