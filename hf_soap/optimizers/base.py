"""Shared parts of optimizers: plans from settings, constructors from a config, and the rates of AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_soap.config import options
from hf_soap.config.checks import check_choice, check_pair
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.engine.plan import Plan
from hf_soap.engine.weight_step import WeightStep
from hf_soap.linalg.elementwise import Rate
from hf_soap.rules.layout import Layout, is_stack, plan_layout
from hf_soap.rules.storage import Storage


class ConfiguredOptimizer(BlockOptimizer):
    """An optimizer whose constructor takes the options of its config. A subclass sets ``config`` and defines ``plan``.

    Args:
        params: Parameters, named parameters, or groups of either. A group may override any setting.
        lr: Learning rate, a number or a tensor of one element; None takes the config's.
        weight_decay: Decoupled weight decay.
        settings: Options of the config. If it has both ``beta1`` and ``beta2``, they are given as the pair ``betas``.

    Raises:
        ValueError: If an option is unknown, of the wrong type or out of range, or a parameter is complex.
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor | None = None, weight_decay: float = 0.0, **settings: Any
    ) -> None:
        known = default_settings(self.config)
        if unknown := sorted(settings.keys() - known.keys()):
            raise ValueError(
                f"{type(self).__name__} got the unknown option {unknown[0]!r}, wanted one that it has: "
                f"{options.nearest(unknown[0], known)}They are {', '.join(known)}."
            )
        given = {"lr": self.config.lr if lr is None else lr, "weight_decay": weight_decay}
        super().__init__(params, {**given, **known, **settings})

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice("rule", group["rule"], (self.config.name, "adam"))


def default_settings(config: type[options.OptimizerConfig]) -> dict[str, Any]:
    """Returns the default settings of an optimizer with this config, except for learning rate and decay."""
    torch_settings = {"maximize": False, "foreach": None, "fused": None, "differentiable": False}
    return {**config().constructor_kwargs(), **torch_settings, "rule": config.name}


def plan_options(group: Mapping[str, Any], shape: Sequence[int], *, decay_last: bool = False) -> dict[str, Any]:
    """Returns the arguments of a plan that options of all optimizers decide on: state, refreshes, change of weights.

    Args:
        group: The settings of a param group.
        shape: Shape of the whole tensor.
        decay_last: Whether the weights decay after the update.
    """
    return {
        "weight_step": WeightStep(
            decay_last=decay_last,
            cautious=group["cautious_weight_decay"],
            norm=group["norm"] if len(shape) > 1 else None,
            stacked=group["norm"] is not None and group["stacked_matrices"] and is_stack(shape),
        ),
        "storage": Storage(group["state_dtype"], group.get("pack_factors", False)),
        "maximize": group["maximize"],
        "splits_refreshes": bool(group.get("distributed_refresh", False)),
        "overlaps": group.get("overlap_refresh", False),
    }


def plan_factors(group: Mapping[str, Any], shape: Sequence[int], *, part: Sequence[int] | None) -> Layout:
    """Returns the layout of a tensor, or of a part, by the settings of a group; ``rule="adam"`` factors no side."""
    return plan_layout(
        shape,
        max_precond_dim=group["max_precond_dim"],
        max_aspect_ratio=group["max_aspect_ratio"],
        stacked_matrices=group["stacked_matrices"],
        merge_dims=group.get("merge_dims", False),
        precondition_1d=group.get("precondition_1d", False),
        one_sided=group["one_sided"],
        block_size=group["block_size"],
        square_blocks=group["square_blocks"],
        factored=group["rule"] != "adam",
        part=part,
    )


class AuxiliaryRates(BlockOptimizer):
    """Adds a separate learning rate, betas and decay for the tensors that AdamW updates, whose plans are auxiliary.

    For configs with :class:`hf_soap.config.configs.AuxiliaryOptions`.
    """

    read_at_each_step: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "lr_1d", "weight_decay_1d")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, and stores the learning rate to which ``lr_1d`` is in proportion."""
        if isinstance(param_group, dict):  # torch refuses everything else
            param_group.setdefault("base_lr", float(param_group.get("lr", self.defaults["lr"])))
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        beta1, beta2 = check_pair("betas_1d", group["betas_1d"])
        options.check_values(self.config, {"beta1_1d": beta1, "beta2_1d": beta2})
        if group["lr_1d"] is not None and group["base_lr"] == 0:
            raise ValueError("lr must be > 0 if lr_1d is set, got 0; lr_1d changes in proportion to lr")

    def rates(self, group: Mapping[str, Any], plan: Plan) -> Rate:
        """Returns the group's rates, or those of AdamW if the plan is auxiliary."""
        lr, decay = group["lr"], group["weight_decay"]
        if not plan.auxiliary:
            return lr, decay
        if group["lr_1d"] is not None:
            lr = lr * (group["lr_1d"] / group["base_lr"])
        return lr, decay if group["weight_decay_1d"] is None else group["weight_decay_1d"]
