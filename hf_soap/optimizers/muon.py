"""Muon, alone and after SOAP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_soap.config import configs
from hf_soap.engine.plan import Plan
from hf_soap.optimizers.base import AuxiliaryRates, ConfiguredOptimizer, plan_factors, plan_options
from hf_soap.optimizers.soap import soap_rule
from hf_soap.rules.elementwise import AdamWRule
from hf_soap.rules.layout import is_stack, uncut
from hf_soap.rules.muon import MuonRule
from hf_soap.rules.orthogonal import OrthogonalizingRule


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
        size = shape if part is None else part
        if not _is_matrix(group, shape):
            return _adamw(group, shape, size)
        names = ("eps", "scale", "nesterov")
        rule = MuonRule(beta1=group["momentum"], **{name: group[name] for name in names})
        return Plan(rule, uncut(size), **plan_options(group, shape))


class SoapMuon(AuxiliaryRates, ConfiguredOptimizer):
    """SOAP's direction for matrices, with all singular values brought close to one.

    The direction Q_L (M / (√V + ε)) Q_Rᵀ has no bias correction. With ``block_size`` or ``square_blocks``, each block
    counts as a matrix. The first non-zero gradient of a matrix seeds its bases and updates nothing. Vectors, N x 1
    matrices, and tensors of groups with ``rule="adam"`` follow AdamW as in :class:`Muon`. Under the Trainer,
    embeddings and the output head do so too.

    Args:
        params: Parameters, named parameters, or groups of either. A group may override any setting.
        lr: Learning rate of matrices; None takes 0.02.
        weight_decay: Decoupled weight decay, applied after the update as in :class:`SOAP`.
        settings: The options of :class:`hf_soap.SoapMuonConfig`.

    Raises:
        ValueError: If an option is unknown, of the wrong type or out of range, or a parameter is complex.

    Source:
        The direction is that of SOAP, arXiv:2409.11321; the iteration and its scale are Muon's (K. Jordan, 2024).
    """

    config = configs.SoapMuonConfig

    def plan(self, group: Mapping[str, Any], shape: Sequence[int], *, part: Sequence[int] | None = None) -> Plan:
        """Returns Newton-Schulz of SOAP for matrices and stacks of them, and AdamW for everything else."""
        layout = plan_factors(group, shape, part=part)
        if not _is_matrix(group, shape) or len(layout.block) < 2:
            return _adamw(group, shape, shape if part is None else part)
        soap = soap_rule({**group, "correct_bias": False})
        rule = OrthogonalizingRule(inner=soap, eps=group["eps"], scale=group["scale"])
        return Plan(rule, layout, **plan_options(group, shape, decay_last=True))


def _is_matrix(group: Mapping[str, Any], shape: Sequence[int]) -> bool:
    is_matrix = len(shape) == 2 or (group["stacked_matrices"] and is_stack(shape))
    return is_matrix and group["rule"] != "adam"


def _adamw(group: Mapping[str, Any], shape: Sequence[int], size: Sequence[int]) -> Plan:
    beta1, beta2 = group["betas_1d"]
    rule = AdamWRule(beta1=beta1, beta2=beta2, eps=group["eps_1d"])
    return Plan(rule, uncut(size), auxiliary=True, **plan_options(group, shape))
