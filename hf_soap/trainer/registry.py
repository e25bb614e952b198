"""Optimizer names in ``TrainingArguments(optim=...)``, and the optimizers that the Trainer creates from them."""

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
from hf_soap.hub import arguments
from hf_soap.optimizers import grouping
from hf_soap.optimizers.names import ENTRIES
from hf_soap.rules.layout import FACTOR_RATIO

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

HF_LEARNING_RATE = 5e-5

GATHERS_STATE: ContextVar[bool] = ContextVar("GATHERS_STATE", default=False)
"""Whether the trainer that creates the optimizer gathers all of its state on rank 0 before it saves."""


def class_and_kwargs(args: TrainingArguments, model: nn.Module | None) -> tuple[type[BlockOptimizer], dict[str, Any]]:
    """Returns the class and arguments for ``Trainer.get_optimizer_cls_and_kwargs``, for one of our names.

    Args:
        args: Training arguments.
        model: The model, for parameter names; without it, parameters cannot be routed by name.

    Returns:
        A class that takes the Trainer's param groups, and the keyword arguments for it.

    Raises:
        ValueError: See :func:`hf_soap.hub.arguments.resolve`.
    """
    _follow_log_level(args)
    entry, config = ENTRIES[arguments.optimizer_name(args)], arguments.resolve(args)
    under_ddp = args.world_size > 1 and not arguments.shards_parameters(args)
    if under_ddp and getattr(config, "shard_mode", "local") == "owner" and not GATHERS_STATE.get():
        raise ValueError(
            f"optim={config.name!r} got shard_mode='owner' under DDP, wanted a trainer that gathers the state of all "
            "ranks before rank 0 saves it; use hf_soap.SoapTrainer, FSDP2, or shard_mode='local'"
        )
    kwargs = {"lr": args.learning_rate, **config.constructor_kwargs()}
    if kwargs.get("distributed_refresh", False) is None:
        kwargs["distributed_refresh"] = under_ddp
    _report_once(
        config.name, ", ".join(f"{key}={value}" for key, value in kwargs.items()), _ignored_defaults(args, config)
    )
    if args.learning_rate == HF_LEARNING_RATE:
        _warn_learning_rate_once(config.name, _learning_rate_advice(config, model))
    if args.optim_target_modules:
        _warn_target_modules_once(config.name, str(args.optim_target_modules))
    return _grouping_class(entry.optimizer, config, model), kwargs


def _ignored_defaults(args: TrainingArguments, config: options.OptimizerConfig) -> str:
    """Says which defaults of Transformers are ignored, and how to use them."""
    changed, known = arguments.changed_adam_arguments(args), options.option_fields(type(config))
    ignored = []
    for option, (argument, default) in arguments.HF_ADAM.items():
        if option not in known or option in changed:
            continue
        ours = getattr(config, option)
        if ours == known[option].default != default:
            ignored.append(
                f"{option}={ours:g}, not {argument}={default:g} (optim_args='{option}={default:g}' sets that)"
            )
    return f". Transformers' defaults for AdamW are ignored: {'; '.join(ignored)}" if ignored else ""


def _learning_rate_advice(config: options.OptimizerConfig, model: nn.Module | None) -> str:
    """Suggests a learning rate to start from, for fine-tuning or training as far as the model shows which."""
    published = "is published with" if config.lr_is_published else "is best started from"
    scratch = f"{config.name} {published} {config.lr:g} for training from scratch"
    # Lion's updates are signs; its paper uses a learning rate 3 to 10 times smaller than AdamW's.
    lion = getattr(config, "variant", "") == "lion"
    tuned = "a tenth to a third of AdamW's usual rate" if lion else "about AdamW's usual rate, up to a few times that"
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        return f"for adapters start from {tuned}; {scratch}"
    # Empty unless a model or its config was loaded from somewhere; a new model's config may be loaded too.
    if origin := getattr(getattr(model, "config", None), "_name_or_path", None):
        return f"to fine-tune {options.shown(str(origin))} start from {tuned}; {scratch}"
    return f"{scratch}; to fine-tune pretrained weights start from {tuned}"


def _grouping_class(
    optimizer: type[BlockOptimizer], config: options.OptimizerConfig, model: nn.Module | None
) -> type[BlockOptimizer]:
    """Returns a class that adds overrides to the Trainer's param groups and then creates a plain ``optimizer``.

    The Trainer takes an optimizer class and calls it with its decay groups, which subclasses may have changed. Other
    groups, or a factory of optimizers, would bypass those changes.
    """
    # A weak reference: classes are in reference cycles, and would keep the model until the garbage collector runs.
    named: Callable[[], nn.Module | None] = (lambda: None) if model is None else weakref.ref(model)

    class FromTrainerGroups(optimizer):  # type: ignore[misc, valid-type]
        def __new__(cls, params: Iterable[Any], **kwargs: Any) -> Any:
            made = grouping.create(optimizer, params, named(), config, **kwargs)
            logger.info("%s routes parameters as follows\n%s", config.name, grouping.routing_table(made))
            _report_sharding(made, config.name)
            return made

    FromTrainerGroups.__name__ = FromTrainerGroups.__qualname__ = optimizer.__name__
    return FromTrainerGroups


def _report_sharding(optimizer: BlockOptimizer, name: str) -> None:
    """Logs the routing after the first step if parameters were sharded after the optimizer was created."""

    def report(*_: Any) -> None:
        handle.remove()
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if rank() == 0 and any(is_sharded(param) for param in params):
            logger.info(
                "%s on rank 0 of %d. With shard_mode=local, norms and Newton-Schulz act on a rank's part of a matrix, "
                "and a factor of more than %d times the entries of the part is split into blocks\n%s",
                name,
                ranks(),
                FACTOR_RATIO,
                grouping.routing_table(optimizer),
            )

    handle = optimizer.register_step_post_hook(report)


def read_as_from_command_line(args: Any) -> None:
    """Converts ``optim_args`` from a file to text, and numbers that YAML reads as text to numbers.

    All later readers, such as the Trainer, a recipe, or a process that loads ``training_args.bin`` without this
    package, then find the same values as from a command line.

    Args:
        args: Training arguments, which are modified.

    Raises:
        ValueError: If text is not a number, or ``optim_args`` cannot be converted to text.
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
    """Returns the ``log_every`` of ``optim_args``, or 0."""
    every: int = getattr(arguments.resolve(args), "log_every", 0) if arguments.optimizer_name(args) in ENTRIES else 0
    return every


def _follow_log_level(args: TrainingArguments) -> None:
    """Sets the package's logger to ``log_level``, so that its messages are shown like the Trainer's."""
    package = logging.getLogger("hf_soap")
    if package.level == logging.NOTSET:
        package.setLevel(args.get_process_log_level())
    if not package.hasHandlers():
        package.addHandler(logging.StreamHandler())


@cache
def _report_once(name: str, settings: str, ignored: str) -> None:
    logger.info("optim=%s runs with %s%s", name, settings, ignored)


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
        "optim_target_modules=%s is for GaLore and similar optimizers, and optim=%s does not read it; to update some "
        "modules by Adam, set adam_modules in optim_args.",
        modules,
        name,
    )
