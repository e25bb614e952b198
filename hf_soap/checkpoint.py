"""What a state dict holds and how it is loaded.

A checkpoint holds flat tensors and plain numbers per parameter, keyed by role, so that it says nothing about how state
was stacked in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from hf_soap.blocks import check_state

logger = logging.getLogger(__name__)

FROM_CHECKPOINT = ("lr", "initial_lr")
"""Group entries that a checkpoint decides: a scheduler continues from them. All others are current settings."""


def detach_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns ``state_dict`` with every tensor of its state copied out of the stack it is a view of."""
    state = {
        key: {role: value.clone() if isinstance(value, Tensor) else value for role, value in entry.items()}
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def groups_to_load(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns a state dict without state, whose groups combine saved learning rates and current settings.

    Args:
        groups: The optimizer's param groups.
        state_dict: What was saved.

    Returns:
        A state dict for ``torch.optim.Optimizer.load_state_dict``.

    Raises:
        ValueError: If number or sizes of the groups differ.
    """
    saved = state_dict["param_groups"]
    got, want = [len(group["params"]) for group in saved], [len(group["params"]) for group in groups]
    if got != want:
        raise ValueError(
            f"the checkpoint has param groups of {got} parameters, this optimizer has groups of {want}; "
            "load it with the same model and the same grouping options in optim_args"
        )
    merged = []
    for old, new in zip(saved, groups, strict=True):
        current = {key: value for key, value in new.items() if key not in ("params", *FROM_CHECKPOINT)}
        changed = {k: (old[k], v) for k, v in current.items() if k in old and _plain(old[k]) != _plain(v)}
        if changed:
            words = ", ".join(f"{key}={value!r} (saved {before!r})" for key, (before, value) in changed.items())
            logger.info("Settings that differ from the checkpoint's; the current ones are used: %s", words)
        merged.append({**old, **current})
    return {"state": {}, "param_groups": merged}


def saved_state(
    groups: list[dict[str, Any]], state_dict: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], Tensor, dict[str, Any]]]:
    """Yields (group, parameter, saved state by role) for every parameter that has saved state."""
    for old, new in zip(state_dict["param_groups"], groups, strict=True):
        for key, param in zip(old["params"], new["params"], strict=True):
            saved = state_dict["state"].get(key)
            if saved:
                yield new, param, saved


def restored(param: Tensor, saved: dict[str, Any], wanted: dict[str, Tensor]) -> dict[str, Any]:
    """Returns a copy of the saved state of one parameter on the parameter's device, in the saved dtypes.

    Args:
        param: The parameter.
        saved: Its saved state by role.
        wanted: Tensors with the right shapes, by role.

    Returns:
        State by role.

    Raises:
        ValueError: If roles or shapes differ.
    """
    check_state(saved, wanted, tuple(param.shape))
    return {
        role: value.detach().clone().to("cpu" if role == "step" else param.device)
        if isinstance(value, Tensor)
        else value
        for role, value in saved.items()
    }


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
