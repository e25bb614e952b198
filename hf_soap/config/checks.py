"""Checks of settings that every optimizer has."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_soap.config import configs, options

CONFIGS = (configs.SoapConfig, configs.ShampooConfig, configs.MarsSoapConfig)
FAMILY_OPTIONS = {name for config in CONFIGS for name in options.option_fields(config)} | options.ELSEWHERE.keys()
"""Options of any optimizer of the family."""

CHANGING = ("amsgrad", "nesterov")
"""Settings of torch's optimizers that change what an update is; others, such as foreach, only say how it is made."""


def check_group_keys(group: Mapping[str, Any], settings: Collection[str]) -> None:
    """Refuses keys of a param group that are meant as settings and would be passed over.

    A name of the user's own may be there, such as a single word that no setting is close to, and what schedulers put
    there: ``initial_lr``, ``max_momentum``.

    Args:
        group: The param group.
        settings: Names of the optimizer's settings.

    Raises:
        ValueError: On a key that is close to the name of a setting, or of several words and the beginning of one, or
            an option of another optimizer.
    """
    for key, value in group.items():
        if key in settings or key in ("params", "param_names") or not isinstance(key, str):
            continue
        # block, norm or exact may be somebody's own; block_s, or normalize_grads where there is none, hardly is.
        word = "_" not in key
        derived = any(key.endswith(f"_{name}") or key.startswith(f"{name}_") for name in settings)
        first = word and any(name.startswith(f"{key}_") for name in settings)
        # weight_decay_end may be somebody's own too; weight_decay_d is none.
        misspelt = difflib.get_close_matches(key, settings, n=1, cutoff=0.92 if derived or first else 0.8)
        shortened = not word and any(name.startswith(key) for name in settings)
        swapped = any(sorted(key) == sorted(name) for name in settings)
        if misspelt or shortened or swapped or (key in FAMILY_OPTIONS and not word) or (key in CHANGING and value):
            remedy = {"beta1": "write betas", "beta2": "write betas", "learning_rate": "write lr"}.get(key, "")
            raise ValueError(
                f"got {options.shown(key)} in a param group, wanted a setting that a group may have: "
                f"{remedy and remedy + '; '}{options.nearest(key, settings)}They are {', '.join(settings)}."
            )


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
