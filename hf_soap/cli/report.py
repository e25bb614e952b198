"""What ``hf-soap compare`` shows and writes: the table, compare.json and the loss curves."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hf_soap.cli.corpus import Corpus
from hf_soap.cli.training import EvalPoint, RunResult

VERSIONED = ("torch", "transformers", "accelerate", "tokenizers")


@dataclass(frozen=True)
class Row:
    """One optimizer's line of the table.

    Attributes:
        optimizer: Its name.
        lr: Peak learning rate.
        steps: Steps trained.
        final_loss: Loss on the held-out text at the end; None if it is not finite.
        steps_to_first: Steps until the loss with which the first optimizer ended; None if it was not reached.
        seconds: Time of the training steps.
        optimizer_share: Fraction of it that ``optimizer.step`` took.
        state_bytes_per_parameter: Optimizer state, per trained parameter.
        checkpoint: Folder of the final checkpoint.
    """

    optimizer: str
    lr: float
    steps: int
    final_loss: float | None
    steps_to_first: float | None
    seconds: float
    optimizer_share: float
    state_bytes_per_parameter: float
    checkpoint: str


def summarize(results: Sequence[RunResult]) -> list[Row]:
    """Boil runs down to the numbers that are compared.

    Args:
        results: The runs; the first one sets the loss that the others are to reach.

    Returns:
        One row per run, in the same order.
    """
    return [
        Row(
            optimizer=result.settings.optimizer,
            lr=result.settings.lr,
            steps=result.settings.steps,
            final_loss=_finite(result.final_loss),
            steps_to_first=result.steps_to(results[0].final_loss),
            seconds=result.seconds,
            optimizer_share=result.optimizer_seconds / result.seconds,
            state_bytes_per_parameter=result.state_bytes / result.parameters,
            checkpoint=str(result.checkpoint),
        )
        for result in results
    ]


def render(rows: Sequence[Row]) -> Table:
    """Lay out the comparison for the terminal.

    Args:
        rows: One per optimizer.

    Returns:
        A table for ``rich``.
    """
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("optimizer", no_wrap=True)
    target = _number(rows[0].final_loss, ".3f")
    for header in (
        "lr",
        "steps",
        "eval\nloss",
        f"steps to\n{target}",
        "wall\nseconds",
        "in opti-\nmizer",
        "state\nB/param",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.optimizer,
            f"{row.lr:g}",
            f"{row.steps}",
            _number(row.final_loss, ".4f"),
            _number(row.steps_to_first, ".0f"),
            f"{row.seconds:.1f}",
            f"{row.optimizer_share:.0%}",
            f"{row.state_bytes_per_parameter:.1f}",
        )
    return table


def write_json(path: Path, results: Sequence[RunResult], corpus: Corpus) -> None:
    """Write everything that a run needs to be repeated or drawn again.

    Args:
        path: The file.
        results: The runs.
        corpus: What they were trained on.
    """
    report = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
        "machine": {
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
        },
        "corpus": {
            "source": corpus.source,
            "sha256": corpus.digest,
            "vocab_size": len(corpus.tokenizer),
            "seq_len": corpus.train.shape[1],
            "train_blocks": len(corpus.train),
            "held_out_blocks": len(corpus.held_out),
        },
        "table": [asdict(row) for row in summarize(results)],
        "runs": [
            {
                "settings": asdict(result.settings),
                "parameters": result.parameters,
                "evals": [asdict(point) | {"loss": _finite(point.loss)} for point in result.evals],
                "train_losses": [_finite(loss) for loss in result.train_losses],
            }
            for result in results
        ],
    }
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def plot(path: Path, results: Sequence[RunResult]) -> None:
    """Draw held-out loss over steps and over time.

    Args:
        path: The PNG to write.
        results: The runs.

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
    for (label, coordinate), panel in zip(axis_of.items(), axes, strict=True):
        for result in results:
            settings = result.settings
            x = [coordinate(point) for point in result.evals]
            y = [point.loss for point in result.evals]
            panel.plot(x, y, marker=".", label=f"{settings.optimizer}, lr {settings.lr:g}")
        panel.axhline(results[0].final_loss, color="grey", linewidth=0.8, linestyle="--")
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("loss on held-out text")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
