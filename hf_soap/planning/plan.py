"""Estimates for a training run before it starts: memory, work, and settings with which it fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_soap.config import options
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.optimizers import grouping
from hf_soap.optimizers.names import ENTRIES
from hf_soap.planning import costs
from hf_soap.rules.schedule import Schedule

if TYPE_CHECKING:
    from torch import nn

SAVING_OPTIONS: dict[str, tuple[Any, ...]] = {
    "shard_mode": ("owner",),
    "pack_factors": (True,),
    "state_dtype": ("bfloat16",),
    "factorized": (True,),
    "one_sided": (True,),
    # Smaller blocks would always be the fastest, but would be closer and closer to Adam.
    "block_size": (4096, 2048, 1024),
    "precondition_frequency": (20, 50, 100),
}
"""What is tried if a run does not fit: options, and their values that save memory or time."""

Measure = Callable[[options.OptimizerConfig], costs.Cost]


BATCHES = (32_768, 131_072, 524_288)
"""Default numbers of tokens in a step, over all ranks, for which the overhead is shown."""

ADAMW = ("adamw_torch_fused", "adamw_torch")
"""Names of torch's AdamW, with which plans are compared."""


@dataclass(frozen=True)
class AdamW:
    """torch's AdamW, in place of one of our configs; it has no ``optim_args``."""

    name: str = ADAMW[0]

    def to_optim_args(self) -> str:
        """Returns an empty string."""
        return ""


def build(model: nn.Module, params: Iterable[Any], config: options.OptimizerConfig) -> BlockOptimizer:
    """Creates an optimizer from a config as the Trainer does.

    Args:
        model: The model, for the names of parameters.
        params: Param groups as the Trainer creates them, or parameters; they may be on the meta device.
        config: The options.

    Returns:
        The optimizer, with the config's learning rate, to which an ``lr`` in ``modules`` is in proportion.

    Raises:
        ValueError: If options contradict each other, or a pattern matches no parameter.
    """
    kwargs = config.constructor_kwargs()
    return grouping.create(ENTRIES[config.name].optimizer, params, model, config, **kwargs)


@dataclass(frozen=True)
class Run:
    """A planned run: the model, its param groups, and the ranks.

    Attributes:
        model: The model; it may be on the meta device.
        groups: Param groups as the Trainer creates them.
        ranks: Number of ranks.
        sharded: Whether FSDP2 shards the parameters over the ranks; otherwise each has all of them.
        tokens: Tokens in a step, over all ranks.
    """

    model: nn.Module
    groups: Sequence[dict[str, Any]]
    ranks: int = 1
    sharded: bool = False
    tokens: int = BATCHES[1]

    def mode(self, config: options.OptimizerConfig | AdamW) -> costs.Mode:
        """Returns how parameters and state are distributed under a config."""
        owner = getattr(config, "shard_mode", "local") == "owner"
        if self.sharded:
            return "owner" if owner else "local"
        return "ddp, owner" if owner else "ddp"

    def cost(self, config: options.OptimizerConfig | AdamW) -> costs.Cost:
        """Returns the cost of the optimizer; raises ValueError if options contradict each other."""
        if isinstance(config, AdamW):
            parts = [math.prod(self._part(param)) * param.element_size() for _, param in self._trained()]
            state = sum(2 * part + torch.float32.itemsize for part in parts)  # two moments, and the step count
            # torch documents this as the additional memory of its version that is not fused.
            return costs.Cost(state=state, temporaries=0 if config.name == ADAMW[0] else sum(parts))
        optimizer = build(self.model, self.groups, config)
        return costs.cost(optimizer, ranks=self.ranks, mode=self.mode(config))

    def _trained(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        return ((group, param) for group in self.groups for param in group["params"])

    def _part(self, param: Tensor) -> tuple[int, ...]:
        return costs.largest_part(param, self.ranks if self.sharded else 1)

    def weights(self, *, trained: bool) -> int:
        """Returns the bytes of all parameters on a rank, or of the trained ones; gradients take as many."""
        return sum(
            math.prod(self._part(param)) * param.element_size()
            for param in self.model.parameters()
            if param.requires_grad or not trained
        )

    def memory(self, cost: costs.Cost) -> float:
        """Returns the bytes of weights, gradients and optimizer on a rank."""
        return self.weights(trained=False) + self.weights(trained=True) + cost.state + cost.temporaries

    @cached_property
    def model_work(self) -> float:
        """Estimated floating point operations of forward and backward on a rank; see :func:`model_work`."""
        return model_work(self.model, tokens=self.tokens) / self.ranks

    def overhead(self, cost: costs.Cost) -> float:
        """Returns the operations of preconditioning as a share of those of forward and backward."""
        return cost.work / self.model_work

    def routing(self, config: options.OptimizerConfig | AdamW) -> list[Row]:
        """Returns how each tensor is treated; see :func:`routing`."""
        if not isinstance(config, AdamW):
            optimizer = build(self.model, self.groups, config)
            return routing(self.model, optimizer, ranks=self.ranks, mode=self.mode(config))
        names: dict[Tensor, str] = {param: name for name, param in self.model.named_parameters()}
        rows = _Rows()
        for group, param in self._trained():
            state = 2 * math.prod(self._part(param)) * param.element_size() + torch.float32.itemsize
            rows.add(names[param], tuple(param.shape), "AdamW", (), decays=group["weight_decay"] != 0, state=state)
        return rows.listed()


def model_work(model: nn.Module, *, tokens: int) -> float:
    """Estimates the floating point operations of forward and backward.

    There are six for each trained parameter and token, and four for each frozen one, whose gradient is not computed.
    Of the experts of a mixture, only those that a token is routed to count. Attention scores and recomputed
    activations are not counted.

    Args:
        model: A transformers model; it may be on the meta device.
        tokens: Tokens in a step.
    """
    config: Any = getattr(model, "config", None)
    with suppress(AttributeError, ValueError):  # there is none, or several; such models have no experts
        config = config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), 1)
    active = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    return tokens * sum(
        param.numel() * (6 if param.requires_grad else 4) * (active if ".experts." in name else 1)
        for name, param in model.named_parameters()
    )


