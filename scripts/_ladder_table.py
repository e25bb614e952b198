"""The table of what scripts/ladder.py has measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from _gpu_tables import table


def ladder_table(report: Mapping[str, Any]) -> str:
    """Returns Markdown for a report.

    Args:
        report: The content of a ladder.json, in which rungs may be unfinished.

    Returns:
        How the runs were made, and one line per rung that has runs. A cell is empty where runs are missing.
    """
    headings = ["rung", "`optim_args`", "lr", *([f"loss at {report['at']}", "±"] if report["at"] else [])]
    headings += ["steps to AdamW's loss", "%", "±", "ms/step", "wall %", "state bytes / parameter", "runs"]
    base = report["rungs"]["AdamW"]
    begun = {name: found for name, found in report["rungs"].items() if found["cost"]["runs"]}
    lines = table(headings, (_row(name, found, base, at=report["at"]) for name, found in begun.items()))
    return "\n".join([_caption(report), "", *lines]) + "\n"


def _caption(report: Mapping[str, Any]) -> str:
    notes = report["made_with"]
    target = f", which ends at {report['target']:.4f}" if report["target"] else ""
    where = sorted({f"{each['processor']}, threads: {each['threads']}" for each in notes})
    commits = ", ".join(dict.fromkeys(each["commit"] for each in notes))
    return (
        f"GPT-2 of {report['layers']} layers × width {report['width']}, {report['text']}; seeds: {report['seeds']}; "
        f"AdamW's steps: {report['steps']}{target}; {'; '.join(where)}; torch {report['versions']['torch']}; "
        f"commits: {commits}."
    )


def _row(name: str, found: Mapping[str, Any], base: Mapping[str, Any], *, at: int) -> list[str]:
    shown = re.sub(r"modules=\{.*", "modules=…", found["optim_args"])  # too long for a table
    args = f"`{shown}`" if shown else ""
    bound = "" if found.get("reached", True) else "> "
    cells = [name, args, _number(found.get("lr"), "g"), *(_spread(found.get("loss_at"), ".4f") if at else [])]
    cells += [bound + _spread(found.get("steps"), ".0f")[0], bound + _spread(found.get("percent"), ".1f")[0]]
    cells += [_spread(found.get("percent"), ".1f")[1], _number(found["time"].get("ms"), ".1f"), _wall(found, base)]
    return [*cells, _number(found["cost"].get("state_bytes"), ".1f"), str(found["cost"]["runs"])]


def _wall(found: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    if "percent" not in found or not (found["time"]["runs"] and base["time"]["runs"]):
        return ""
    bound = "" if found.get("reached", True) else "> "
    return f"{bound}{found['percent']['mean'] * found['time']['ms'] / base['time']['ms']:.0f}"


def _spread(found: Mapping[str, Any] | None, form: str) -> tuple[str, str]:
    """The mean, and the deviation if there are several values."""
    if found is None:
        return "", ""
    return _number(found["mean"], form), _number(found["std"] if len(found["by_seed"]) > 1 else None, form)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
