"""Checks of the settings that all optimizers share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_soap.config import configs, options
from hf_soap.config.options import check_number

CONFIGS = (configs.SoapConfig, configs.ShampooConfig, configs.MarsSoapConfig)
FAMILY_OPTIONS = {name for config in CONFIGS for name in options.option_fields(config)} | options.ELSEWHERE.keys()
"""Options of any optimizer of this package."""

CHANGING = ("amsgrad", "nesterov")
"""Settings of torch's optimizers that change the update; others, such as foreach, only change how it is computed."""


SYNONYMS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "beta1": "betas",
    "beta2": "betas",
    "momentum": "betas",
    "epsilon": "eps",
    "frequency": "precondition_frequency",
}
"""Other names of our settings, from other optimizers or from habit."""


def check_group_keys(group: Mapping[str, Any], settings: Collection[str]) -> None:
    """Refuses keys of a param group that look like a setting but would be ignored.

    All other names are allowed: a user's own keys, and keys that schedulers write, such as ``initial_lr``.

    Args:
        group: The param group.
        settings: Names of the optimizer's settings.

    Raises:
        ValueError: On a key that is a misspelt or shortened setting, a synonym of one, or an option of another
            optimizer.
    """
    for key, value in group.items():
        if key in settings or key in ("params", "param_names") or not isinstance(key, str):
            continue
        meant = _meant(key, settings)
        # exact or kl may be a user's own key; normalize_grads hardly can be.
        if meant or (key in FAMILY_OPTIONS and "_" in key) or (key in CHANGING and value):
            remedy = f"write {meant}; " if key in SYNONYMS else f"did you mean {meant}? " if meant else ""
            raise ValueError(
                f"got {options.shown(key)} in a param group, wanted a setting that a group may have: {remedy}"
                f"The settings are {', '.join(settings)}."
            )


def _meant(key: str, settings: Collection[str]) -> str | None:
    """Returns the setting that a key probably means, or None if it means something else."""
    if SYNONYMS.get(key) in settings:
        return SYNONYMS[key]
    normalized = key.lower().replace("-", "_")
    for is_meant in (_is_slip, _is_shortened, _has_similar_words):
        if found := [name for name in settings if normalized == name or is_meant(normalized, name)]:
            return found[0]
    return None


def _is_slip(key: str, name: str) -> bool:
    """Whether a key has one typing error: a letter is missing, doubled or swapped with the next.

    In a long name, a wrong letter or an additional one counts too. Digits carry meaning: beta3 is not betas. Single
    letters are never typing errors.
    """
    if len(key) < 2:
        return False
    start = _common_prefix(key, name)
    end = _common_prefix(key[start:][::-1], name[start:][::-1])
    wrong, right = key[start : len(key) - end], name[start : len(name) - end]
    if len(wrong) + len(right) == 1:
        return not wrong or wrong == key[start - 1 : start] or (len(name) > 7 and not wrong.isdigit())
    if len(wrong) == len(right) == 1:
        return len(name) > 7 and wrong.isalpha() and right.isalpha()
    return len(wrong) == 2 and wrong == right[::-1]


def _common_prefix(one: str, other: str) -> int:
    """Returns the length of the common prefix of two words."""
    same = [a == b for a, b in zip(one, other, strict=False)]
    return [*same, False].index(False)


def _is_shortened(key: str, name: str) -> bool:
    return "_" in key and name.startswith(key)


def _has_similar_words(key: str, name: str) -> bool:
    """Whether two names of several words match word by word, allowing for short forms and typing errors."""
    words, others = key.split("_"), name.split("_")
    return len(words) == len(others) > 1 and all(map(_is_similar, words, others))


def _is_similar(word: str, other: str) -> bool:
    shorter, longer = sorted((word, other), key=len)
    begins = len(shorter) > 2 and longer.startswith(shorter)
    return word == other or begins or (len(shorter) > 2 and _is_slip(word, other))


def check_learning_rate(lr: Any) -> None:
    """Checks a learning rate, which must be a number >= 0 or a tensor of one element.

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


def check_pair(name: str, value: Any) -> tuple[Any, Any]:
    """Returns the two items of a setting such as betas.

    Raises:
        ValueError: If it does not have two.
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be two numbers, got {value!r}; for example (0.9, 0.95)")
    return value[0], value[1]


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Checks a setting that must be one of the given words.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
