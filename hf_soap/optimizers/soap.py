"""SOAP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_soap.config import configs
from hf_soap.config.checks import check_choice
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.engine.plan import Plan
from hf_soap.optimizers.base import plan_factors, plan_options
from hf_soap.rules.soap import ORTHONORMALIZE_EVERY, SoapRule


class SOAP(BlockOptimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner.

    Every matrix G gets factors L = EMA(GGᵀ) and R = EMA(GᵀG); Adam runs on the gradient rotated into their eigenbases,
    which are refreshed every ``precondition_frequency`` updates. The first non-zero gradient of a parameter seeds its
    bases and updates nothing. Vectors are updated by Adam.

    Args:
        params: Parameters, named parameters, or groups of either. A group may override any setting, and may set
            ``rule="adam"`` to have no factors.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay rates of the moments, each in [0, 1).
        shampoo_beta: Decay rate of the factors; None takes ``betas[1]``.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay; applied after the update as W ← W − lr·weight_decay·W.
        precondition_frequency: Updates between two refreshes of the bases.
        max_precond_dim: A longer side keeps an identity basis.
        merge_dims: Merge small neighbouring dimensions of tensors with more than two dimensions.
        precondition_1d: Factor vectors too.
        normalize_grads: Divide each tensor's update by its root mean square.
        correct_bias: Adam's bias correction.
        stagger: Spread the refreshes of different parameters over different steps.
        refresh_growth: Refresh more often at first: the next refresh comes after this share of the updates so far, but
            at least 1 and at most ``precondition_frequency`` updates. 0, or at least 0.001; 0 keeps the distance.
        one_sided: Factor only the shorter side of each matrix.
        block_size: Cut longer sides into blocks of at most this size, each with its own factors.
        square_blocks: Cut the longer side of each matrix into blocks that are about square, each with its own factors.
        factorized: Keep the second moment of a factored matrix as the product of row and column means.
        kl: Whiten the gradient by the other factors before it enters a factor (KL-SOAP, arXiv:2509.03378).
        include_current: Add the current gradient to factor and basis before it is rotated, not afterwards.
        refresh_tol: Skip the refresh of a basis that diagonalises its factor up to this share (arXiv:2506.03595).
        rotate_second_moment: At a refresh by the rotation R, set V ← (R∘R)ᵀV along the refreshed side. Otherwise V is
            only permuted, in the order of the sorted eigenvalues.
        matmul_dtype: Arithmetic of the rotations of gradient and direction: ``"bfloat16"``, or ``"tf32"`` on GPUs. On
            a CPU without instructions for bfloat16 products, ``"bfloat16"`` is float32, with a warning.
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
        overlap_refresh: On a GPU, refresh during the next forward and backward pass, on a separate stream; the next
            step waits for it. The results are the same. State that is rounded or packed is refreshed within the step.
            Read ``state`` directly only after :meth:`state_dict` or ``skipped_steps``, which wait for the refresh.
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
        Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, arXiv:2409.11321; conventions of its official
        implementation, and its defaults except for what ``SoapConfig.preset("official")`` sets.
    """

    config = configs.SoapConfig

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = True,
        *,
        stagger: bool = False,
        square_blocks: bool = False,
        refresh_growth: float = 0.03,
        one_sided: bool = False,
        block_size: int | None = None,
        factorized: bool = False,
        kl: bool = False,
        include_current: bool = False,
        refresh_tol: float = 0.0,
        rotate_second_moment: bool = False,
        matmul_dtype: Literal["float32", "tf32", "bfloat16"] = "float32",
        nonfinite: Literal["skip", "off"] = "skip",
        max_skipped_in_a_row: int = 100,
        average_horizon: int = 0,
        average_start: int = 0,
        shard_mode: Literal["local", "owner"] = "local",
        state_dtype: Literal["float32", "bfloat16"] = "float32",
        pack_factors: bool = False,
        distributed_refresh: bool | None = None,
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
        super().__init__(params, {**defaults, "rule": "soap"})

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice("rule", group["rule"], ("soap", "adam"))

    def plan(self, group: Mapping[str, Any], shape: Sequence[int], *, part: Sequence[int] | None = None) -> Plan:
        """Returns the SOAP rule with the group's settings; Adam is SOAP without a factored side."""
        layout = plan_factors(group, shape, part=part)
        return Plan(soap_rule(group), layout, **plan_options(group, shape, decay_last=True))


def soap_rule(group: Mapping[str, Any]) -> SoapRule:
    """Makes the SOAP rule from the settings of a param group."""
    beta1, beta2 = group["betas"]
    return SoapRule(
        beta1=beta1,
        beta2=beta2,
        shampoo_beta=beta2 if group["shampoo_beta"] is None else group["shampoo_beta"],
        eps=group["eps"],
        precondition_frequency=group["precondition_frequency"],
        normalize_grads=group.get("normalize_grads", False),
        correct_bias=group.get("correct_bias", True),
        stagger=group["stagger"],
        refresh_growth=group["refresh_growth"],
        # A rounded basis is orthonormal only to 2^-9, and the rounding errors of refreshes would accumulate.
        orthonormalize_every=ORTHONORMALIZE_EVERY if group["state_dtype"] == "float32" else 1,
        **{name: group[name] for name in PASSED_ON if name in group},
    )


PASSED_ON = ("factorized", "kl", "include_current", "refresh_tol", "rotate_second_moment", "matmul_dtype")
"""Settings that the rule takes under the same names, where an optimizer has them."""
