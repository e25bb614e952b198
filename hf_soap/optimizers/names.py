"""The names of the optimizers, the class and options of each, and how to register others."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib.metadata import entry_points

import torch
from torch.nn import Parameter

from hf_soap.config import configs
from hf_soap.config.options import OptimizerConfig
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.engine.plan import Plan
from hf_soap.optimizers.mars import MARS
from hf_soap.optimizers.muon import Muon, SoapMuon
from hf_soap.optimizers.shampoo import Shampoo
from hf_soap.optimizers.soap import SOAP
from hf_soap.rules.base import Rule
from hf_soap.rules.storage import name_of
from hf_soap.rules.wrapping import WrappingRule

logger = logging.getLogger(__name__)

ENTRY_POINTS = "hf_soap.optimizers"
"""Group of entry points. Each names an optimizer class, which has a ``config``."""


@dataclass(frozen=True)
class Entry:
    """One registered name: the optimizer class and the config that its ``optim_args`` are read into."""

    optimizer: type[BlockOptimizer]
    config: type[OptimizerConfig]


OURS: dict[type[BlockOptimizer], tuple[type[OptimizerConfig], ...]] = {
    SOAP: (configs.SoapConfig, configs.KlSoapConfig),
    Shampoo: (configs.ShampooConfig, configs.KlShampooConfig),
    MARS: (
        configs.MarsConfig,
        configs.MarsAdamWConfig,
        configs.MarsLionConfig,
        configs.MarsShampooConfig,
        configs.MarsSoapConfig,
        configs.MarsMConfig,
    ),
    Muon: (configs.MuonConfig,),
    SoapMuon: (configs.SoapMuonConfig,),
}

ENTRIES: dict[str, Entry] = {
    config.name: Entry(optimizer, config) for optimizer, listed in OURS.items() for config in listed
}

CALL_AFTER_REGISTERING: list[Callable[[], None]] = []
"""Called after a name is added to :data:`ENTRIES`, since transformers lists the names too."""


def register(optimizer: type[BlockOptimizer], config: type[OptimizerConfig] | None = None) -> None:
    """Registers an optimizer under the name of its config, like those of this package.

    Its name then works in ``TrainingArguments(optim=...)``, ``optim_args``, ``hf-soap plan``, recipes and cards.

    Args:
        optimizer: A subclass of :class:`hf_soap.ConfiguredOptimizer` that defines ``plan``.
        config: A frozen dataclass with its options, a subclass of :class:`hf_soap.CommonOptions`; None takes the
            optimizer's ``config``.

    Raises:
        TypeError: If a class is of the wrong kind, or a rule does not define a method that its state or traits
            require.
        ValueError: If the name belongs to another optimizer, or the defaults are out of range.
    """
    config = getattr(optimizer, "config", None) if config is None else config
    if not (isinstance(optimizer, type) and issubclass(optimizer, BlockOptimizer)):
        raise TypeError(f"got {optimizer!r}, wanted a subclass of hf_soap.ConfiguredOptimizer")
    if not (isinstance(config, type) and issubclass(config, configs.CommonOptions) and is_dataclass(config)):
        raise TypeError(
            f"{optimizer.__name__} got the config {config!r}, wanted a frozen dataclass that inherits from "
            "hf_soap.CommonOptions or hf_soap.FactorOptions"
        )
    for attribute in ("name", "lr"):
        if not hasattr(config, attribute):
            raise TypeError(f"{config.__name__} has no {attribute}, wanted a class attribute {attribute}: ClassVar")
    known = ENTRIES.get(config.name)
    # A notebook's cell that runs again defines its class again.
    if known is not None and _path(known.optimizer) != _path(optimizer):
        raise ValueError(
            f"the name {config.name!r} belongs to {known.optimizer.__name__}, wanted another; change "
            f"{config.__name__}.name"
        )
    if config.name.lower() in _names_of_transformers():
        raise ValueError(
            f"the name {config.name!r} belongs to transformers, wanted another; change {config.__name__}.name"
        )
    for plan in _sample_plans(optimizer, config):
        check_rule(plan)
    ENTRIES[config.name] = Entry(optimizer, config)
    for call in CALL_AFTER_REGISTERING:
        call()


def _names_of_transformers() -> set[str]:
    """Returns the names and values of transformers' own optimizers in lower case, if it has been imported."""
    members = getattr(sys.modules.get("transformers.training_args"), "OptimizerNames", ())
    # Members that this package added are pickled in a way of their own.
    theirs = [member for member in members if "__reduce_ex__" not in vars(member)]
    return {text.lower() for member in theirs for text in (member.name, member.value)}


def _path(optimizer: type[BlockOptimizer]) -> tuple[str, str]:
    return optimizer.__module__, optimizer.__qualname__


@cache
def load_entry_points() -> None:
    """Registers the optimizers of installed packages. One that fails is skipped with a warning that names it."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            register(entry.load())
        except Exception as error:
            logger.warning("the optimizer %s of the entry points could not be registered: %s", entry.value, error)


def _sample_plans(optimizer: type[BlockOptimizer], config: type[OptimizerConfig]) -> list[Plan]:
    """Returns the plans of an optimizer for tensors of several shapes, with the config's defaults."""
    shapes = [(4, 4), (6, 3), (5,), (3, 4, 5), ()]
    params = [Parameter(torch.zeros(shape, device="meta")) for shape in shapes]
    make: Callable[..., BlockOptimizer] = optimizer
    made = make(params, lr=config.lr, **config().constructor_kwargs())
    return [made.plan_of(member.settings, member.param) for member in made.members()]


def check_rule(plan: Plan) -> None:
    """Checks that a rule defines what its state and its traits require.

    Raises:
        TypeError: If a method or attribute is missing; the message names it.
    """
    rule, name = plan.rule, type(plan.rule).__name__
    if not isinstance(rule, Rule):
        raise TypeError(f"the plan of a tensor has the rule {rule!r}, wanted a subclass of hf_soap.rules.base.Rule")
    specs, traits = rule.state_spec(plan.layout), rule.traits(plan.layout)
    parts = [rule]
    while isinstance(parts[-1], WrappingRule):
        parts.append(parts[-1].inner)
    for role, spec in specs.items():
        if not any(name_of(role) in part.roles for part in parts):
            raise TypeError(f"{name} declares the state {role!r}, wanted {name_of(role)!r} in {name}.roles; add it")
        if (spec.mode is None) != (spec.kind == "moment"):
            raise TypeError(f"{name} declares {role!r} as a {spec.kind} with mode={spec.mode}; only moments have none")
    needs = {
        "rebuild": any(spec.kind in ("basis", "root") for spec in specs.values()),
        "seed": traits.first_grad_seeds,
        "refresh": traits.refreshes_last,
        "fused_step": traits.has_fused_step,
    }
    for method, needed in needs.items():
        inherited = {getattr(Rule, method), getattr(WrappingRule, method)}
        # A wrapper forwards all of these to the rule that it wraps, except for the fused step.
        asked = parts if method in vars(WrappingRule) else parts[:1]
        if needed and all(getattr(type(part), method) in inherited for part in asked):
            raise TypeError(f"{name} must define {method}, since its state or traits require it")
