"""Tables of docs/benchmarks.md from what scripts/measure_gpu.py has measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def gpu_tables(report: Mapping[str, Any]) -> str:
    """Returns Markdown for a report.

    Args:
        report: The content of a gpu.json, which may lack stages.

    Returns:
        The machine, and a table for each stage that is there; marked as a rehearsal where it is one.
    """
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = []
    if machine["rehearsal"]:
        lines += ["**A rehearsal on a CPU with tiny sizes: no figure here says anything of a GPU.**", ""]
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    lines += [f"{machine['card']}{driver}; {versions}; {machine['date']}, commit {machine['commit']}.", ""]
    lines += [line for note in report.get("notes", []) for line in (note, "")]
    parts = {"tests": _tests, "steps": _steps, "timing": _timing, "train": _train, "kernels": _kernels}
    parts["profile"] = _profile
    for name, part in parts.items():
        if name in report:
            lines += [*part(report[name]), ""]
    return "\n".join(lines).rstrip() + "\n"


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Returns the lines of a Markdown table, with its first column aligned to the left and the others to the right."""
    marks = ["---", *["---:"] * (len(headings) - 1)]
    return [f"| {' | '.join(map(str, row))} |" for row in (headings, marks, *rows)]


def _tests(found: Mapping[str, Any]) -> list[str]:
    return [f"Tests marked `cuda`: {found['summary']}."]


def _steps(found: Mapping[str, Any]) -> list[str]:
    lines = ["Bare optimizer steps. `queued` is the time until the host has nothing more to do."]
    by_model: dict[str, dict[str, Any]] = {}
    for name, row in found.items():
        model, _, optimizer = name.partition(": ")
        by_model.setdefault(model, {})[optimizer] = row
    headings = ("optimizer", "ms a step", "× AdamW", "queued ms", "slowest ms", "peak bytes per parameter")
    for model, all_rows in by_model.items():
        rows = {name: row for name, row in all_rows.items() if "ms" in row}
        base = rows.get("AdamW (fused)", {}).get("ms")
        cells = [
            (
                name,
                f"{row['ms']:.1f}",
                f"{row['ms'] / base:.1f}" if base else "",
                f"{row['host_ms']:.1f}",
                f"{row['worst_ms']:.1f}",
                f"{row['peak_bytes_per_parameter']:.0f}",
            )
            for name, row in rows.items()
        ]
        lines += ["", *table((f"{model}: {headings[0]}", *headings[1:]), cells)]
    return lines


def _timing(found: Mapping[str, Any]) -> list[str]:
    rows = [
        (name, f"{row['seconds_per_step']:.3f}", f"{100 * row['over_adamw']:+.1f} %", row["peak_gib"])
        for name, row in found.items()
        if "seconds_per_step" in row
    ]
    lines = ["Training steps of GPT-2 124M through the Trainer: 262,144 tokens, bf16, no compilation.", ""]
    return lines + table(("optimizer", "seconds a step", "over AdamW", "peak GiB"), rows)


def _train(found: Mapping[str, Any]) -> list[str]:
    size, runs = found.get("length", {}), {name: row for name, row in found.items() if "eval_losses" in row}
    if not runs:
        return []
    points = [int(step) for step in next(iter(runs.values()))["eval_losses"]]
    shown = [points[len(points) // 4], points[len(points) // 2], points[-1]]
    rows = []
    for name, row in runs.items():
        losses = {int(step): loss for step, loss in row["eval_losses"].items()}
        rows.append((name, f"{row['seconds_per_step']:.3f}", *(f"{losses[step]:.3f}" for step in shown)))
    tokens = size.get("tokens a step", 0)
    lines = [f"Held-out loss of GPT-2 124M from scratch, {size.get('steps')} steps of {tokens:,} tokens.", ""]
    return lines + table(("run", "seconds a step", *(f"step {step}" for step in shown)), rows)


def _kernels(found: Mapping[str, Any]) -> list[str]:
    methods = ("qr", "cholesky_qr", "eigh", "newton")
    rows = [
        (name, *(f"{row[method]['ms']:.1f}" if "ms" in row.get(method, {}) else "" for method in methods))
        for name, row in found.items()
    ]
    lines = ["Decompositions of batches of float32 factors, in milliseconds."]
    return [*lines, "", *table(("what", "QR", "Cholesky-QR", "eigh", "Newton"), rows)]


def _profile(found: Mapping[str, Any]) -> list[str]:
    keys = ("wall_ms", "queued_ms", "device_busy_ms", "launches", "host_waits")
    rows = [(name, *(row[key] for key in keys)) for name, row in found.items()]
    lines = ["One step under torch's profiler, which slows the host down.", ""]
    return lines + table(("step", "wall ms", "queued ms", "device busy ms", "launches", "host waits"), rows)
