"""Checks of settings that every optimizer has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def check_learning_rate(lr: Any) -> None:
    """Checks a learning rate: a number >= 0, or a tensor of one element.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(
                f"lr must be a number or a tensor of one element, got a tensor of shape {tuple(lr.shape)}"
            )
        lr = lr.item()
    check_number("lr", lr)


def check_number(name: str, value: Any) -> None:
    """Checks a setting that must be a finite number >= 0.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def check_pair(name: str, value: Any) -> tuple[Any, Any]:
    """Returns the two items of a setting such as betas.

    Raises:
        ValueError: If it does not have two.
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be two numbers, got {value!r}; for example (0.9, 0.95)")
    return value[0], value[1]


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Checks a setting that must be one of a few words.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
