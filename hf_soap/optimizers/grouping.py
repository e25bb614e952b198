"""Which parameter follows which rule, in the param groups of the Trainer."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_soap.config.members import OVERRIDES
from hf_soap.distributed.dtensor import local
from hf_soap.engine.buckets import state_dtype
from hf_soap.engine.optimizer import BlockOptimizer

if TYPE_CHECKING:
    from torch import nn

    from hf_soap.config.options import OptimizerConfig
    from hf_soap.engine.plan import Plan

logger = logging.getLogger(__name__)

LORA = re.compile(r"lora_(embedding_)?[AB]\b")
"""Names of LoRA matrices in peft: (r, in), (out, r)."""

Overrides = dict[str, Any]
ADAM: Overrides = {"rule": "adam"}
ONE_SIDED: Overrides = {"one_sided": True}
BOTH_SIDES: Overrides = {"one_sided": False, "max_aspect_ratio": None}


def with_overrides(params: Iterable[Any], model: nn.Module | None, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Determines for each parameter which settings differ from those of its param group. The first match wins.

    The order is: ``adam_modules``, ``one_sided_modules``, adapters (``lora_sides``), embeddings and output head if the
    optimizer updates them by Adam, the optimizer's defaults. Tied weights match under each of their names.

    Args:
        params: Param groups as the Trainer makes them, or parameters.
        model: Where the names come from.
        config: The options.

    Returns:
        The same groups in the same order, including empty ones, since a scheduler may have a function for each. They
        have names if a model was given, and ``overrides`` with the settings of each parameter if any differ.

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
    sides = getattr(config, "lora_sides", "rank")
    if model is None and sides != "rank":
        logger.warning(
            "lora_sides=%s has no effect without the model, whose names say which matrices belong to an adapter. "
            "Shapes decide instead: a matrix flatter than %s : 1 gets a factor on its short side.",
            sides,
            getattr(config, "max_aspect_ratio", None),
        )
    embeddings = _embeddings(model) if model is not None and config.adam_embeddings else set()
    adapters = _adapters(model) if model is not None else set()
    named = all(param in names for group in groups for param in group["params"])
    for group in groups:
        overrides = []
        for param in group["params"]:
            own = _overrides(param, names.get(param, ()), patterns, config, is_adapter=param in adapters)
            if own is None:
                own = ADAM if param in embeddings else {}
            overrides.append(dict(own))
        if any(overrides):
            group[OVERRIDES] = overrides
        if named:
            group["param_names"] = [names[param][0] for param in group["params"]]
    return groups


def routing_table(optimizer: BlockOptimizer) -> str:
    """Returns a text table of an optimizer's parameters: rule, tensors, parameters and the memory of its factors.

    For sharded parameters it counts this rank's part, or, with ``shard_mode="owner"``, the whole.

    Args:
        optimizer: Any optimizer of the family, before or after its first step.

    Returns:
        A heading, and one line per rule.
    """
    totals: dict[str, list[int]] = {}
    for member in optimizer.members():
        param = member.param
        if not param.requires_grad:
            continue
        plan, whole = optimizer.plan_of(member.settings, param), optimizer.owned(member.settings, param)
        count = totals.setdefault(describe(plan, owned=whole), [0, 0, 0])
        count[0] += 1
        count[1] += param.numel() if whole else local(param).numel()
        count[2] += 2 * plan.layout.factor_numel() * state_dtype(param).itemsize
    rows = [("rule", "tensors", "parameters", "factors and bases")]
    rows += [(rule, f"{n:,}", f"{size:,}", f"{held / 2**20:,.1f} MiB") for rule, (n, size, held) in totals.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def describe(plan: Plan, *, owned: bool) -> str:
    """Describes in a few words how a tensor is updated.

    Args:
        plan: Its plan.
        owned: Whether one rank preconditions the whole of it.
    """
    blocks = plan.layout.blocks
    flat = ", the others too long" if plan.layout.too_long else ""
    parts = f" of each of {blocks} blocks" if blocks > 1 else ""
    return f"{plan.label}{flat}{parts}{', by owner' if owned else ''}"


def _listed(params: Any) -> list[Tensor]:
    """Lists the parameters of a group as torch accepts them: a tensor, or an iterable of tensors or (name, tensor)."""
    listed = [params] if isinstance(params, Tensor) else list(params)
    return [param[1] if isinstance(param, tuple) else param for param in listed]


def _names(model: nn.Module) -> dict[Tensor, list[str]]:
    names: defaultdict[Tensor, list[str]] = defaultdict(list)
    for name, param in model.named_parameters(remove_duplicate=False):
        names[param].append(name.replace("_orig_mod.", ""))  # a prefix that compiled models add
    return dict(names)


def _embeddings(model: nn.Module) -> set[Tensor]:
    tables = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    return tables | ({head.weight} if head is not None else set())


def _adapters(model: nn.Module) -> set[Tensor]:
    """Returns the parameters that peft adapters add: those of its layers and of its prompts."""
    found: set[Tensor] = set()
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            part = getattr(module, name, None)
            if isinstance(part, torch.nn.Module):
                found.update(part.parameters())
    prompts = getattr(model, "prompt_encoder", None)
    if isinstance(prompts, torch.nn.Module) and hasattr(model, "peft_config"):
        found.update(prompts.parameters())
    return found


def _overrides(
    param: Tensor,
    names: Sequence[str],
    patterns: dict[str, re.Pattern[str]],
    config: OptimizerConfig,
    *,
    is_adapter: bool,
) -> Overrides | None:
    for key, overrides in (("adam_modules", ADAM), ("one_sided_modules", ONE_SIDED)):
        if key in patterns and any(patterns[key].search(name) for name in names):
            return overrides
    is_lora = any(LORA.search(name) for name in names)
    if not hasattr(config, "lora_sides") or not (is_lora or is_adapter):
        return None
    if param.dim() == 2:
        return {"rank": ONE_SIDED, "both": BOTH_SIDES, "none": ADAM}[config.lora_sides]
    # Blocks of rotations and banks of vectors: their dimensions are not the sides of a matrix.
    return ADAM if param.dim() > 2 and not is_lora and config.lora_sides != "both" else None