@dataclass(frozen=True)
class Row:
    """Tensors of the same shape and treatment.

    Attributes:
        example: Name of the first of them.
        tensors: How many there are.
        shape: Their whole shape.
        rule: The rule that updates them.
        sides: Lengths of the sides of a block that have a factor.
        decays: Whether their group has weight decay.
        factors: Bytes of their factors, bases and roots.
        state: Bytes of all their optimizer state.
    """

    example: str
    tensors: int
    shape: tuple[int, ...]
    rule: str
    sides: tuple[int, ...]
    decays: bool
    factors: int
    state: int


def routing(model: nn.Module, optimizer: BlockOptimizer, *, ranks: int, mode: costs.Mode) -> list[Row]:
    """Returns how each tensor is treated; tensors of the same shape and treatment share a row.

    Args:
        model: The model, for the names of parameters.
        optimizer: An optimizer of its whole parameters.
        ranks: Number of ranks.
        mode: How parameters and state are distributed. State on owners is counted in full, other state on the rank
            with the most.
    """
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    rows = _Rows()
    for share in costs.shares(optimizer, ranks=ranks, mode=mode):
        layout = share.plan.layout
        rule = grouping.describe(share.plan, share.own, owned=share.owned)
        sides = tuple(layout.block[i] for i in layout.sides)
        name, shape, decays = names[share.param], tuple(share.param.shape), share.group["weight_decay"] != 0
        rows.add(name, shape, rule, sides, decays=decays, factors=share.factors, state=share.state + share.average)
    return rows.listed()


class _Rows:
    """Collects rows; tensors of the same shape and treatment share one."""

    def __init__(self) -> None:
        self._rows: dict[tuple[Any, ...], Row] = {}

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        rule: str,
        sides: tuple[int, ...],
        *,
        decays: bool,
        state: int,
        factors: int = 0,
    ) -> None:
        key = (shape, rule, sides, decays)
        known = self._rows.setdefault(key, Row(name, 0, *key, 0, 0))
        self._rows[key] = replace(
            known, tensors=known.tensors + 1, factors=known.factors + factors, state=known.state + state
        )

    def listed(self) -> list[Row]:
        return list(self._rows.values())


def settings_that_fit(
    config: options.OptimizerConfig, measure: Measure, fits: Callable[[costs.Cost], bool]
) -> list[tuple[options.OptimizerConfig, costs.Cost]]:
    """Finds the settings that fit with the fewest changed options, those with the least work first.

    Args:
        config: The options to start from.
        measure: Returns the cost of a config; it may raise ValueError if options contradict each other.
        fits: Returns whether a cost is acceptable.

    Returns:
        The settings and their costs; an empty list if nothing that was tried fits.
    """
    for changes in range(len(SAVING_OPTIONS) + 1):
        found = []
        for candidate in _candidates(config, changes):
            try:
                cost = measure(candidate)
            except ValueError:
                continue
            if fits(cost):
                found.append((candidate, cost))
        if found:
            return sorted(found, key=lambda pair: pair[1].work)
    return []


