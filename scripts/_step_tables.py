"""The tables of what scripts/bench_step.py has measured, one column for each class of processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from _gpu_tables import table

Report = Mapping[str, Any]


def step_tables(reports: Sequence[Report], shapes: Sequence[str]) -> str:
    """Returns Markdown for reports of several processors, or of one with different instructions.

    Args:
        reports: The contents of JSON files, each with the results of one or more sets of shapes.
        shapes: The sets of shapes, in the order of their tables.
    """
    lines = _rates(reports)
    for name in shapes:
        if found := [each for each in reports if name in each]:
            lines += ["", *_steps(name, found)]
    return "\n".join(lines) + "\n"


def _rates(reports: Sequence[Report]) -> list[str]:
    """The table of products, from the first report on each processor."""
    names = list(reports[0]["gflop_per_s"])
    first: dict[str, Report] = {}
    for each in reports:
        first.setdefault(_processor(each), each)
    rows = [[name, *(f"{each['gflop_per_s'][rate]:.0f}" for rate in names)] for name, each in first.items()]
    return table(["processor", *(f"GFLOP/s, {name}" for name in names)], rows)


def _steps(name: str, reports: Sequence[Report]) -> list[str]:
    """The table of one set of shapes. The floor is that of SOAP with both sides, and is shown beside it only."""
    with_floor = "SOAP" in reports[0][name]
    headings = [f"`{name}`: ms a step"]
    for own in map(_instructions, reports):
        headings += [own, *([f"× floor, {own}"] if with_floor else []), f"× AdamW, {own}", f"worst / mean, {own}"]
    rows = []
    for optimizer, first in reports[0][name].items():
        if optimizer == "floor_s":
            continue
        cells = [f"{optimizer}, {first['state_bytes_per_param']:.1f} bytes / parameter"]
        for found in (each[name] for each in reports):
            step = found[optimizer]["step_s"]
            cells += [f"{1e3 * step:.1f}", *([f"{step / found['floor_s']:.2f}"] if with_floor else [])]
            cells += [f"{step / found['AdamW (fused)']['step_s']:.1f}", f"{found[optimizer]['worst_s'] / step:.1f}"]
        rows.append(cells)
    floors = ", ".join(f"{1e3 * each[name]['floor_s']:.0f} ms with {_instructions(each)}" for each in reports)
    return [*([f"Floor: {floors}.", ""] if with_floor else []), *table(headings, rows)]


def _processor(report: Report) -> str:
    return f"{report['machine']}, {_instructions(report)}, threads: {report['threads']}, torch {report['torch']}"


def _instructions(report: Report) -> str:
    return f"{report['instructions']}{' (emulated)' if report['emulated'] else ''}"
