"""MARS before AdamW, Lion, Newton–Schulz, MARS-M and SOAP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_soap.config import configs, options
from hf_soap.config.checks import check_choice
from hf_soap.config.members import Member
from hf_soap.distributed import dtensor
from hf_soap.distributed.dtensor import is_sharded, local, local_grad, settle_gradient_
from hf_soap.engine.plan import Plan
from hf_soap.linalg import elementwise
from hf_soap.optimizers.base import AuxiliaryRates, plan_factors, plan_options
from hf_soap.optimizers.soap import soap_rule
from hf_soap.rules.base import PREV_PARAM, Rule
from hf_soap.rules.elementwise import AdamWRule, LionRule
from hf_soap.rules.layout import is_stack, uncut
from hf_soap.rules.mars import MarsRule
from hf_soap.rules.orthogonal import OrthogonalRule

logger = logging.getLogger(__name__)


class MARS(AuxiliaryRates):
    """Variance reduction before a preconditioned update.

    The gradient g is replaced by c̃ = clip(g + γ·β₁/(1-β₁)·(g - g')), where g' is the previous step's gradient, or,
    with ``exact``, the gradient of the current minibatch at the previous weights. Matrices are then updated by
    ``variant``, all other tensors by AdamW on the plain gradient unless ``optimize_1d``.

    Args:
        params: Parameters, named parameters, or groups of either. A group may override any setting, and may set
            ``rule="adam"`` to update its matrices as vectors are.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay rates of the moments, each in [0, 1); the first also enters the correction.
        eps: Added to the root of the second moment, or to the norm before Newton–Schulz.
        weight_decay: Decoupled weight decay.
        variant: ``"adamw"``, ``"lion"``, ``"shampoo"`` (Newton–Schulz), ``"m"`` (MARS-M) or ``"soap"``.
        gamma: Strength of the correction.
        exact: Two backward passes per step, see :meth:`at_previous_weights`. SoapTrainer makes both.
        optimize_1d: Also correct non-matrix parameters; ``"shampoo"`` and ``"m"`` update them by MARS-AdamW.
        lr_1d: Learning rate of non-matrix parameters, which changes in proportion to ``lr``; None takes ``lr``.
        betas_1d: Decay rates of their moments.
        weight_decay_1d: Their weight decay; None takes the group's. The published runs use 0.1.
        nonfinite: ``"skip"`` skips a step in which any gradient holds NaN or Inf; ``"off"`` does not check.
        max_skipped_in_a_row: Raise an error when this many steps in a row were skipped; 0 never does.
        average_horizon: Average the weights over about this many steps, see :meth:`eval`: their mean at first, then an
            exponential moving average with the decay rate 1 - 1/average_horizon. 0 keeps no averages.
        average_start: Steps before averaging starts.
        shard_mode: With several ranks: ``"local"`` preconditions each rank's part of a matrix by itself, ``"owner"``
            whole matrices on one rank each, with the same result as one process.
        state_dtype: Dtype of state between steps: ``"float32"`` (float64 for float64 parameters) or ``"bfloat16"``.
            Arithmetic is in float32. Rounding is stochastic, and depends only on step, parameter and role.
        pack_factors: Store one triangle of each symmetric matrix.
        distributed_refresh: Split decompositions among ranks that hold equal weights and gradients (DDP): each rank
            computes a share and sends it to the others. All ranks must step together. None means False, except under
            the Trainer.
        shampoo_beta: This and the following are settings of SOAP for ``variant="soap"``; see :class:`SOAP`.
        max_aspect_ratio: A matrix flatter than this gets a factor on its short side only, since that of the long side
            would be much larger than the matrix. In general, a side gets no factor if it is longer than this many
            times the product of the others. None sets no limit, as in the official implementation.
        stacked_matrices: Treat a tensor of three dimensions whose first is the shortest, such as the experts of a
            mixture, as a stack of matrices, each with its own factors.
        cautious_weight_decay: Decay only the entries of the weights that have the sign of the update.
        norm: ``"relative"`` takes steps of the length lr·‖W‖ for tensors of two or more dimensions; ``"hyperball"``
            also scales the weights back to their norm, without weight decay. Each matrix of a stack has its own norm.
        maximize: Ascend instead of descending.
        foreach: Accepted for compatibility with torch's optimizers, without effect. So is ``fused``.
        fused: See ``foreach``.
        differentiable: Must be False.

    Raises:
        ValueError: If a setting is of the wrong type or out of range, or a parameter is complex.

    Source:
        Yuan et al., MARS: Unleashing the Power of Variance Reduction for Training Large Models, arXiv:2411.10438.
    """

    config = configs.MarsSoapConfig  # this config has the options of all variants

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        variant: Literal["adamw", "lion", "shampoo", "soap", "m"] = "adamw",
        gamma: float = 0.025,
        exact: bool = False,
        optimize_1d: bool = False,
        lr_1d: float | None = None,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        weight_decay_1d: float | None = None,
        *,
        nonfinite: Literal["skip", "off"] = "skip",
        max_skipped_in_a_row: int = 100,
        average_horizon: int = 0,
        average_start: int = 0,
        shard_mode: Literal["local", "owner"] = "local",
        state_dtype: Literal["float32", "bfloat16"] = "float32",
        pack_factors: bool = False,
        distributed_refresh: bool | None = None,
        shampoo_beta: float | None = None,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        stagger: bool = False,
        square_blocks: bool = False,
        refresh_growth: float = 0.03,
        one_sided: bool = False,
        block_size: int | None = None,
        overlap_refresh: bool = False,
        max_aspect_ratio: float | None = 8.0,
        stacked_matrices: bool = True,
        cautious_weight_decay: bool = False,
        norm: Literal["relative", "hyperball"] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        defaults = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        self._corrected = False
        super().__init__(params, {**defaults, "rule": variant})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, whose rule is its variant."""
        if isinstance(param_group, dict):  # torch refuses everything else
            param_group.setdefault("rule", param_group.get("variant", self.defaults["rule"]))
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice("variant", group["variant"], tuple(VARIANTS))
        check_choice("rule", group["rule"], (*VARIANTS, "adam"))
        if group["exact"] and group["shard_mode"] == "owner":
            raise ValueError(
                "got exact=True with shard_mode='owner', wanted one of them: each rank has the previous "
                "weights of its own part only; use shard_mode='local'"
            )

    def _refuse_ignored(self, group: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """An option at its default counts as not given. Each parameter may have another variant as its rule."""
        of_all = options.option_fields(self.config)
        rules = ((group["rule"], group), (own["rule"], own)) if "rule" in own else ((group["rule"], {**group, **own}),)
        for rule, values in rules:
            variant = group["variant"] if rule == "adam" else rule
            given = {key: value for key, value in values.items() if key in of_all}
            given |= dict(zip(("beta1", "beta2"), values.get("betas", ()), strict=False))
            for key in given.keys() - options.option_fields(VARIANTS[variant]).keys():
                if given[key] != of_all[key].default:
                    readers = [repr(name) for name, config in VARIANTS.items() if key in options.option_fields(config)]
                    raise ValueError(
                        f"variant={variant!r} got {key}={options.shown(given[key])}, wanted only options that it "
                        f"reads; remove {key}, or use variant={' or '.join(readers)}"
                    )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._corrected = False

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient.

        Args:
            closure: Clears the gradients, reevaluates the model and returns the loss; exact MARS calls it twice.

        Returns:
            The closure's result at the current weights.

        Raises:
            RuntimeError: If exact MARS gets gradients without the correction.
            ValueError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
                if self.exact:
                    with self.at_previous_weights():
                        closure()
        if self.exact and not self._corrected and not self._engine.is_synthetic():
            raise RuntimeError(
                "exact MARS got gradients without their correction, wanted the same minibatch's gradients at the "
                "previous weights too; train with hf_soap.SoapTrainer, or in your own loop run the backward pass "
                "again in `with optimizer.at_previous_weights():`, or pass a closure, or use exact=False"
            )
        super().step()
        self._corrected = False
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads state like every optimizer of this package.

        Version 0.1.0 decayed vectors by 0.1 if neither their group nor ``weight_decay_1d`` set a decay. A checkpoint
        may therefore hold another decay than the group's; a warning says how to keep it.
        """
        saved = [group.get("weight_decay_1d") for group in state_dict["param_groups"]]
        now = [group["weight_decay"] for group in self.param_groups if group["weight_decay_1d"] is None]
        if decays := {decay for decay in saved if decay is not None and decay not in now and now}:
            logger.warning(
                "The checkpoint was trained with weight_decay_1d=%s, but vectors now decay by their group's %s; set "
                "weight_decay_1d to continue as before.",
                " and ".join(map(str, sorted(decays))),
                " and ".join(map(str, sorted(set(now)))),
            )
        super().load_state_dict(state_dict)

    @property
    def exact(self) -> bool:
        """Whether any param group asks for exact MARS."""
        return any(group["exact"] for group in self.param_groups)

    @property
    def has_previous_weights(self) -> bool:
        """Whether some parameter was updated before, so that :meth:`at_previous_weights` has previous weights.

        All ranks that share parameters must read this together. They get the same answer, even if one has no part.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        has_none = not any(self._previous(member) is not None for member in self.members())
        return not dtensor.agree(has_none, params)

    @contextmanager
    def at_previous_weights(self) -> Iterator[None]:
        """Restores the weights before the last update, for the second backward pass of exact MARS.

        Enter it after the backward pass of the minibatch, and repeat that pass inside. On exit the current weights are
        restored, and every ``.grad`` holds g + γ·β₁/(1-β₁)·(g - g'), ready for clipping and the step. At a parameter's
        first step g' counts as zero. ::

            model(batch).loss.backward()
            with optimizer.at_previous_weights():
                model(batch).loss.backward()
            optimizer.step()

        If the body raises, weights and gradients are put back as they were.
        """
        self._engine.refreshes.join()
        stash = [(member, member.param, member.param.grad) for member in self.members() if member.param.requires_grad]
        moved = [(local(p), local(p).detach().clone(), self._previous(member)) for member, p, _ in stash]
        try:
            with torch.no_grad():
                for _, param, _ in stash:
                    param.grad = None
                for weight, _, previous in moved:
                    if previous is not None:
                        weight.copy_(previous)
            yield
        except BaseException:
            for _, param, grad in stash:
                param.grad = grad
            raise
        else:
            with torch.no_grad():
                for (member, param, grad), (_, _, previous) in zip(stash, moved, strict=True):
                    settle_gradient_(param)
                    other = local_grad(param) if previous is not None else None
                    param.grad = grad
                    if grad is not None:
                        settle_gradient_(param)
                        self._correct(member, other)
            self._corrected = True
        finally:
            with torch.no_grad():
                for weight, before, _ in moved:
                    weight.copy_(before)

    def _previous(self, member: Member) -> Tensor | None:
        state = self.state.get(member.param, {})
        if PREV_PARAM not in state or not state["step"] > 0:
            return None
        layout = self.plan_of(member.settings, member.param).layout
        return layout.from_blocks(state[PREV_PARAM], local(member.param).shape)

    def _correct(self, member: Member, other: Tensor | None) -> None:
        """Corrects a gradient in place with the gradient at the previous weights, or with zero."""
        settings, param, grad = member.settings, member.param, local_grad(member.param)
        if grad is None or not settings["exact"] or not isinstance(self.plan_of(settings, param).rule, MarsRule):
            return
        if 0 in grad.stride() and not is_sharded(param):  # expanded: several entries share memory
            grad = param.grad = grad.clone(memory_format=torch.contiguous_format)
        other = torch.zeros_like(grad) if other is None else other
        grad.copy_(elementwise.mars_correction(grad, other, beta1=settings["betas"][0], gamma=settings["gamma"]))

    def plan(self, group: Mapping[str, Any], shape: Sequence[int], *, part: Sequence[int] | None = None) -> Plan:
        """Returns the variant's rule after the correction, or AdamW for vectors and other non-matrix parameters."""
        soap = group["rule"] == "soap"
        matrix = len(shape) == 2 or (group["stacked_matrices"] and is_stack(shape)) or (soap and len(shape) > 2)
        plain = uncut(shape if part is None else part)
        kept: dict[str, Any] = {"keep_weights": group["exact"]}
        if group["rule"] == "adam" or not (matrix or group["optimize_1d"]):
            beta1, beta2 = group["betas_1d"]
            adamw = AdamWRule(beta1=beta1, beta2=beta2, eps=group["eps"])
            return Plan(adamw, plain, auxiliary=True, **kept, **plan_options(group, shape))
        inner = soap_rule(group) if soap else _mars_inner(group, matrix=matrix)
        rule = MarsRule(inner=inner, beta1=group["betas"][0], gamma=group["gamma"], exact=group["exact"])
        layout = plan_factors(group, shape, part=part) if soap else plain
        return Plan(rule, layout, **kept, **plan_options(group, shape, decay_last=soap))


VARIANTS = {
    config.variant: config
    for config in (
        configs.MarsAdamWConfig,
        configs.MarsLionConfig,
        configs.MarsShampooConfig,
        configs.MarsMConfig,
        configs.MarsSoapConfig,
    )
}
"""Maps each variant to its config, which has the options that it reads."""


def _mars_inner(group: Mapping[str, Any], *, matrix: bool) -> Rule:
    beta1, beta2 = group["betas"]
    if group["rule"] == "lion":
        return LionRule(beta1=beta1)
    if group["rule"] == "adamw" or not matrix:
        return AdamWRule(beta1=beta1, beta2=beta2, eps=group["eps"])
    return OrthogonalRule(beta1=beta1, eps=group["eps"], scale="aspect" if group["rule"] == "shampoo" else "rms")