def _candidates(config: options.OptimizerConfig, changes: int) -> Iterator[options.OptimizerConfig]:
    known = options.option_fields(type(config))
    for names in itertools.combinations([name for name in SAVING_OPTIONS if name in known], changes):
        for values in itertools.product(*(SAVING_OPTIONS[name] for name in names)):
            changed = dict(zip(names, values, strict=True))
            if all(getattr(config, name) != value for name, value in changed.items()):
                yield replace(config, **changed)


@dataclass(frozen=True)
class Setting:
    """Options of an optimizer and their cost on the rank with the most.

    Attributes:
        optim_args: The options, as text for ``TrainingArguments(optim_args=...)``.
        cost: The cost of the optimizer.
        memory: Total bytes of weights, gradients, optimizer state and temporaries.
        overhead: Operations of preconditioning as a share of those of forward and backward.
    """

    optim_args: str
    cost: costs.Cost
    memory: float
    overhead: float


@dataclass(frozen=True)
class Batch:
    """The overhead at one number of tokens in a step.

    Attributes:
        tokens: Tokens in a step, over all ranks.
        model_work: Operations of forward and backward on a rank.
        overhead: Operations of preconditioning as a share of those of forward and backward.
    """

    tokens: int
    model_work: float
    overhead: float


@dataclass(frozen=True)
class Report:
    """The report of ``hf-soap plan``.

    Attributes:
        model: Class of the model; with adapters, class of the base model.
        parameters: Number of parameters.
        trained: Number of trained parameters.
        optim: Name of the optimizer.
        ranks: Number of ranks.
        mode: How parameters and state are distributed.
        tokens: Tokens in a step, over all ranks.
        tensors: How the tensors are treated.
        weights: Bytes of weights on a rank.
        gradients: Bytes of gradients on a rank.
        model_work: Operations of forward and backward on a rank in a step.
        batches: The overhead at several numbers of tokens in a step.
        early_updates: Updates at the start in which refreshes are more frequent than in this estimate.
        early_refreshes: Refreshes of a basis in these updates.
        asked: The requested settings.
        adamw: torch's AdamW on the same ranks.
        fits: Whether the requested settings are within the limits; None without limits.
        suggestions: If they are not, the settings that are, with the fewest changed options; least work first.
    """

    model: str
    parameters: int
    trained: int
    optim: str
    ranks: int
    mode: costs.Mode
    tokens: int
    tensors: list[Row]
    weights: int
    gradients: int
    model_work: float
    batches: list[Batch]
    early_updates: int
    early_refreshes: int
    asked: Setting
    adamw: Setting
    fits: bool | None
    suggestions: list[Setting]


def report(
    run: Run,
    config: options.OptimizerConfig | AdamW,
    *,
    memory: float | None = None,
    overhead: float | None = None,
    batches: Sequence[int] = (),
) -> Report:
    """Plans a run.

    Args:
        run: The run.
        config: The optimizer's options.
        memory: Bytes of memory of a rank; None sets no limit.
        overhead: Largest share of forward and backward that preconditioning may take; None sets no limit.
        batches: Numbers of tokens in a step for which to report the overhead; an empty one uses that of the run.

    Returns:
        The report.

    Raises:
        ValueError: If options contradict each other.
    """

    def fits(cost: costs.Cost) -> bool:
        small = memory is None or run.memory(cost) <= memory
        return small and (overhead is None or run.overhead(cost) <= overhead)

    def setting(config: options.OptimizerConfig | AdamW, cost: costs.Cost) -> Setting:
        return Setting(config.to_optim_args(), cost, run.memory(cost), run.overhead(cost))

    cost, adamw = run.cost(config), config if isinstance(config, AdamW) else AdamW()
    is_within = fits(cost)
    found = [] if is_within or isinstance(config, AdamW) else settings_that_fit(config, run.cost, fits)
    every, growth = (getattr(config, name, 0) for name in ("precondition_frequency", "refresh_growth"))
    early = Schedule(every, growth=growth).early
    at = [replace(run, tokens=tokens) for tokens in batches or (run.tokens,)]
    return Report(
        model=type(getattr(run.model, "get_base_model", lambda: run.model)()).__name__,
        parameters=sum(param.numel() for param in run.model.parameters()),
        trained=sum(param.numel() for param in run.model.parameters() if param.requires_grad),
        optim=config.name,
        ranks=run.ranks,
        mode=run.mode(config),
        tokens=run.tokens,
        tensors=run.routing(config),
        weights=run.weights(trained=False),
        gradients=run.weights(trained=True),
        model_work=run.model_work,
        batches=[Batch(each.tokens, each.model_work, each.overhead(cost)) for each in at],
        early_updates=early[-1],
        early_refreshes=len(early) - 1,
        asked=setting(config, cost),
        adamw=setting(adamw, run.cost(adamw)),
        fits=None if memory is None and overhead is None else is_within,
        suggestions=[setting(*pair) for pair in found],
    )
