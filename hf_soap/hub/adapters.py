"""Converts adapters that a program created in Python to the options with which training scripts create the same."""

from __future__ import annotations

from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

_OPTIONS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
    "task_type": "lora_task_type",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Options of TRL's scripts by field of peft's LoraConfig; ``scripts/run_clm.py`` reads r, alpha and targets."""

_SET_BY_PEFT = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    "fan_in_fan_out",  # peft corrects it for the layers that it finds
}


def options_of(model: Any, *, trl: bool) -> tuple[dict[str, Any], list[str]]:
    """Describes the adapters of a model.

    Args:
        model: Any model; a peft model, or a transformers model with adapters, has a ``peft_config``.
        trl: Whether the options are for TRL's scripts. These need ``use_peft``, have a default dropout of 0.05, and
            read a single target as a regular expression. Otherwise the options are for ``scripts/run_clm.py``.

    Returns:
        The options, and in words the properties of the adapters that no option describes. Without adapters, both are
        empty. If only the options are empty, there are none for this kind of adapter.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return {}, []
    if len(configs) > 1:
        return {}, [f"the adapters {', '.join(map(str, configs))}: there are several"]
    (config,) = configs.values()
    method = str(_plain(config.peft_type))
    if method != "LORA":
        return {}, [f"the adapter, which is {method}, not LoRA"]
    changed = _changed(config)
    missing = [f"{name} of LoraConfig" for name in changed if name not in _OPTIONS]
    given = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        **({"lora_dropout": float(config.lora_dropout)} if trl or "lora_dropout" in changed else {}),
        **{name: value for name, value in changed.items() if name in _OPTIONS and name not in ("r", "lora_alpha")},
    }
    if given.get("task_type") == "CAUSAL_LM":
        del given["task_type"]  # the default of both kinds of scripts
    if int(config.lora_alpha) == config.lora_alpha:
        given["lora_alpha"] = int(config.lora_alpha)
    else:
        missing.append(f"lora_alpha={config.lora_alpha} of LoraConfig, since scripts take whole numbers only")
        del given["lora_alpha"]
    if "target_modules" in given:
        targets = _targets(given.pop("target_modules"), model, trl=trl)
        if targets is None:
            missing.append("target_modules of LoraConfig")
        else:
            given["target_modules"] = targets
    ordered = {option: given[name] for name, option in _OPTIONS.items() if name in given}
    return {**({"use_peft": True} if trl else {}), **ordered}, missing


def _changed(config: Any) -> dict[str, Any]:
    """Returns the fields that differ from their defaults, as plain values."""
    found = {}
    for entry in fields(config):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        value = getattr(config, entry.name)
        if entry.init and entry.name not in _SET_BY_PEFT and value != default and value not in (None, [], {}, set()):
            found[entry.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    # The order of a set differs between processes.
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value) if isinstance(value, tuple) else value


def _targets(targets: str | list[str], model: Any, *, trl: bool) -> str | list[str] | None:
    """Returns the targets as the value of an option, or None if an option cannot express them."""
    if isinstance(targets, str):
        return targets if trl else None  # other scripts read a list of names, not a regular expression
    if not trl or len(targets) != 1:
        return targets
    (name,) = targets
    adapted = getattr(getattr(model, "base_model", None), "targeted_module_names", [])
    if not adapted or not name.replace("_", "").isalnum() or not all(one.endswith(f".{name}") for one in adapted):
        return None
    return rf".*\.{name}"
