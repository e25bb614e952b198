"""What ``hf-soap compare`` compares: optimizers by name, with their options, and settings for all or some of them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import typer

DEFAULT_LR = {
    "adamw_torch": 2.5e-3,
    "adamw_torch_fused": 2.5e-3,
    "soap": 1e-2,
    "kl_soap": 1e-2,
    "shampoo": 1e-2,
    "mars": 5e-3,
    "mars_adamw": 5e-3,
    "mars_lion": 5e-4,
    "mars_shampoo": 4e-2,
    "mars_soap": 1e-2,
}
"""Best of sweeps in powers of two on the default model and text; others and other settings need ``--lr``."""

DEFAULT_BETA2 = {"adamw_torch": 0.95, "adamw_torch_fused": 0.95}
"""Best of 0.95 and 0.999, each at its best learning rate. With the Trainer's 0.999, our optimizers use their own."""

ALIASES = {"adamw": "adamw_torch_fused"}

T = TypeVar("T")


@dataclass(frozen=True)
class Contender:
    """An optimizer with its options.

    Attributes:
        optimizer: A name for ``TrainingArguments(optim=...)``.
        optim_args: Options, as for ``TrainingArguments(optim_args=...)``.
    """

    optimizer: str
    optim_args: str = ""

    @property
    def label(self) -> str:
        """The text of the command line: ``NAME`` or ``NAME:OPTION=VALUE,...``."""
        return f"{self.optimizer}:{self.optim_args}" if self.optim_args else self.optimizer


def read_contenders(typed: Sequence[str]) -> list[Contender]:
    """Read optimizers and their options, and check the names.

    Args:
        typed: Texts of the form ``NAME`` or ``NAME:OPTION=VALUE,...``.

    Returns:
        The contenders, with aliases resolved.

    Raises:
        typer.BadParameter: If the Trainer does not know a name, or a contender is given twice.
    """
    from transformers.training_args import OptimizerNames

    known = [member.value for member in OptimizerNames]
    contenders = [_contender(text) for text in typed]
    for contender in contenders:
        name = contender.optimizer
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"the Trainer knows {', '.join(sorted(known))}"
            raise typer.BadParameter(f"got the optimizer {name!r}, wanted one that the Trainer knows; {remedy}")
        if contenders.count(contender) > 1:
            raise typer.BadParameter(f"got {contender.label} twice, wanted each optimizer once; remove one")
    return contenders


def per_contender(
    option: str, values: Sequence[str], contenders: Sequence[Contender], convert: Callable[[str], T]
) -> dict[str, T]:
    """Read an option that applies to all contenders or to some of them.

    Args:
        option: The option's name, for errors.
        values: ``VALUE``, ``NAME=VALUE`` or ``NAME:OPTION=VALUE,...=VALUE``, as typed; the more specific wins.
        contenders: The optimizers that are compared.
        convert: Converts text to the value; a ValueError refuses the text.

    Returns:
        Values by label, without the contenders for which there is none.

    Raises:
        typer.BadParameter: If a name is not compared, or a value is refused or given twice.
    """
    given: dict[str, T] = {}
    names = {name for contender in contenders for name in (contender.optimizer, contender.label)}
    for value in values:
        target, equals, text = value.rpartition("=")
        if equals:
            target = _contender(target).label
            if target not in names:
                raise typer.BadParameter(f"{option} {value} is for {target}, wanted one of {', '.join(sorted(names))}")
        if target in given:
            raise typer.BadParameter(
                f"got {option} {value} in addition to another value, wanted one; remove one of them"
            )
        try:
            given[target] = convert(text)
        except ValueError as error:
            raise typer.BadParameter(f"{option} {value}: {error}") from error
    from_general_to_specific = ((c.label, key) for c in contenders for key in ("", c.optimizer, c.label))
    return {label: given[key] for label, key in from_general_to_specific if key in given}


def _contender(text: str) -> Contender:
    name, _, optim_args = text.partition(":")
    return Contender(ALIASES.get(name, name), optim_args)


def read_schedule(text: str) -> tuple[str, dict[str, Any]]:
    """Read a learning rate schedule and its options.

    Args:
        text: ``NAME`` or ``NAME:OPTION=VALUE,...``, such as ``cosine_with_restarts:num_cycles=3``.

    Returns:
        The values of ``TrainingArguments(lr_scheduler_type=..., lr_scheduler_kwargs=...)``.

    Raises:
        typer.BadParameter: If the Trainer does not know the name, or the schedule does not take the options.
    """
    import torch
    from transformers.optimization import get_scheduler
    from transformers.trainer_utils import SchedulerType

    name, _, options = text.partition(":")
    known = [member.value for member in SchedulerType]
    if name not in known:
        raise typer.BadParameter(f"got the schedule {name!r}, wanted one of the Trainer's: {', '.join(known)}")
    pairs = (option.partition("=") for option in options.split(",") if option)
    kwargs = {key: _number_or_text(value) for key, _, value in pairs}
    try:
        get_scheduler(name, torch.optim.SGD([torch.zeros(1)]), 0, 1, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"got the schedule {text!r}, whose options are wrong: {error}") from error
    return name, kwargs


def _number_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def positive_int(text: str) -> int:
    """Return a number of at least 1.

    Args:
        text: As typed.

    Raises:
        ValueError: If it is not such a number.
    """
    if (value := int(text)) < 1:
        raise ValueError(f"must be >= 1, got {value}")
    return value


def whole_numbers(option: str, text: str, convert: Callable[[str], int]) -> list[int]:
    """Read numbers split by commas.

    Args:
        option: The option's name, for errors.
        text: As typed.
        convert: Converts text to a number; a ValueError refuses the text.

    Returns:
        The numbers in the order given, each once.

    Raises:
        typer.BadParameter: If one is refused.
    """
    try:
        return list(dict.fromkeys(convert(part) for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise typer.BadParameter(f"{option} {text}: {error}; split whole numbers by commas") from error


def read_seeds(text: str) -> list[int]:
    """Read a number of seeds, or a list of them.

    Args:
        text: As typed: a number of seeds, or a list split by commas.

    Returns:
        The seeds.

    Raises:
        typer.BadParameter: If there are none.
    """
    if "," in text:
        return whole_numbers("--seeds", text, int)
    return list(range(*whole_numbers("--seeds", text, positive_int)))
