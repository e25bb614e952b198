"""What ``TrainingArguments`` say of the optimizer: its name and its options."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from hf_soap.config import options
from hf_soap.optimizers.names import ENTRIES

if TYPE_CHECKING:
    from transformers import TrainingArguments

HF_ADAM = {"beta1": ("adam_beta1", 0.9), "beta2": ("adam_beta2", 0.999), "eps": ("adam_epsilon", 1e-8)}
"""For each option: the argument of TrainingArguments that may set it, and the default that counts as not set."""


def optimizer_name(args: TrainingArguments) -> str:
    """Returns ``args.optim`` as a plain string, whether it is a member of OptimizerNames or text."""
    return str(getattr(args.optim, "value", args.optim))


def resolve(args: TrainingArguments) -> options.OptimizerConfig:
    """Reads the options of the optimizer that ``args.optim`` names.

    A value comes from ``optim_args``; else, for betas and eps, from ``adam_beta1``, ``adam_beta2`` and
    ``adam_epsilon`` if they differ from the Transformers defaults; else it is the published default. The arguments do
    not show whether a user set ``adam_beta1=0.9`` or kept the default, since a command line sets all of them. To ask
    for AdamW's default, use ``optim_args="beta1=0.9"``. The values in use are logged at INFO.

    Args:
        args: Training arguments whose ``optim`` is a name registered here.

    Returns:
        The checked options.

    Raises:
        ValueError: If ``optim_args`` is invalid, or the optimizer would get flat vectors (DeepSpeed, FSDP1).
    """
    name = optimizer_name(args)
    _refuse_flat_parameters(args, name)
    config, changed = ENTRIES[name].config, changed_adam_arguments(args)
    if ignored := changed.keys() - options.option_fields(config).keys():
        argument, default = HF_ADAM[min(ignored)]
        raise ValueError(
            f"optim={name!r} got {argument}={getattr(args, argument)}, wanted its default, {default:g}: it has no "
            f"{min(ignored)}; remove {argument}"
        )
    return options.parse_optim_args(args.optim_args, config, changed)


def without_preset(args: TrainingArguments) -> str | None:
    """Returns ``optim_args`` with the options of a preset in place of its name.

    A run that is repeated from them does not change with a later version of the preset. Text that names no preset, or
    is for an optimizer of another package, is returned unchanged.
    """
    name = optimizer_name(args)
    config = ENTRIES[name].config if name in ENTRIES else None
    preset = options.preset_in(args.optim_args, config) if config else None
    if config is None or preset is None:
        return args.optim_args
    # All of them, since adam_beta1 would change an option that equals its default and is not written.
    return resolve(args).to_optim_args(always=config.presets[preset].keys())


def changed_adam_arguments(args: TrainingArguments) -> dict[str, float]:
    """Returns the options set by those of ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` that were changed."""
    return {
        option: getattr(args, argument)
        for option, (argument, default) in HF_ADAM.items()
        if getattr(args, argument) != default
    }


def _refuse_flat_parameters(args: TrainingArguments, name: str) -> None:
    # `accelerate launch` sets only the environment, not the arguments.
    launched = {way for way in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{way}", "").lower() == "true"}
    if getattr(args, "deepspeed", None) or getattr(args, "hf_deepspeed_config", None) or "DEEPSPEED" in launched:
        raise ValueError(
            f"optim={name!r} got DeepSpeed, wanted matrices or shards of them: ZeRO gives the optimizer one flat "
            "vector, on which it could only be Adam; use FSDP2 (fsdp=True) or DDP"
        )
    if shards_parameters(args) and (version := _fsdp_version(args)) != 2:
        raise ValueError(
            f"optim={name!r} got FSDP version {version}, wanted 2: version 1 gives the optimizer flat vectors, on "
            "which it could only be Adam; set fsdp_config={'version': 2}, or fsdp_version: 2 in accelerate's config "
            "(transformers 4: FSDP_VERSION=2 in the environment)"
        )


def shards_parameters(args: TrainingArguments) -> bool:
    """Whether the run shards parameters with FSDP, by the arguments or the environment of ``accelerate launch``."""
    return bool(getattr(args, "fsdp", None)) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _fsdp_version(args: TrainingArguments) -> int:
    # With transformers 4, accelerate reads the version from the environment and ignores fsdp_config.
    plugin: dict[str, Any] = getattr(args, "fsdp_plugin_args", None) or {}
    return int(plugin.get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
