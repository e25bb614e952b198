"""The page that ``hf-soap compare --html`` writes: curves and tables in one file that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_soap.cli.compare.corpus import Corpus
from hf_soap.cli.compare.report import equal_loss_cell, has_horizons, mean_curve, number
from hf_soap.cli.compare.results import Json, finite, machine, versions
from hf_soap.cli.compare.summary import by_label, equal_loss, summarize
from hf_soap.cli.compare.sweep import Case

PALETTE = 8
"""Number of colors in the style sheet; further optimizers reuse them, with other dashes."""


def write_html(path: Path, cases: Sequence[Case], corpus: Corpus) -> None:
    """Write the page.

    Args:
        path: The file.
        cases: The runs.
        corpus: What they were trained on.
    """
    environment = Environment(
        loader=PackageLoader("hf_soap.cli.compare"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "equal_loss": equal_loss_cell}
    rows, labels = summarize(cases), list(by_label(cases))
    text = environment.get_template("report.html.jinja").render(
        rows=rows,
        equal=equal_loss(cases) if has_horizons(cases) else [],
        curves=[(case, mean_curve(case)) for case in cases],
        colors={label: index % PALETTE for index, label in enumerate(labels)},
        labels=labels,
        charts=charts(cases),
        shared=shared_settings(cases),
        facts={"text": corpus.source, "SHA-256 of the tokens": corpus.digest, **machine(), **versions()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def charts(cases: Sequence[Case]) -> list[Json]:
    """Collect what the page draws.

    Args:
        cases: The runs.

    Returns:
        A chart of the losses along the runs and, if there are any, charts of learning rates and of horizons. A chart
        has axes to choose from, and series. A series has values for each axis, and means with their range.
    """
    found = [_curves(cases)]
    if any(len(case.sweep) > 1 for case in cases):
        found.append(_sweep(cases))
    if has_horizons(cases):
        found.append(_horizons(cases))
    return found


def shared_settings(cases: Sequence[Case]) -> Json:
    """Return the settings that all runs share; the others are in the table."""
    every = [asdict(run.settings) for case in cases for run in (*case.sweep, *case.runs)]
    return {key: value for key, value in every[0].items() if all(other[key] == value for other in every)}


def _curves(cases: Sequence[Case]) -> Json:
    series = [
        _series(
            case,
            {
                "step": [point.step for point in case.best.evals],
                "seconds": [round(point.seconds, 3) for point in case.best.evals],
            },
            mean_curve(case),
            name=f"{case.label}, {case.steps} steps, lr {case.best.settings.lr:g}",
        )
        for case in cases
    ]
    axes = {"step": "Training step", "seconds": "Seconds of training, without evaluations"}
    return {"id": "curves", "axes": axes, "log": False, "series": series}


def _sweep(cases: Sequence[Case]) -> Json:
    series = [
        _series(
            case,
            {"lr": [run.settings.lr for run in case.sweep]},
            [(run.final_loss,) * 3 for run in case.sweep],
            name=f"{case.label}, {case.steps} steps",
        )
        for case in cases
    ]
    return {"id": "sweep", "axes": {"lr": "Peak learning rate"}, "log": True, "series": series}


def _horizons(cases: Sequence[Case]) -> Json:
    series = [
        _series(
            own[0],
            {"length": [case.steps for case in own]},
            [mean_curve(case)[-1] for case in own],
            name=label,
        )
        for label, own in by_label(cases).items()
    ]
    return {"id": "horizons", "axes": {"length": "Steps of the run"}, "log": True, "series": series}


def _series(case: Case, x: Json, losses: Sequence[tuple[float, float, float]], *, name: str) -> Json:
    mean, low, high = ([finite(value) for value in column] for column in zip(*losses, strict=True))
    return {"label": case.label, "name": name, "x": x, "mean": mean, "low": low, "high": high}
