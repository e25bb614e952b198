"""CUDA graphs: what is captured is replayed without the host."""

from __future__ import annotations

import torch


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
