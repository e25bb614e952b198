"""Shampoo, with the techniques of Scalable Shampoo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_soap.config import configs
from hf_soap.config.checks import check_choice
from hf_soap.distributed import dtensor
from hf_soap.engine.optimizer import BlockOptimizer
from hf_soap.engine.plan import Plan
from hf_soap.optimizers.base import plan_factors, plan_options
from hf_soap.rules.elementwise import AdamWRule
from hf_soap.rules.shampoo import ShampooRule


class Shampoo(BlockOptimizer):
    """Multiplies every axis of the gradient by an inverse root of its Kronecker factor.

    A matrix G gets factors L = EMA(GGᵀ) and R = EMA(GᵀG) and the direction L^(-1/4) Ĝ R^(-1/4), where Ĝ is the moving
    average of G, scaled to the length of the step that ``graft`` would take. Tensors without a factor follow
    ``graft``.

    Args:
        params: Parameters, named parameters, or groups of either. A group may override any setting, and may set
            ``rule="adam"`` to have no factors.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay rates of the gradient's moving average (0 for none) and of the grafted rule's second moment.
        shampoo_beta: Decay rate of the factors; None takes ``betas[1]``.
        eps: Added to the root of the grafted rule's second moment; with ``kl`` to the root of the
            factors' product.
        weight_decay: Decoupled weight decay.
        precondition_frequency: Updates between two computations of the inverse roots; factors accumulate at each.
        max_precond_dim: A longer side keeps only the diagonal of its factor.
        block_size: Cut longer sides into blocks of at most this size, each with its own factors.
        square_blocks: Cut the longer side of each matrix into blocks that are about square, each with its own factors.
        exponent: Power of each factor, below 0; None takes -1/(2k) for a tensor with k axes, -1/2 with ``kl``.
        statistics: ``"ema"`` averages; ``"sum"`` sums, as in the original Shampoo.
        graft: ``"adam"``, ``"adagrad"``, ``"rmsprop"``, ``"sgd"``, or None for Shampoo's own step length.
        root_method: ``"eigh"``, or ``"newton"`` for coupled Newton, which is faster only on GPUs.
        ridge: Added to each factor before the root, relative to its largest eigenvalue.
        root_cutoff: Eigenvalues of a factor below this share of its largest are mapped to 0, as in a pseudo-inverse,
            where a ridge would map them to large numbers. With ``root_method="eigh"`` only.
        start_step: The first update with preconditioning, 1-based; earlier updates follow the grafted rule (or the
            gradient). None takes ``precondition_frequency`` if a rule is grafted, else 1.
        asynchronous: Compute roots in the background from a snapshot, and use the old ones meanwhile.
        delay: With ``asynchronous``: use new roots exactly this many updates after their snapshot, at most
            ``precondition_frequency``, so that runs can be repeated and resumed bit for bit; 0 is the same as
            ``asynchronous=False``. None uses them as soon as they are done.
        momentum: Heavy ball on the direction.
        correct_bias: Debias the moving averages.
        merge_dims: Merge small neighbouring dimensions of tensors with more than two dimensions.
        precondition_1d: Factor vectors too.
        stagger: Spread the root computations of different parameters over different steps.
        refresh_growth: Compute roots more often at first: the next ones come after this share of the updates so far,
            but at least 1 and at most ``precondition_frequency`` updates. 0, or at least 0.001; 0 keeps the distance.
        one_sided: Factor only the shorter side of each matrix, with the exponent -1/2.
        kl: KL-Shampoo: whiten the gradient by the other factors before it enters a factor; requires ``graft=None``.
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
        ValueError: If a setting is of the wrong type or out of range, settings contradict each other, or a parameter
            is complex.

    Source:
        Gupta et al., arXiv:1802.09568; Anil et al., arXiv:2002.09018; Shi et al., arXiv:2309.06497; Lin et al.,
        arXiv:2509.03378.
    """

    config = configs.ShampooConfig

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        block_size: int | None = None,
        exponent: float | None = None,
        statistics: Literal["ema", "sum"] = "ema",
        graft: Literal["adam", "adagrad", "rmsprop", "sgd"] | None = "adam",
        root_method: Literal["eigh", "newton"] = "eigh",
        ridge: float = 1e-6,
        start_step: int | None = None,
        asynchronous: bool = False,
        delay: int | None = None,
        *,
        momentum: float = 0.0,
        root_cutoff: float = 0.0,
        correct_bias: bool = True,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        stagger: bool = False,
        square_blocks: bool = False,
        refresh_growth: float = 0.0,
        one_sided: bool = False,
        kl: bool = False,
        nonfinite: Literal["skip", "off"] = "skip",
        max_skipped_in_a_row: int = 100,
        average_horizon: int = 0,
        average_start: int = 0,
        shard_mode: Literal["local", "owner"] = "local",
        state_dtype: Literal["float32", "bfloat16"] = "float32",
        pack_factors: bool = False,
        distributed_refresh: bool | None = None,
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
        super().__init__(params, {**defaults, "rule": "shampoo"})

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_choice("rule", group["rule"], ("shampoo", "adam"))
        frequency, delay = group["precondition_frequency"], group["delay"]
        if delay is not None and delay > frequency:
            raise ValueError(
                f"delay must be <= precondition_frequency={frequency}, got {delay}; "
                "otherwise the next snapshot comes before its roots"
            )
        if group["asynchronous"] and delay is None and dtensor.ranks() > 1:
            raise ValueError(
                "asynchronous=True got delay=None with several ranks, wanted a number: ranks would start to use "
                "new roots at different steps and diverge; set delay, at most precondition_frequency"
            )
        if delay and not group["asynchronous"]:
            raise ValueError(f"got delay={delay} without asynchronous, wanted both or none; set asynchronous=True")
        if group["asynchronous"] and group["refresh_growth"]:
            raise ValueError(
                f"asynchronous=True got refresh_growth={group['refresh_growth']}, wanted 0: the first distances are "
                "too short for roots that come later; use one of the two"
            )
        if group["kl"] and (group["graft"] or group["exponent"] or group["statistics"] == "sum"):
            raise ValueError(
                "kl=True wants graft=None, exponent=None and statistics='ema', got "
                f"graft={group['graft']!r}, exponent={group['exponent']}, statistics={group['statistics']!r}"
            )
        exponent = group["exponent"]
        if group["root_method"] == "newton" and exponent and abs(1 / exponent - round(1 / exponent)) > 1e-9:
            raise ValueError(
                f"root_method='newton' wants an exponent -1/p with a whole p, got {exponent}; use root_method='eigh'"
            )

        if group["root_method"] == "newton" and group["root_cutoff"]:
            raise ValueError(
                f"root_method='newton' wants root_cutoff=0, got {group['root_cutoff']}: it computes no eigenvalues; "
                "use root_method='eigh'"
            )

    def plan(self, group: Mapping[str, Any], shape: Sequence[int], *, part: Sequence[int] | None = None) -> Plan:
        """Returns the Shampoo rule with the group's settings, or AdamW if KL-Shampoo has nothing to factor."""
        beta1, beta2 = group["betas"]
        layout = plan_factors(group, shape, part=part)
        if not layout.sides and (group["kl"] or group["rule"] == "adam"):
            adamw = AdamWRule(beta1=beta1, beta2=beta2, eps=group["eps"])
            return Plan(adamw, layout, **plan_options(group, shape))
        shampoo_beta = beta2 if group["shampoo_beta"] is None else group["shampoo_beta"]
        start = group["start_step"]
        if start is None:
            start = group["precondition_frequency"] if group["graft"] else 1
        return Plan(
            ShampooRule(
                beta1=beta1,
                beta2=beta2,
                shampoo_beta=None if group["statistics"] == "sum" else shampoo_beta,
                start_step=start,
                delay=group["delay"] if group["asynchronous"] else 0,
                **{name: group[name] for name in PASSED_ON},
            ),
            layout,
            **plan_options(group, shape),
        )


PASSED_ON = (
    "eps",
    "precondition_frequency",
    "exponent",
    "graft",
    "root_method",
    "ridge",
    "root_cutoff",
    "momentum",
    "correct_bias",
    "one_sided",
    "stagger",
    "refresh_growth",
    "kl",
)
"""Settings that the rule takes under the same names."""
