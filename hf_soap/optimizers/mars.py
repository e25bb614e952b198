"""MARS in front of AdamW, Lion, Newton–Schulz, MARS-M and SOAP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_soap import configs, schema, updates
from hf_soap.blocks import PREV_PARAM, Plan, plan_layout
from hf_soap.checks import check_choice, check_pair
from hf_soap.optimizers.soap import plan_factors, soap_rule, state_options
from hf_soap.rules import AdamW, Lion, Mars, Orthogonal, Rule
from hf_soap.sharding import is_sharded, local, local_grad, settle_gradient_
from hf_soap.stepping import BlockOptimizer


class MARS(BlockOptimizer):
    """Variance reduction in front of a preconditioned update.

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
        exact: Two backward passes a step: see :meth:`at_previous_weights`. SoapTrainer does it by itself.
        optimize_1d: Correct tensors that are no matrices too; ``"shampoo"`` and ``"m"`` update them by MARS-AdamW.
        lr_1d: Learning rate of tensors that are no matrices, following ``lr`` in proportion; None takes ``lr``.
        betas_1d: Decay rates of their moments.
        weight_decay_1d: Their weight decay. None takes that of a group which sets its own, else 0.1.
        nonfinite: ``"skip"`` leaves out a step in which any gradient holds NaN or Inf; ``"off"`` does not look.
        max_skipped_in_a_row: Raise an error when this many steps in a row were skipped; 0 never does.
        shard_mode: With several ranks: ``"local"`` preconditions each rank's part of a matrix by itself, ``"owner"``
            whole matrices on one rank each, which is equal to one process.
        state_dtype: What state is kept in between steps: ``"float32"`` (float64 for float64 parameters),
            ``"bfloat16"``, or ``"float8"`` for the moments of what has factors and bfloat16 for all else. Arithmetic
            is in float32; rounding is stochastic and depends on step, parameter and role alone.
        pack_factors: Keep one triangle of each symmetric matrix.
        distributed_refresh: Split decompositions among ranks that hold equal weights and gradients (DDP): each does
            its share and gives it to the others. All ranks must step together. None is False but for the Trainer.
        shampoo_beta: Here and below, settings of SOAP for ``variant="soap"``; see :class:`SOAP`.

    Raises:
        ValueError: If a setting is of the wrong type or out of range, or a parameter is complex.

    Source:
        Yuan et al., MARS: Unleashing the Power of Variance Reduction for Training Large Models, arXiv:2411.10438.
    """

    config = configs.MarsSoapConfig

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
        shard_mode: Literal["local", "owner"] = "local",
        state_dtype: Literal["float32", "bfloat16", "float8"] = "float32",
        pack_factors: bool = False,
        distributed_refresh: bool | None = None,
        shampoo_beta: float | None = None,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        stagger: bool = False,
        one_sided: bool = False,
        block_size: int | None = None,
        overlap_refresh: bool = False,
    ) -> None:
        defaults = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        self._corrected = False
        super().__init__(params, {**defaults, "rule": variant})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; what its vectors take over from its matrices is settled here."""
        if param_group.get("weight_decay_1d", self.defaults["weight_decay_1d"]) is None:
            param_group["weight_decay_1d"] = param_group.get("weight_decay", 0.1)
        param_group.setdefault("base_lr", float(param_group.get("lr", self.defaults["lr"])))
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        beta1, beta2 = check_pair("betas_1d", group["betas_1d"])
        schema.check_values(self.config, {"beta1_1d": beta1, "beta2_1d": beta2})
        check_choice("rule", group["rule"], ("adamw", "lion", "shampoo", "soap", "m", "adam"))
        if group["exact"] and group["shard_mode"] == "owner":
            raise ValueError(
                "got exact=True with shard_mode='owner', wanted one of them: the previous weights lie with the ranks "
                "that have the weights; use shard_mode='local'"
            )
        if group["lr_1d"] is not None and group["base_lr"] == 0:
            raise ValueError("lr must be > 0 where lr_1d is set, got 0; lr_1d follows lr in proportion")

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
            What the closure returned at the current weights.

        Raises:
            RuntimeError: If exact MARS got gradients without the correction.
            ValueError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
                if self.exact:
                    with self.at_previous_weights():
                        closure()
        if self.exact and not self._corrected and not self._is_synthetic():
            raise RuntimeError(
                "exact MARS got gradients without their correction, wanted the same minibatch's gradients at the "
                "previous weights too; train with hf_soap.SoapTrainer, or in a loop of your own run the backward pass "
                "again in `with optimizer.at_previous_weights():`, or pass a closure, or use exact=False"
            )
        super().step()
        self._corrected = False
        return loss

    @property
    def exact(self) -> bool:
        """Whether any param group asks for exact MARS."""
        return any(group["exact"] for group in self.param_groups)

    @property
    def has_previous_weights(self) -> bool:
        """Whether some parameter was updated before, so that :meth:`at_previous_weights` has weights to go back to."""
        self._settle()  # a step that did not count left no weights behind
        return any(state["step"] > 0 and PREV_PARAM in state for state in self.state.values())

    @contextmanager
    def at_previous_weights(self) -> Iterator[None]:
        """Swaps in the weights before the last update, for the second backward pass of exact MARS.

        Call it when the gradients of the minibatch are there, and compute them again inside. On leaving, the weights
        are back and every ``.grad`` holds g + γ·β₁/(1-β₁)·(g - g'), to be clipped and stepped. At a parameter's first
        step g' counts as zero. ::

            model(batch).loss.backward()
            with optimizer.at_previous_weights():
                model(batch).loss.backward()
            optimizer.step()

        If the body raises, weights and gradients are put back as they were.
        """
        self._settle()
        stash = [(group, p, p.grad) for group in self.param_groups for p in group["params"] if p.requires_grad]
        moved = [(local(p), local(p).detach().clone(), self._previous(group, p)) for group, p, _ in stash]
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
                for (group, param, grad), (_, _, previous) in zip(stash, moved, strict=True):
                    settle_gradient_(param)
                    behind = local_grad(param) if previous is not None else None
                    param.grad = grad
                    if grad is not None:
                        settle_gradient_(param)
                        self._correct(group, param, behind)
            self._corrected = True
        finally:
            with torch.no_grad():
                for weight, before, _ in moved:
                    weight.copy_(before)

    def _previous(self, group: dict[str, Any], param: Tensor) -> Tensor | None:
        state = self.state.get(param, {})
        if PREV_PARAM not in state or not state["step"] > 0:
            return None
        return self.plan_of(group, param).layout.from_blocks(state[PREV_PARAM], local(param).shape)

    def _correct(self, group: dict[str, Any], param: Tensor, behind: Tensor | None) -> None:
        grad = local_grad(param)
        if grad is None or not group["exact"] or not isinstance(self.plan_of(group, param).rule, Mars):
            return
        if 0 in grad.stride() and not is_sharded(param):  # expanded: several entries are one place in memory
            grad = param.grad = grad.clone(memory_format=torch.contiguous_format)
        other = torch.zeros_like(grad) if behind is None else behind
        grad.copy_(updates.mars_correction(grad, other, beta1=group["betas"][0], gamma=group["gamma"]))

    def plan(self, group: dict[str, Any], shape: Sequence[int], *, sharded: bool = False) -> Plan:
        """Returns the variant's rule behind the correction, or AdamW for what is no matrix."""
        matrix = len(shape) == 2 or (group["rule"] == "soap" and len(shape) > 2)
        whole = plan_layout(shape, max_precond_dim=0)
        kept: dict[str, Any] = {"keep_weights": group["exact"], **state_options(group)}
        if group["rule"] == "adam" or not (matrix or group["optimize_1d"]):
            beta1, beta2 = group["betas_1d"]
            scale = 1.0 if group["lr_1d"] is None else group["lr_1d"] / group["base_lr"]
            adamw, decay = AdamW(beta1=beta1, beta2=beta2, eps=group["eps"]), group["weight_decay_1d"]
            return Plan(adamw, whole, lr_scale=scale, weight_decay=decay, **kept)
        soap = group["rule"] == "soap"
        inner = soap_rule(group) if soap else _mars_inner(group, matrix=matrix)
        rule = Mars(inner=inner, beta1=group["betas"][0], gamma=group["gamma"], exact=group["exact"])
        layout = plan_factors(group, shape, sharded=sharded) if soap else whole
        return Plan(rule, layout, decay_last=soap, **kept)


def _mars_inner(group: dict[str, Any], *, matrix: bool) -> Rule:
    beta1, beta2 = group["betas"]
    if group["rule"] == "lion":
        return Lion(beta1=beta1)
    if group["rule"] == "adamw" or not matrix:
        return AdamW(beta1=beta1, beta2=beta2, eps=group["eps"])
    return Orthogonal(beta1=beta1, eps=group["eps"], scale="aspect" if group["rule"] == "shampoo" else "rms")
