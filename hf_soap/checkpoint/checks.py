"""Checks of saved state against what the current settings need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_state(known: Mapping[str, Any], wanted: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
    """Checks that saved state has the roles and shapes that the current settings need.

    Args:
        known: The package's saved state of one parameter, by role.
        wanted: Tensors of the right shapes, by role; ``step`` included.
        name: Name of the parameter, for the message.
        shape: Its shape, for the message.

    Raises:
        ValueError: If a role is missing, unknown or has another shape.
    """
    got = {role: tuple(getattr(value, "shape", ())) for role, value in known.items()}
    want = {role: tuple(value.shape) for role, value in wanted.items()}
    if got != want:
        differ = sorted(role for role in got.keys() | want.keys() if got.get(role) != want.get(role))
        raise ValueError(
            f"the optimizer state of {name}, of shape {shape}, does not fit the current settings: "
            + "; ".join(
                f"{role} got {got.get(role, 'nothing')}, wanted {want.get(role, 'nothing')}" for role in differ
            )
            + ". Resume with the optimizer and the optim_args that wrote the checkpoint. To keep only the weights, "
            "remove the optimizer's state from the checkpoint (the file optimizer.pt; under FSDP the file "
            "optimizer.bin or the folder optimizer_0); the learning rate schedule then starts again"
        )
