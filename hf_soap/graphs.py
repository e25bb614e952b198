"""CUDA graphs: what is captured is replayed without the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Groups = Sequence[Mapping[str, Any]]
Rates = list[tuple[float | None, float]]


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


def captured_rates(groups: Groups, *, name: str) -> Rates:
    """Returns the rates that a graph takes in as numbers: of each param group the decay, and a lr that is no tensor.

    Args:
        groups: Param groups of the optimizer whose step is being captured.
        name: Of the optimizer.

    Raises:
        RuntimeError: If the host takes part in its steps, or has a learning rate that the graph would not see change.
    """
    for group in groups:
        if not group.get("capturable", False):
            remedy = "set capturable=True" if "capturable" in group else "leave it outside of the graph"
            raise RuntimeError(f"got a step of {name} to capture that the host takes part in, wanted none; {remedy}")
        lr, devices = group["lr"], {param.device for param in group["params"]}
        if isinstance(lr, Tensor) and devices - {lr.device}:
            raise RuntimeError(
                f"got a learning rate on {lr.device} in a step to capture, wanted it where the parameters are, on "
                f"{', '.join(map(str, devices))}: a graph would keep its value of now; use lr.to(device)"
            )
    return _rates(groups)


def refuse_other_rates(groups: Groups, captured: Rates) -> None:
    """Raises where rates have changed since a graph took them in.

    Args:
        groups: The param groups.
        captured: What :func:`captured_rates` returned.

    Raises:
        RuntimeError: If one has changed.
    """
    if (now := _rates(groups)) != captured:
        raise RuntimeError(
            f"got (lr, weight_decay) {now} of the param groups behind a replay, wanted {captured}, which the graph "
            "has as numbers; make lr a tensor on the device and fill_ it, or capture again"
        )


def _rates(groups: Groups) -> Rates:
    return [(None if isinstance(group["lr"], Tensor) else group["lr"], group["weight_decay"]) for group in groups]
