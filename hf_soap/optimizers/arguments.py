"""What ``TrainingArguments`` say of the optimizer: its name and its options."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from hf_soap.config import options
from hf_soap.optimizers.names import ENTRIES

if TYPE_CHECKING:
    from transformers import TrainingArguments

HF_ADAM = {"beta1": ("adam_beta1", 0.9), "beta2": ("adam_beta2", 0.999), "eps": ("adam_epsilon", 1e-8)}
"""Option to the argument of TrainingArguments that may set it, and the default by which that counts as not set."""


def optimizer_name(args: TrainingArguments) -> str:
    """Returns ``args.optim`` as a plain string, whether it is a member of OptimizerNames or text."""
    return str(getattr(args.optim, "value", args.optim))


def resolve(args: TrainingArguments) -> options.OptimizerConfig:
    """Reads the options of the optimizer that ``args.optim`` names.

    A value comes from ``optim_args``; else, for betas and eps, from ``adam_beta1``, ``adam_beta2`` and
    ``adam_epsilon`` where they differ from the Transformers defaults; else it is the published default. The arguments
    do not say whether somebody set ``adam_beta1=0.9`` or left it there, since a command line sets every one of them:
    ``optim_args="beta1=0.9"`` is how to ask for a value that is AdamW's default, and what won is logged at INFO.

    Args:
        args: Training arguments whose ``optim`` is a name registered here.

    Returns:
        The checked options.

    Raises:
        ValueError: If ``optim_args`` is wrong, or the run shows the optimizer flat vectors (DeepSpeed, FSDP1).
    """
    name = optimizer_name(args)
    _refuse_flat_parameters(args, name)
    config, changed = ENTRIES[name].config, changed_adam_arguments(args)
    if ignored := changed.keys() - options.option_fields(config).keys():
        argument, default = HF_ADAM[min(ignored)]
        raise ValueError(
            f"optim={name!r} got {argument}={getattr(args, argument)}, wanted its default, {default:g}: it has no "
            f"{min(ignored)}; leave {argument} out"
        )
    return options.parse_optim_args(args.optim_args, config, changed)


def changed_adam_arguments(args: TrainingArguments) -> dict[str, float]:
    """Returns the options that ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` set: those not at their default."""
    return {
        option: getattr(args, argument)
        for option, (argument, default) in HF_ADAM.items()
        if getattr(args, argument) != default
    }


def _refuse_flat_parameters(args: TrainingArguments, name: str) -> None:
    # `accelerate launch` says so by the environment, and the arguments then do not.
    launched = {way for way in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{way}", "").lower() == "true"}
    if getattr(args, "deepspeed", None) or getattr(args, "hf_deepspeed_config", None) or "DEEPSPEED" in launched:
        raise ValueError(
            f"optim={name!r} got DeepSpeed, wanted matrices or shards of them: ZeRO hands the optimizer one flat "
            "vector, on which it could only be Adam; use FSDP2 (fsdp=True) or DDP"
        )
    if shards_parameters(args) and (version := _fsdp_version(args)) != 2:
        raise ValueError(
            f"optim={name!r} got FSDP version {version}, wanted 2: version 1 shows the optimizer flat vectors, on "
            "which it could only be Adam; set fsdp_config={'version': 2}, or fsdp_version: 2 in accelerate's config "
            "(transformers 4: FSDP_VERSION=2 in the environment)"
        )


def shards_parameters(args: TrainingArguments) -> bool:
    """Whether the run shards parameters by FSDP, as the arguments or the environment of ``accelerate launch`` say."""
    return bool(getattr(args, "fsdp", None)) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _fsdp_version(args: TrainingArguments) -> int:
    # transformers 4 leaves it to accelerate, which reads the environment, whatever fsdp_config says.
    plugin: dict[str, Any] = getattr(args, "fsdp_plugin_args", None) or {}
    return int(plugin.get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
