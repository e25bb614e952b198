"""Which parameter follows which rule: the Trainer's param groups, split further."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_soap.buckets import state_dtype
from hf_soap.sharding import local
from hf_soap.stepping import BlockOptimizer

if TYPE_CHECKING:
    from torch import nn

    from hf_soap.blocks import Plan
    from hf_soap.schema import OptimizerConfig

LORA = re.compile(r"lora_(embedding_)?[AB]\b")
"""Names of LoRA matrices in peft: (r, in), (out, r)."""

Overrides = dict[str, Any]
ADAM: Overrides = {"rule": "adam"}
ONE_SIDED: Overrides = {"one_sided": True}


def split_groups(params: Iterable[Any], model: nn.Module | None, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Splits param groups by the rule that each parameter follows; the first match wins.

    In this order: ``adam_modules``, ``one_sided_modules``, LoRA matrices (``lora_sides``), embeddings and output head
    where the optimizer leaves them to Adam, the optimizer's defaults.
    Tied weights are found under each of their names.

    Args:
        params: Param groups as the Trainer makes them, or parameters.
        model: Where the names come from.
        config: The options.

    Returns:
        Param groups with the settings of each, with names where a model was given; empty ones are dropped.

    Raises:
        ValueError: If a pattern matches no trainable parameter, or there is no model to match it with.
    """
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    groups = [{**group, "params": _listed(group["params"])} for group in groups]
    names = _names(model) if model is not None else {}
    trainable = [name for group in groups for param in group["params"] for name in names.get(param, ())]
    patterns = {
        key: re.compile(pattern)
        for key in ("adam_modules", "one_sided_modules")
        if (pattern := getattr(config, key, None)) is not None
    }
    for key, pattern in patterns.items():
        if not any(pattern.search(name) for name in trainable):
            raise ValueError(
                f"{key}={pattern.pattern!r} matches no trainable parameter; names look like {', '.join(trainable[:3])}"
                if trainable
                else f"{key}={pattern.pattern!r} needs parameter names; build the optimizer with its model"
            )

    embeddings = _embeddings(model) if model is not None and config.adam_embeddings else set()
    split: list[dict[str, Any]] = []
    named = all(param in names for group in groups for param in group["params"])
    for group in groups:
        routed: defaultdict[tuple[tuple[str, Any], ...], list[Any]] = defaultdict(list)
        for param in group["params"]:
            overrides = _route(param, names.get(param, ()), patterns, config)
            if overrides is None:
                overrides = ADAM if param in embeddings else {}
            routed[tuple(overrides.items())].append((names[param][0], param) if named else param)
        split.extend({**group, **dict(overrides), "params": members} for overrides, members in routed.items())
    return split


def routing_table(optimizer: BlockOptimizer) -> str:
    """Returns a text table of an optimizer's parameters: rule, tensors, parameters and the memory of its factors.

    Of sharded parameters it counts what this rank has, or, with ``shard_mode="owner"``, the whole.

    Args:
        optimizer: Any optimizer of the family, before or after its first step.

    Returns:
        One line per rule, and a heading.
    """
    totals: dict[str, list[int]] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not param.requires_grad:
                continue
            plan, whole = optimizer.plan_of(group, param), optimizer.owned(group, param)
            count = totals.setdefault(describe(plan, owned=whole), [0, 0, 0])
            count[0] += 1
            count[1] += param.numel() if whole else local(param).numel()
            count[2] += 2 * plan.layout.factor_numel() * state_dtype(param).itemsize
    rows = [("rule", "tensors", "parameters", "factors and bases")]
    rows += [(rule, f"{n:,}", f"{size:,}", f"{octets / 2**20:,.1f} MiB") for rule, (n, size, octets) in totals.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def describe(plan: Plan, *, owned: bool) -> str:
    """Says in a few words what happens to a tensor.

    Args:
        plan: Its plan.
        owned: Whether one rank preconditions the whole of it.
    """
    blocks = plan.layout.blocks
    parts = f" of each of {blocks} blocks" if blocks > 1 else ""
    return f"{plan.rule.describe(plan.layout)}{parts}{', by owner' if owned else ''}"


def _listed(params: Any) -> list[Tensor]:
    """Lists what torch takes in a group: one tensor, or an iterable of tensors or of (name, tensor)."""
    listed = [params] if isinstance(params, Tensor) else list(params)
    return [param[1] if isinstance(param, tuple) else param for param in listed]


def _names(model: nn.Module) -> dict[Tensor, list[str]]:
    names: defaultdict[Tensor, list[str]] = defaultdict(list)
    for name, param in model.named_parameters(remove_duplicate=False):
        names[param].append(name.replace("_orig_mod.", ""))  # which a compiled model puts in front
    return dict(names)


def _embeddings(model: nn.Module) -> set[Tensor]:
    tables = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    return tables | ({head.weight} if head is not None else set())


def _route(
    param: Tensor, names: Sequence[str], patterns: dict[str, re.Pattern[str]], config: OptimizerConfig
) -> Overrides | None:
    for key, overrides in (("adam_modules", ADAM), ("one_sided_modules", ONE_SIDED)):
        if key in patterns and any(patterns[key].search(name) for name in names):
            return overrides
    if hasattr(config, "lora_sides") and param.dim() == 2 and any(LORA.search(name) for name in names):
        return {"rank": ONE_SIDED, "both": {}, "none": ADAM}[config.lora_sides]
    return None
