"""What determined a run but is not in its recipe, in words for the model card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_soap.hub import adapters, recipes

_PARALLEL = ("fsdp", "deepspeed", "parallelism_config", "mp_parameters")
"""Fields of TrainingArguments that are not in recipes although they change rounding."""

_LIBRARIES = ("transformers", "trl", "accelerate", "peft", "hf_soap", "builtins")
_BY_DEFAULT = ("DefaultFlowCallback", "PrinterCallback", "ProgressCallback", "NotebookProgressCallback")
_BY_ARGUMENTS = ("transformers.integrations", "transformers.trainer_jit_checkpoint", "hf_soap.")


def of_launch(trainer: Any) -> list[str]:
    """Lists what determined a run in addition to its program and the recipe.

    Args:
        trainer: A trainer after training, in a process that ``hf-soap run`` started.

    Returns:
        A phrase for each.
    """
    launch = recipes.LAUNCH
    return [*(recipes.options_of_launch(launch, trainer.args)[1] if launch else []), *_parallel(trainer.args)]


def of_python(trainer: Any) -> list[str]:
    """Lists what a Trainer was given in Python, for a run whose program is not known.

    Args:
        trainer: A trainer after training.

    Returns:
        A phrase for each, the most important first.
    """
    return [*_given(trainer), *_parallel(trainer.args)]


def optimizer_was_given(trainer: Any) -> bool:
    """Whether the program created the optimizer, so that ``optim`` and ``optim_args`` had no effect."""
    if getattr(trainer, "optimizer_cls_and_kwargs", None) is not None:
        return True
    # A subclass that creates its optimizer itself may bypass the code that sets this attribute.
    made: bool = vars(trainer).get("_given_optimizer", trainer.optimizer is not None)
    return made


def _given(trainer: Any) -> Iterator[str]:
    yield f"the model, a {_model_name(trainer.model)}, with its weights before training"
    if getattr(trainer, "model_init", None) is not None:
        yield f"model_init, {_named(trainer.model_init)}"
    _, missing = adapters.options_of(trainer.model, trl=is_trl(trainer))
    yield from missing
    for what, value in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset)):
        if value is not None:
            yield f"the {what} data"
    if (processing := getattr(trainer, "processing_class", None)) is not None:
        yield f"the {type(processing).__name__} that prepared them"
    if not _is_of_library(trainer.data_collator):
        yield f"the data collator, {_named(trainer.data_collator)}"
    if optimizer_was_given(trainer):
        name = type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__
        yield f"the optimizer, a {name} that the program created: optim and optim_args had no effect"
    if vars(trainer).get("_given_scheduler"):
        yield "the learning rate schedule, which the program created: lr_scheduler_type had no effect"
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        value = getattr(trainer, name, None)
        if callable(value) and not _is_of_library(value):
            yield f"{name}, {_named(value)}"
    for callback in trainer.callback_handler.callbacks:
        kind = type(callback)
        if kind.__name__ not in _BY_DEFAULT and not kind.__module__.startswith(_BY_ARGUMENTS):
            yield f"the callback {kind.__name__}"
    for kind in type(trainer).__mro__:
        changed = [name for name, value in vars(kind).items() if callable(value) and name != "__init__"]
        if kind.__module__.partition(".")[0] not in _LIBRARIES and changed:
            yield f"the class {kind.__name__}, which defines {', '.join(changed)}"


def _parallel(args: Any) -> Iterator[str]:
    if args.world_size > 1:
        yield f"the number of processes, {args.world_size}"
    for name in _PARALLEL:
        if getattr(args, name, None):
            yield f"the argument {name}"


def is_trl(trainer: Any) -> bool:
    """Whether a Trainer is an instance of one of TRL's classes or of a subclass."""
    return any(kind.__module__.partition(".")[0] == "trl" for kind in type(trainer).__mro__)


def _is_of_library(value: Any) -> bool:
    inner = getattr(value, "func", value)  # of functools.partial
    module = getattr(inner, "__module__", None) or type(inner).__module__
    return str(module).partition(".")[0] in _LIBRARIES


def _named(value: Any) -> str:
    name = getattr(value, "__name__", type(value).__name__)
    return str(name) if str(name).isidentifier() else "a function without a name"


def _model_name(model: Any) -> str:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
