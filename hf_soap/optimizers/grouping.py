"""Which parameter follows which rule, in the param groups of the Trainer."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_soap.config import modules
from hf_soap.config.members import OVERRIDES, OWN_RATES
from hf_soap.config.options import MODULES, RATES
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

Overrides = Mapping[str, Any]
ADAM: Overrides = {"rule": "adam"}
ONE_SIDED: Overrides = {"one_sided": True}
ORDINARY_STEP: Overrides = {"norm": None}
BOTH_SIDES: Overrides = {"one_sided": False, "max_aspect_ratio": None}

Entry = tuple[Collection[Tensor], Overrides]
"""Parameters, and what their settings are."""


def with_overrides(
    params: Iterable[Any], model: nn.Module | None, config: OptimizerConfig, *, lr: float | Tensor | None = None
) -> list[dict[str, Any]]:
    """Determines for each parameter which settings differ from those of its param group. The first match wins.

    An entry of ``modules`` that sets only rates leaves all else to the next match. The order is: ``modules``,
    ``adam_modules``, ``one_sided_modules``, adapters (``lora_sides``), embeddings and output head if the optimizer
    updates them by Adam, the optimizer's defaults. Tied weights match under each of their names. The norm of
    embeddings, output head and adapters is not constrained, unless ``modules`` says so for them.

    Args:
        params: Param groups as the Trainer makes them, or parameters.
        model: Where the names come from.
        config: The options.
        lr: Peak learning rate of groups without one, to which that of single parameters is in proportion; None takes
            the config's.

    Returns:
        The same groups in the same order, including empty ones, since a scheduler may have a function for each. They
        have names if a model was given, and ``overrides`` with the settings of each parameter if any differ.

    Raises:
        ValueError: If a pattern matches no trainable parameter, if there is no model to match it with, or if
            a parameter has a learning rate in proportion to zero.
    """
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    groups = [{**group, "params": _listed(group["params"])} for group in groups]
    names = _names(model) if model is not None else {}
    listed = [param for group in groups for param in group["params"]]
    entries = _selected(listed, names, model, config)
    sides = getattr(config, "lora_sides", "rank")
    if model is None and sides != "rank":
        logger.warning(
            "lora_sides=%s has no effect without the model, whose names say which matrices belong to an adapter. "
            "Shapes decide instead: a matrix flatter than %s : 1 gets a factor on its short side.",
            sides,
            getattr(config, "max_aspect_ratio", None),
        )
    ordinary: set[Tensor] = set()
    if model is not None:
        entries += _by_kind(names, model, config)
        if getattr(config, "norm", None) is not None:
            roles = _roles(listed, names, model)
            ordinary = set[Tensor]().union(*(roles[role] for role in ("@embeddings", "@head", "@adapters")))
    named = all(param in names for param in listed)
    for group in groups:
        peak: Any = group.get("lr", config.lr if lr is None else lr)
        overrides = [_with_factor(_all_of(param, ordinary, entries), peak) for param in group["params"]]
        if any(overrides):
            group[OVERRIDES] = overrides
        if named:
            group["param_names"] = [names[param][0] for param in group["params"]]
    return groups


def create(
    optimizer: type[BlockOptimizer],
    params: Iterable[Any],
    model: nn.Module | None,
    config: OptimizerConfig,
    **kwargs: Any,
) -> BlockOptimizer:
    """Creates an optimizer, with the settings of each parameter and the rates for the width of the model.

    Args:
        optimizer: Its class.
        params: Param groups as the Trainer makes them, or parameters.
        model: Where the names come from.
        config: The options.
        **kwargs: What the class takes, such as the config's options.

    Raises:
        ValueError: As :func:`with_overrides` and :func:`scale_by_width` do.
    """
    groups = with_overrides(params, model, config, lr=kwargs.get("lr"))
    base = getattr(config, "mup_base_width", None)
    if base is not None:
        plans = optimizer([dict(group) for group in groups], **kwargs)  # its plans say how each tensor is updated
        scale_by_width(groups, model, base, plans)
    return optimizer(groups, **kwargs)


def scale_by_width(
    groups: Iterable[dict[str, Any]], model: nn.Module | None, base: int, plans: BlockOptimizer
) -> None:
    """Adapts learning rates and decay of hidden matrices and of the head to the width, unless ``modules`` sets them.

    The entries of an update add up over the width, so the learning rate is in proportion to 1/width. If the spectral
    norm of updates is fixed, the learning rate is too, and the decay is in proportion to 1/width instead. Steps in
    proportion to the norm of the weights keep their rates.

    Args:
        groups: Param groups, whose ``overrides`` are changed.
        model: The model, whose config has its width.
        base: The width for which learning rates and decay were tuned.
        plans: An optimizer of these groups.

    Raises:
        ValueError: If there is no model, or its config has no ``hidden_size``.

    Source:
        arXiv:2203.03466, table 3, for updates whose entries have a fixed size; arXiv:2512.05620 for spectral ones, and
        for decay.
    """
    own: Any = getattr(model, "config", None)
    text = own.get_text_config() if hasattr(own, "get_text_config") else own
    width = getattr(text, "hidden_size", None)
    if model is None or width is None:
        raise ValueError(
            f"mup_base_width={base} got a model without config.hidden_size, wanted the width to compare with; build "
            "the optimizer with its model, or set lr_factor by `modules`"
        )
    names, ratio = _names(model), base / width
    # A head that is tied to the embeddings too: the entries of its update add up over the width in the logits.
    scaled = _roles(names, names, model)["@matrices"] | _head(model)
    changes: dict[Tensor, Overrides] = {}
    for member in plans.members():
        if member.param in scaled and sum(length > 1 for length in member.param.shape) > 1:
            plan = plans.plan_of(member.settings, member.param)
            _, decay = plans.rates_from(member.rates, plan)
            if plan.weight_step.norm is not None:
                continue
            if not plan.traits.is_spectral:
                changes[member.param] = {"lr_factor": ratio}
            elif decay:
                changes[member.param] = {"weight_decay": decay * ratio}
    for group in groups:
        overrides = group.get(OVERRIDES) or [{} for _ in group["params"]]
        changed = [{**changes.get(param, {}), **own} for param, own in zip(group["params"], overrides, strict=True)]
        if any(changed):
            group[OVERRIDES] = changed


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
        count = totals.setdefault(describe(plan, member.own, owned=whole), [0, 0, 0])
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


def describe(plan: Plan, own: Overrides, *, owned: bool) -> str:
    """Describes in a few words how a tensor is updated.

    Args:
        plan: Its plan.
        own: What it overrides.
        owned: Whether one rank preconditions the whole of it.
    """
    blocks = plan.layout.blocks
    flat = ", the others too long" if plan.layout.too_long else ""
    parts = f" of each of {blocks} blocks" if blocks > 1 else ""
    return ", ".join([f"{plan.label}{flat}{parts}", *(["by owner"] if owned else []), *_own_words(own)])


def _own_words(own: Overrides) -> list[str]:
    """Describes overrides that the rule does not show: rates, and options other than sides."""
    shown_by_rule = {*ADAM, *BOTH_SIDES, *OWN_RATES}
    factor = [f"lr ×{own['lr_factor']:.3g}"] if "lr_factor" in own else []
    decay = [f"weight decay {own['weight_decay']:g}"] if "weight_decay" in own else []
    return factor + decay + [f"{key}={value}" for key, value in own.items() if key not in shown_by_rule]


def _listed(params: Any) -> list[Tensor]:
    """Lists the parameters of a group as torch accepts them: a tensor, or an iterable of tensors or (name, tensor)."""
    listed = [params] if isinstance(params, Tensor) else list(params)
    return [param[1] if isinstance(param, tuple) else param for param in listed]


def _names(model: nn.Module) -> dict[Tensor, list[str]]:
    names: defaultdict[Tensor, list[str]] = defaultdict(list)
    for name, param in model.named_parameters(remove_duplicate=False):
        names[param].append(name.replace("_orig_mod.", ""))  # a prefix that compiled models add
    return dict(names)


def _selected(
    params: list[Tensor], names: Mapping[Tensor, list[str]], model: nn.Module | None, config: OptimizerConfig
) -> list[Entry]:
    """Returns the settings that options give to parameters by name or role."""
    chosen = [
        (f"{MODULES}, {selector!r}", selector, modules.overrides_of(config, own))
        for selector, own in (getattr(config, MODULES, None) or {}).items()
    ]
    for key, own in (("adam_modules", ADAM), ("one_sided_modules", ONE_SIDED)):
        if (pattern := getattr(config, key, None)) is not None:
            chosen.append((f"{key}={pattern!r}", pattern, dict(own)))
    trainable = [name for param in params for name in names.get(param, ())]
    entries: list[Entry] = []
    for said, selector, own in chosen:
        if model is None or not trainable:
            raise ValueError(f"{said} needs parameter names; build the optimizer with its model")
        if selector in modules.ROLES:  # a model need not have every role, such as a head
            found = _roles(params, names, model)[selector]
        else:
            pattern = re.compile(selector)
            found = {param for param in params if any(map(pattern.search, names.get(param, ())))}
            if not found:
                raise ValueError(f"{said} matches no trainable parameter; names look like {', '.join(trainable[:3])}")
        entries.append((found, own))
    return entries


def _roles(params: Iterable[Tensor], names: Mapping[Tensor, list[str]], model: nn.Module) -> dict[str, set[Tensor]]:
    """Returns the parameters of each of :data:`hf_soap.config.modules.ROLES`."""
    every = set(params)
    found = {
        "@embeddings": every & _tables(model),
        "@head": every & _head(model),
        "@vectors": {param for param in every if param.dim() < 2},
        "@adapters": every & (_lora(names) | _adapters(names, model)),
    }
    return {**found, "@matrices": every.difference(*found.values())}


def _by_kind(names: Mapping[Tensor, list[str]], model: nn.Module, config: OptimizerConfig) -> list[Entry]:
    """Returns the settings that adapters and embeddings have by default."""
    entries: list[Entry] = []
    if hasattr(config, "lora_sides"):
        lora = _lora(names)
        adapters = lora | _adapters(names, model)
        by_side = {"rank": ONE_SIDED, "both": BOTH_SIDES, "none": ADAM}[config.lora_sides]
        entries.append(({param for param in adapters if param.dim() == 2}, by_side))
        if config.lora_sides != "both":
            # Blocks of rotations and banks of vectors: their dimensions are not the sides of a matrix.
            entries.append(({param for param in adapters - lora if param.dim() > 2}, ADAM))
    if config.adam_embeddings:
        entries.append((_tables(model) | _head(model), ADAM))
    return entries


def _all_of(param: Tensor, ordinary: Collection[Tensor], entries: Iterable[Entry]) -> Overrides:
    """Returns the settings of the first match, and the ordinary step of the parameters that have it by default.

    A match that sets only rates leaves all else to the next one. One that sets nothing stands for the options of the
    group.
    """
    own: dict[str, Any] = {}
    for chosen, settings in entries:
        if param in chosen:
            own = _combined(own, settings)
            if not settings or settings.keys() - {*RATES, *OWN_RATES}:
                break
    return {**ORDINARY_STEP, **own} if param in ordinary else own


def _combined(own: Overrides, later: Overrides) -> dict[str, Any]:
    """Adds the settings of a later match: those that are there already win, and a factor on a rate multiplies it."""
    if "lr" in own:
        later = {key: value for key, value in later.items() if key not in ("lr", "lr_factor")}
    factor = own.get("lr_factor", 1.0)
    scaled = {key: later[key] * factor for key in ("lr", "lr_factor") if key in later}
    kept = {key: value for key, value in own.items() if not (key == "lr_factor" and scaled)}
    return {**later, **kept, **scaled}


def _with_factor(own: Overrides, peak: float | Tensor) -> dict[str, Any]:
    """Replaces a learning rate by its ratio to that of the group, which schedulers change."""
    if "lr" not in own:
        return dict(own)
    if not peak:
        raise ValueError(
            f"{MODULES} got lr={own['lr']} with a learning rate of 0, wanted one > 0, to which lr is in proportion; "
            "set learning_rate"
        )
    return {**{key: value for key, value in own.items() if key != "lr"}, "lr_factor": own["lr"] / float(peak)}


def _tables(model: nn.Module) -> set[Tensor]:
    return {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}


def _head(model: nn.Module) -> set[Tensor]:
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    return {head.weight} if head is not None else set()


def _lora(names: Mapping[Tensor, list[str]]) -> set[Tensor]:
    return {param for param, known in names.items() if any(map(LORA.search, known))}


def _adapters(names: Mapping[Tensor, list[str]], model: nn.Module) -> set[Tensor]:
    """Returns the parameters of peft's layers and prompts, without modules that it trains as a whole beside them."""
    found: set[Tensor] = set()
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            part = getattr(module, name, None)
            if isinstance(part, torch.nn.Module):
                found.update(part.parameters())
    prompts = getattr(model, "prompt_encoder", None)
    if isinstance(prompts, torch.nn.Module) and hasattr(model, "peft_config"):
        found.update(prompts.parameters())
    return {param for param in found if not any(".modules_to_save." in name for name in names.get(param, ()))}
