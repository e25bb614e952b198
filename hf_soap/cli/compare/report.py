"""The output of ``hf-soap compare``: tables, compare.json and the loss curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hf_soap.cli.compare.corpus import Corpus
from hf_soap.cli.compare.results import EvalPoint, Json, machine, versions
from hf_soap.cli.compare.summary import EqualLoss, Row, Spread, by_label, equal_loss, summarize
from hf_soap.cli.compare.sweep import Case


def render(rows: Sequence[Row]) -> Table:
    """Lay out the comparison for the terminal.

    Args:
        rows: One per optimizer and number of steps.

    Returns:
        A table for ``rich``.
    """
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("optimizer", overflow="fold")
    first = [row for row in rows if row.optimizer == rows[0].optimizer]
    target = f"steps to\n{number(first[0].final_loss.mean, '.3f')}" if len(first) == 1 else "steps to\nfirst's"
    for header in ("lr", "steps", "eval\nloss", target, "wall\nseconds", "in opti-\nmizer", "state\nB/param"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.optimizer,
            f"{row.lr:g}\nat edge" if row.lr_edge else f"{row.lr:g}",
            f"{row.steps}",
            _two_lines(row.final_loss),
            number(row.steps_to_first, ".0f"),
            f"{row.seconds:.1f}",
            f"{row.optimizer_seconds / row.seconds:.0%}",
            f"{row.state_bytes_per_parameter:.1f}",
        )
    return table


def render_equal_loss(entries: Sequence[EqualLoss]) -> Table:
    """Lay out how long complete runs must be for equal loss, one row per optimizer.

    Args:
        entries: One for each optimizer and each horizon of the first.

    Returns:
        A table for ``rich``.
    """
    columns = {entry.horizon: entry.loss for entry in entries}
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, title=f"steps to the loss of {entries[0].optimizer} at", title_justify="left"
    )
    table.add_column("optimizer", overflow="fold")
    for horizon, loss in columns.items():
        table.add_column(f"{horizon}\n({loss:.3f})", justify="right", no_wrap=True)
    for label in dict.fromkeys(entry.optimizer for entry in entries):
        table.add_row(label, *(equal_loss_cell(entry) for entry in entries if entry.optimizer == label))
    return table


def equal_loss_cell(entry: EqualLoss) -> str:
    """Format a number of steps and its share of the first optimizer's, with the spread if there are several seeds."""
    by_seed = entry.percent_by_seed
    deviation = f" ± {by_seed.std:.0f}" if by_seed is not None and by_seed.std else ""
    return f"{entry.bound}{entry.steps:.0f}, {entry.bound}{entry.percent:.0f}{deviation} %"


