"""Optimizer names in ``TrainingArguments(optim=...)``, and what the Trainer makes of them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

from hf_soap.config import options
from hf_soap.distributed.dtensor import is_sharded, rank, ranks
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.optimizers import arguments, grouping
from hf_soap.optimizers.names import ENTRIES
from hf_soap.rules.layout import FACTOR_RATIO

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

HF_LEARNING_RATE = 5e-5

GATHERS_STATE: ContextVar[bool] = ContextVar("GATHERS_STATE", default=False)
"""Whether the trainer that makes the optimizer brings all of its state to rank 0 before it saves."""


def class_and_kwargs(args: TrainingArguments, model: nn.Module | None) -> tuple[type[BlockOptimizer], dict[str, Any]]:
    """Returns what ``Trainer.get_optimizer_cls_and_kwargs`` must for a name registered here.

    Args:
        args: Training arguments.
        model: The model, for parameter names; without one nothing can be routed by name.

    Returns:
        A class that takes the Trainer's param groups, and the keyword arguments for it.

    Raises:
        ValueError: As :func:`hf_soap.optimizers.arguments.resolve`.
    """
    _follow_log_level(args)
    entry, config = ENTRIES[arguments.optimizer_name(args)], arguments.resolve(args)
    under_ddp = args.world_size > 1 and not arguments.shards_parameters(args)
    if under_ddp and getattr(config, "shard_mode", "local") == "owner" and not GATHERS_STATE.get():
        raise ValueError(
            f"optim={config.name!r} got shard_mode='owner' under DDP, wanted a trainer that gathers the state of all "
            "ranks before it saves what rank 0 has; use hf_soap.SoapTrainer, FSDP2, or shard_mode='local'"
        )
    kwargs = {"lr": args.learning_rate, **config.constructor_kwargs()}
    if kwargs.get("distributed_refresh", False) is None:
        kwargs["distributed_refresh"] = under_ddp
    _report_once(config.name, ", ".join(f"{key}={value}" for key, value in kwargs.items()), _passed_over(args, config))
    if args.learning_rate == HF_LEARNING_RATE:
        _warn_learning_rate_once(config.name, _learning_rate_advice(config, model))
    if args.optim_target_modules:
        _warn_target_modules_once(config.name, str(args.optim_target_modules))
    return _grouping_class(entry.optimizer, config, model), kwargs


def _passed_over(args: TrainingArguments, config: options.OptimizerConfig) -> str:
    """Says which defaults of Transformers did not count, and how to have them."""
    changed, known = arguments.changed_adam_arguments(args), options.option_fields(type(config))
    passed = []
    for option, (argument, default) in arguments.HF_ADAM.items():
        if option not in known or option in changed:
            continue
        ours = getattr(config, option)
        if ours == known[option].default != default:
            passed.append(
                f"{option}={ours:g}, not {argument}={default:g} (optim_args='{option}={default:g}' has that)"
            )
    return f". Transformers' default for AdamW counts as not set: {'; '.join(passed)}" if passed else ""


def _learning_rate_advice(config: options.OptimizerConfig, model: nn.Module | None) -> str:
    """Words a learning rate to start from, for the task as far as the model shows it."""
    published = "is published with" if config.lr_is_published else "is best started from"
    scratch = f"{config.name} {published} {config.lr:g} for training from scratch"
    # Lion's updates have the size of their signs, for which its paper takes 3 to 10 times less than AdamW.
    lion = getattr(config, "variant", "") == "lion"
    tuned = "a tenth to a third of AdamW's usual rate" if lion else "about AdamW's usual rate, up to a few times that"
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        return f"for adapters start from {tuned}; {scratch}"
    # Empty unless a model or its config was loaded from somewhere; the config of a new model may have been as well.
    if origin := getattr(getattr(model, "config", None), "_name_or_path", None):
        return f"to fine-tune {options.shown(str(origin))} start from {tuned}; {scratch}"
    return f"{scratch}; to fine-tune pretrained weights start from {tuned}"


def _grouping_class(
    optimizer: type[BlockOptimizer], config: options.OptimizerConfig, model: nn.Module | None
) -> type[BlockOptimizer]:
    """Returns a class that splits the Trainer's param groups by rule and then makes a plain ``optimizer``.

    The Trainer takes an optimizer class and calls it with its decay groups, which subclasses may have changed. Groups
    of our own in their place, or a factory, would bypass those.
    """
    # Weakly: a class is part of a cycle, and a model that it held would stay until the collector comes by.
    named: Callable[[], nn.Module | None] = (lambda: None) if model is None else weakref.ref(model)

    class FromTrainerGroups(optimizer):  # type: ignore[misc, valid-type]
        def __new__(cls, params: Iterable[Any], **kwargs: Any) -> Any:
            made = optimizer(grouping.with_overrides(params, named(), config), **kwargs)
            logger.info("%s routes parameters as follows\n%s", config.name, grouping.routing_table(made))
            _report_sharding(made, config.name)
            return made

    FromTrainerGroups.__name__ = FromTrainerGroups.__qualname__ = optimizer.__name__
    return FromTrainerGroups


def _report_sharding(optimizer: BlockOptimizer, name: str) -> None:
    """Says behind the first step what became of parameters that were sharded after the optimizer was made."""

    def report(*_: Any) -> None:
        handle.remove()
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if rank() == 0 and any(is_sharded(param) for param in params):
            logger.info(
                "%s on rank 0 of %d. With shard_mode=local norms and Newton-Schulz act on a rank's part of a matrix, "
                "and a factor of more than %d times the entries of the part is cut into blocks\n%s",
                name,
                ranks(),
                FACTOR_RATIO,
                grouping.routing_table(optimizer),
            )

    handle = optimizer.register_step_post_hook(report)


def read_as_from_command_line(args: Any) -> None:
    """Turns ``optim_args`` of a file into text, and numbers that YAML reads as text into numbers.

    Whoever looks at the arguments later, the Trainer, a recipe, ``training_args.bin`` where this package is missing,
    then meets what a command line would have given.

    Args:
        args: Training arguments, which are changed.

    Raises:
        ValueError: If text is no number, or ``optim_args`` cannot be written as text.
    """
    args.optim_args = options.as_text(args.optim_args)
    for name in ("learning_rate", "weight_decay", *(argument for argument, _ in arguments.HF_ADAM.values())):
        value = getattr(args, name)
        if isinstance(value, str):
            try:
                setattr(args, name, float(value))
            except ValueError:
                raise ValueError(f"{name} must be a number, got {options.shown(value)}; for example 3.0e-3") from None


def log_every(args: TrainingArguments) -> int:
    """Returns the steps between two entries of diagnostics that ``optim_args`` asks for, or 0."""
    every: int = getattr(arguments.resolve(args), "log_every", 0) if arguments.optimizer_name(args) in ENTRIES else 0
    return every


def _follow_log_level(args: TrainingArguments) -> None:
    """Lets the package's logger follow ``log_level``, so that what it did is seen where the Trainer's messages are."""
    package = logging.getLogger("hf_soap")
    if package.level == logging.NOTSET:
        package.setLevel(args.get_process_log_level())
    if not package.hasHandlers():
        package.addHandler(logging.StreamHandler())


@cache
def _report_once(name: str, settings: str, passed_over: str) -> None:
    logger.info("optim=%s runs with %s%s", name, settings, passed_over)


@cache
def _warn_learning_rate_once(name: str, advice: str) -> None:
    logger.warning(
        "optim=%s: learning_rate is %g, the Transformers default for AdamW. Set learning_rate: %s.",
        name,
        HF_LEARNING_RATE,
        advice,
    )


@cache
def _warn_target_modules_once(name: str, modules: str) -> None:
    logger.warning(
        "optim_target_modules=%s is for GaLore and its relatives, and optim=%s does not read it; what shall follow "
        "Adam is named by adam_modules in optim_args.",
        modules,
        name,
    )
