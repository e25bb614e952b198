"""Adapters that a program made in Python, as the options by which training scripts make the same."""

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
"""Field of peft's LoraConfig to the option of TRL's scripts; ``scripts/run_clm.py`` reads r, alpha and targets."""

_SET_BY_PEFT = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    "fan_in_fan_out",  # corrected by peft for the layers that it finds
}


def options_of(model: Any, *, trl: bool) -> tuple[dict[str, Any], list[str]]:
    """Describes the adapters of a model.

    Args:
        model: Any model; one of peft, or one of transformers with adapters added, has a ``peft_config``.
        trl: Whether the options are for TRL's scripts, which need ``use_peft``, have a dropout of 0.05 unless told
            otherwise, and take a single target for a regular expression; others are as ``scripts/run_clm.py``.

    Returns:
        The options, empty without adapters, and what of the adapters no option says. With the first empty and the
        second not, the adapters are of a kind that has no options.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return {}, []
    if len(configs) > 1:
        return {}, [f"the adapters {', '.join(map(str, configs))}, which are more than one"]
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
        del given["task_type"]  # both scripts' own
    if int(config.lora_alpha) == config.lora_alpha:
        given["lora_alpha"] = int(config.lora_alpha)
    else:
        missing.append(f"lora_alpha={config.lora_alpha} of LoraConfig, since scripts take whole numbers,")
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
    """Returns the fields that are not at their defaults, as plain values."""
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
    # In a set the names come in another order in each process.
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value) if isinstance(value, tuple) else value


def _targets(targets: str | list[str], model: Any, *, trl: bool) -> str | list[str] | None:
    """Returns the targets as an option gives them to peft, or None where it cannot."""
    if isinstance(targets, str):
        return targets if trl else None  # a list of one name elsewhere, which is no regular expression
    if not trl or len(targets) != 1:
        return targets
    (name,) = targets
    adapted = getattr(getattr(model, "base_model", None), "targeted_module_names", [])
    if not adapted or not name.replace("_", "").isalnum() or not all(one.endswith(f".{name}") for one in adapted):
        return None
    return rf".*\.{name}"
