"""CUDA graphs: what is captured is replayed without the host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Groups = Sequence[Mapping[str, Any]]
Settings = list[dict[str, Any]]


def capturing() -> bool:
    """Whether the work that is sent to a GPU now goes into a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_in_graph(what: str) -> None:
    """Raises where a CUDA graph is being captured: what comes next needs the host, and would be replayed for ever.

    Args:
        what: What the step would do.

    Raises:
        RuntimeError: Within a capture.
    """
    if capturing():
        raise RuntimeError(
            f"got a step to capture that {what}, wanted one that only updates: take steps with all gradients outside "
            "of the graph first, until every parameter has had one that is not zero, and one step after that"
        )


def captured_settings(groups: Groups, names: Iterable[str], *, optimizer: str) -> Settings:
    """Returns the settings that a graph takes in as they are; of a learning rate that is a tensor, its place.

    Args:
        groups: Param groups of the optimizer whose step is being captured.
        names: Of its settings.
        optimizer: Its name.

    Raises:
        RuntimeError: If the host takes part in its steps, or has a learning rate that the graph would not see change.
    """
    for group in groups:
        if not group.get("capturable", False):
            remedy = "set capturable=True" if "capturable" in group else "leave it outside of the graph"
            raise RuntimeError(
                f"got a step of {optimizer} to capture that the host takes part in, wanted none; {remedy}"
            )
        lr, devices = group["lr"], {param.device for param in group["params"]}
        if isinstance(lr, Tensor) and devices - {lr.device}:
            raise RuntimeError(
                f"got a learning rate on {lr.device} in a step to capture, wanted it where the parameters are, on "
                f"{', '.join(map(str, devices))}: a graph would keep its value of now; use lr.to(device)"
            )
    return _settings(groups, names)


def refuse_other_settings(groups: Groups, names: Iterable[str], captured: Settings) -> None:
    """Raises where settings have changed since a graph took them in.

    Args:
        groups: The param groups.
        names: Of their settings.
        captured: What :func:`captured_settings` returned.

    Raises:
        RuntimeError: If one has changed.
    """
    for number, (now, before) in enumerate(zip(_settings(groups, names), captured, strict=True)):
        for name, value in now.items():
            if value != before[name]:
                raise RuntimeError(
                    f"got {name}={value!r} in param group {number} behind a replay, wanted {before[name]!r}, which "
                    "the graph has taken in; capture again, or make lr a tensor on the device and fill_ it"
                )


def _settings(groups: Groups, names: Iterable[str]) -> Settings:
    kept = [name for name in names if name != "lr"]
    return [{name: group[name] for name in kept} | {"lr": _rate(group["lr"])} for group in groups]


def _rate(lr: float | Tensor) -> float | str:
    return f"a tensor at {lr.data_ptr():#x}" if isinstance(lr, Tensor) else lr
