"""Sharded parameters: the only module, beside checkpoint, that knows torch.distributed."""

from __future__ import annotations

import sys

from torch import Tensor


def require_whole(param: Tensor) -> None:
    """Refuses a parameter that is sharded over ranks.

    Args:
        param: Any parameter.

    Raises:
        ValueError: If ``param`` is a DTensor. Its state would be saved for one rank only and restored wrongly
            on the others, which no later step would notice.
    """
    dtensor = sys.modules.get("torch.distributed.tensor")  # not loaded: no DTensor exists, and loading takes 0.6 s
    if dtensor is not None and isinstance(param, dtensor.DTensor):
        raise ValueError(
            f"got a parameter of shape {tuple(param.shape)} that is sharded over ranks (DTensor), wanted whole ones: "
            "sharded training is not supported by this version; train with DDP, or without FSDP"
        )