def markdown(rows: Sequence[Row], equal: Sequence[EqualLoss]) -> str:
    """Write the comparison as Markdown, without times, which are specific to the machine and its load.

    Args:
        rows: One per optimizer and number of steps.
        equal: Steps to equal loss; may be empty.

    Returns:
        One table, or two.
    """
    lines = _markdown_head(
        "optimizer", "learning rate", "steps", "held-out loss", "others tried", "state bytes / parameter"
    )
    for row in rows:
        tried = ", ".join(f"{lr:g}: {number(loss, '.3f')}" for lr, loss in row.swept if lr != row.lr)
        rate = f"{row.lr:g}{f' ({row.lr_edge} tried)' if row.lr_edge else ''}"
        loss = spread(row.final_loss, ".3f")
        cells = (f"`{row.optimizer}`", rate, row.steps, loss, tried or "–", f"{row.state_bytes_per_parameter:.1f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if equal:
        horizons = {entry.horizon: entry.loss for entry in equal}
        heads = (f"{horizon} ({loss:.3f})" for horizon, loss in horizons.items())
        lines += ["", f"Steps to the loss of `{equal[0].optimizer}` at", ""]
        lines += _markdown_head("optimizer", *heads)
        for label in dict.fromkeys(entry.optimizer for entry in equal):
            shares = (equal_loss_cell(entry) for entry in equal if entry.optimizer == label)
            lines.append(f"| {' | '.join((f'`{label}`', *shares))} |")
    return "\n".join(lines) + "\n"


def _markdown_head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def as_json(cases: Sequence[Case], corpus: Corpus) -> Json:
    """Collect everything that is needed to repeat the runs or to draw them again.

    Args:
        cases: The runs.
        corpus: What they were trained on.

    Returns:
        Plain values.
    """
    rows = summarize(cases)
    runs = {id(run): run for case in cases for run in (*case.sweep, *case.runs)}
    return {
        "versions": versions(),
        "machine": machine(),
        "corpus": {
            "source": corpus.source,
            "sha256": corpus.digest,
            "vocab_size": len(corpus.tokenizer),
            "seq_len": corpus.train.shape[1],
            "train_blocks": len(corpus.train),
            "held_out_blocks": len(corpus.held_out),
        },
        "table": [asdict(row) for row in rows],
        "equal_loss": [asdict(entry) for entry in equal_loss(cases)] if has_horizons(cases) else [],
        "runs": [run.to_json() for run in runs.values()],
    }


def has_horizons(cases: Sequence[Case]) -> bool:
    """Whether each optimizer was run at several lengths."""
    return all(len(own) > 1 for own in by_label(cases).values())


def write_json(path: Path, cases: Sequence[Case], corpus: Corpus) -> None:
    """Write what :func:`as_json` collects.

    Args:
        path: The file.
        cases: The runs.
        corpus: What they were trained on.
    """
    path.write_text(json.dumps(as_json(cases, corpus), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def plot(path: Path, cases: Sequence[Case]) -> None:
    """Draw held-out loss over steps and over time: the mean over seeds, with a band from lowest to highest.

    Args:
        path: The PNG to write.
        cases: The runs.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    def steps(point: EvalPoint) -> float:
        return point.step

    def seconds(point: EvalPoint) -> float:
        return point.seconds

    axis_of: dict[str, Callable[[EvalPoint], float]] = {"step": steps, "seconds of training": seconds}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes: Any = figure.subplots(1, 2, sharey=True)
    colors = {label: f"C{number}" for number, label in enumerate(by_label(cases))}
    for (label, coordinate), panel in zip(axis_of.items(), axes, strict=True):
        for case in cases:
            x = [coordinate(point) for point in case.best.evals]
            mean, low, high = zip(*mean_curve(case), strict=True)
            color, own = colors[case.label], by_label(cases)[case.label]
            name = case.label if len(own) > 1 else f"{case.label}, lr {case.best.settings.lr:g}"
            panel.plot(x, mean, marker=".", color=color, label=name if case is own[0] else None)
            if len(case.runs) > 1:
                panel.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        panel.axhline(cases[0].mean_loss, color="grey", linewidth=0.8, linestyle="--")
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("loss on held-out text")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def mean_curve(case: Case) -> list[tuple[float, float, float]]:
    """Return mean, lowest and highest held-out loss of the seeds at each evaluation."""
    losses = [[point.loss for point in points] for points in zip(*(run.evals for run in case.runs), strict=True)]
    return [(sum(values) / len(values), min(values), max(values)) for values in losses]


def spread(values: Spread, form: str) -> str:
    """Format a mean, followed by deviation and range if there is more than one value."""
    if values.mean is None or not values.std:
        return number(values.mean, form)
    return f"{values.mean:{form}} ± {values.std:{form}} ({values.low:{form}}..{values.high:{form}})"


def _two_lines(values: Spread) -> str:
    if not values.std:
        return number(values.mean, ".4f")
    return f"{values.mean:.3f} ± {values.std:.3f}\n{values.low:.3f}..{values.high:.3f}"


def number(value: float | None, form: str) -> str:
    """Format a value; None becomes a dash."""
    return "-" if value is None else format(value, form)
