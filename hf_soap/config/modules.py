"""The option ``modules``: settings of the parameters that a pattern or a role names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_soap.config import options
from hf_soap.config.members import OF_GROUPS
from hf_soap.config.options import MODULES, RATES, ROLE, OptimizerConfig, shown

ROLES = ("@embeddings", "@head", "@vectors", "@matrices", "@adapters")
"""Weights of ``nn.Embedding``; the output embeddings; parameters of fewer than two dimensions; all that have no other
role; LoRA and other adapters of peft. A parameter may have several."""

Own = Mapping[str, Any]
"""Settings of some parameters: options by name, ``rule``, and :data:`hf_soap.config.options.RATES`."""


def checked(config: OptimizerConfig, given: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """Checks the option ``modules`` of a config.

    Args:
        config: The config, whose other options are checked already.
        given: Settings by pattern or role.

    Returns:
        A copy, in the same order.

    Raises:
        ValueError: If a pattern, a role, the name of a setting or its value is wrong.
    """
    for selector, own in given.items():
        if not isinstance(selector, str) or not isinstance(own, Mapping):
            raise ValueError(
                f"{MODULES} must map patterns to settings, got {shown({selector: own})}; for example "
                "{'wte|lm_head': {rule: adam, lr: 1e-2}}"
            )
        if selector.startswith(ROLE) and selector not in ROLES:
            raise ValueError(
                f"{MODULES} got the unknown role {shown(selector)}, wanted a pattern or one of {', '.join(ROLES)}"
            )
        options.check_pattern(f"a key of {MODULES}", selector)
        try:
            overrides_of(config, own)
        except ValueError as error:
            raise ValueError(f"{MODULES}, {shown(selector)}: {error}") from error
    return {selector: dict(own) for selector, own in given.items()}


def overrides_of(config: OptimizerConfig, own: Own) -> dict[str, Any]:
    """Returns own settings as an entry of the ``overrides`` of a param group, with ``lr`` as it was given.

    Args:
        config: The options of all other parameters.
        own: The settings that differ.

    Raises:
        ValueError: If one is unknown, has the wrong type, is out of range or is the same for all parameters.
    """
    rates = {key: own[key] for key in RATES if key in own}
    for key, value in rates.items():
        options.check_number(key, value, RATES[key])
    if {"lr", "lr_factor"} <= rates.keys():
        raise ValueError("got lr and lr_factor, wanted one of them; lr is absolute, lr_factor a multiple")
    rule = {key: own[key] for key in own if key == "rule"}
    settings = {key: own[key] for key in own if key not in rates.keys() | rule.keys()}
    _refuse_shared(config, settings)
    kwargs = replace(config, **{MODULES: None}).constructor_kwargs()
    changed = replace(config, **{MODULES: None, **settings}).constructor_kwargs()
    differing = {key: value for key, value in changed.items() if key in settings or value != kwargs[key]}
    # AdamW's own rates would otherwise win over these.
    separate = {f"{key}_1d": None for key in ("lr", "weight_decay") if key in rates and f"{key}_1d" in kwargs}
    return {**differing, **separate, **rule, **rates}


def _refuse_shared(config: OptimizerConfig, settings: Own) -> None:
    known = options.option_fields(type(config))
    shared = OF_GROUPS | {key for key, entry in known.items() if entry.metadata["trainer_only"]}
    for key in settings:
        if key in known and key in shared:
            meant = key.removesuffix("_1d")
            remedy = f"write {meant}" if meant in RATES else f"set {key} outside of {MODULES}"
            raise ValueError(f"got {key}, wanted a setting that may differ between parameters; {remedy}")
        if key not in known:
            choices = ["rule", *RATES, *(name for name in known if name not in shared)]
            raise ValueError(options.unknown(f"setting {shown(key)}", str(key), choices))
