"""Muon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_soap.config import configs
from hf_soap.engine.plan import Plan
from hf_soap.optimizers.base import AuxiliaryRates, ConfiguredOptimizer, plan_options
from hf_soap.rules.elementwise import AdamWRule
from hf_soap.rules.layout import is_stack, uncut
from hf_soap.rules.muon import MuonRule


class Muon(AuxiliaryRates, ConfiguredOptimizer):
    """Nesterov momentum for matrices, with all singular values brought close to one.

    Vectors, and tensors of groups with ``rule="adam"``, follow AdamW with ``lr_1d``, ``betas_1d`` and
    ``weight_decay_1d``. Under the Trainer, embeddings and the output head do so too.

    Args:
        params: Parameters, named parameters, or groups of either. A group may override any setting.
        lr: Learning rate of matrices; None takes 0.02.
        weight_decay: Decoupled weight decay.
        settings: The options of :class:`hf_soap.MuonConfig`.

    Raises:
        ValueError: If an option is unknown, of the wrong type or out of range, or a parameter is complex.

    Source:
        K. Jordan, Muon: An optimizer for hidden layers in neural networks (2024).
    """

    config = configs.MuonConfig

    def plan(self, group: Mapping[str, Any], shape: Sequence[int], *, part: Sequence[int] | None = None) -> Plan:
        """Returns Muon for matrices and stacks of them, and AdamW for everything else."""
        layout = uncut(shape if part is None else part)
        is_matrix = len(shape) == 2 or (group["stacked_matrices"] and is_stack(shape))
        if group["rule"] == "adam" or not is_matrix:
            beta1, beta2 = group["betas_1d"]
            rule = AdamWRule(beta1=beta1, beta2=beta2, eps=group["eps_1d"])
            return Plan(rule, layout, auxiliary=True, **plan_options(group, shape))
        names = ("eps", "scale", "nesterov")
        matrix_rule = MuonRule(beta1=group["momentum"], **{name: group[name] for name in names})
        return Plan(matrix_rule, layout, **plan_options(group, shape))
