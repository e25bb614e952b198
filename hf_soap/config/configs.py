"""The options of every optimizer as typed configs, one for each name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from hf_soap.config import modules
from hf_soap.config.options import AT_LEAST_1, DECAY_RATE, NON_NEGATIVE, POSITIVE, Check, OptimizerConfig, option

REFRESH_GROWTH = (
    "Refresh more often at first: the next refresh comes after this share of the updates so far, from 1 to "
    "`precondition_frequency` updates; 0 keeps the distance constant."
)
GROWTH: Check = (lambda x: x == 0 or x >= 1e-3, "0 or >= 0.001")
OVERLAP_REFRESH = "On a GPU, refresh during the next forward and backward pass."


@dataclass(frozen=True, kw_only=True)
class CommonOptions(OptimizerConfig):
    """Options that every optimizer of the family has; a config of another one inherits them."""

    nonfinite: Literal["skip", "off"] = option(
        "skip", "`skip` skips the whole step when a gradient holds NaN or Inf; `off` does not check."
    )
    max_skipped_in_a_row: int = option(
        100,
        "Raise an error after this many skipped steps in a row; 0 never raises one.",
        NON_NEGATIVE,
        remedy="use 0 to go on without a limit",
    )
    average_horizon: int = option(
        0,
        "Average the weights over about this many steps, for evaluation and saving: their mean at first, then an "
        "exponential moving average; 0 keeps none.",
        NON_NEGATIVE,
    )
    average_start: int = option(0, "Steps before averaging starts.", NON_NEGATIVE)
    shard_mode: Literal["local", "owner"] = option(
        "local",
        "With several ranks: `local` preconditions each rank's part of a matrix; `owner` preconditions whole "
        "matrices, each on one rank, which gives the result of one process.",
    )
    state_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "Dtype of the stored state; arithmetic stays float32. Rounding is stochastic and repeatable. On a CPU, "
        "`bfloat16` makes a step of SOAP a quarter to a half longer, and one of MARS-AdamW three to four times as "
        "long.",
    )
    stacked_matrices: bool = option(
        True, "Treat a 3-D tensor whose first dimension is the shortest (experts of a mixture) as a stack of matrices."
    )
    cautious_weight_decay: bool = option(
        False, "Decay only the entries of the weights that the update does not enlarge."
    )
    norm: Literal["relative", "hyperball"] | None = option(
        None,
        "`relative`: steps of matrices and convolutions have the length of the learning rate times the norm of the "
        "weights. `hyperball`: the weights are then scaled back to their norm, and `weight_decay` does not apply to "
        "them. Vectors, and under the Trainer embeddings, output head and adapters, take ordinary steps.",
    )
    modules: Mapping[str, Any] | None = option(
        None,
        "Mapping of regexes on parameter names, or roles such as `@vectors`, to settings of the parameters that "
        "match: options, `rule`, `lr` or `lr_factor`, `weight_decay`.",
        trainer_only=True,
        hashed=False,
    )
    mup_base_width: int | None = option(
        None,
        "μP: the hidden size for which `learning_rate` and `weight_decay` were tuned. Those of hidden matrices and of "
        "the output head are adapted to the hidden size of this model.",
        AT_LEAST_1,
        remedy="use the hidden_size of the model of your sweep, or none",
        trainer_only=True,
    )
    adam_modules: str | None = option(
        None, "Regex on parameter names: matching parameters are updated by Adam, without factors.", trainer_only=True
    )
    log_every: int = option(
        0,
        "Write the optimizer's diagnostics to the Trainer's log every this many steps; 0 never does.",
        NON_NEGATIVE,
        trainer_only=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules is not None:
            object.__setattr__(self, "modules", modules.checked(self, self.modules))


@dataclass(frozen=True, kw_only=True)
class FactorOptions(CommonOptions):
    """Options of optimizers that keep a factor a side."""

    precondition_frequency: int = option(
        10, "Updates between two refreshes of the preconditioner.", AT_LEAST_1, remedy="use 1 to refresh at every step"
    )
    max_precond_dim: int = option(
        10000,
        "A side longer than this gets no factor; its basis stays the identity.",
        NON_NEGATIVE,
        remedy="use 0 to factor no side at all, which is Adam",
    )
    max_aspect_ratio: float | None = option(
        8.0,
        "A matrix with a larger ratio of its sides gets a factor on its short side only; `none` sets no limit.",
        POSITIVE,
        remedy="use none for no limit",
    )
    merge_dims: bool = option(
        False, "Merge small neighbouring dimensions of tensors that have more than two (convolutions)."
    )
    precondition_1d: bool = option(False, "Give vectors a factor too, instead of updating them by Adam.")
    one_sided: bool = option(False, "Factor only the shorter side of each matrix: less memory and time.")
    block_size: int | None = option(
        None, "Split longer sides into blocks of at most this size, each with its own factors.", AT_LEAST_1
    )
    square_blocks: bool = option(
        False, "Split the longer side of each matrix into blocks that are about square, each with its own factors."
    )
    pack_factors: bool = option(
        False, "Store one triangle of each symmetric matrix: exact, but on a CPU a step is about a fifth longer."
    )
    distributed_refresh: bool | None = option(
        None, "Split refreshes among ranks with equal weights and gradients; `none` does so under the Trainer's DDP."
    )
    one_sided_modules: str | None = option(
        None, "Regex on parameter names: matching parameters get a factor on the shorter side only.", trainer_only=True
    )
    lora_sides: Literal["rank", "both", "none"] = option(
        "rank",
        "Sides of LoRA matrices that get a factor: the rank side, both, or none, which is Adam.",
        trainer_only=True,
    )


@dataclass(frozen=True, kw_only=True)
class ShampooFactorOptions(FactorOptions):
    """Options of SOAP's and Shampoo's factors."""

    shampoo_beta: float | None = option(None, "Decay rate of the Kronecker factors; `none` uses beta2.", DECAY_RATE)
    stagger: bool = option(
        False, "Tensor number i refreshes i updates earlier: not all refreshes fall on one step. Slow on a GPU."
    )
    refresh_growth: float = option(0.03, REFRESH_GROWTH, GROWTH)


@dataclass(frozen=True, kw_only=True)
class AuxiliaryOptions(OptimizerConfig):
    """Options of optimizers that leave vectors and other non-matrix parameters to AdamW, with separate rates."""

    lr_1d: float | None = option(
        None, "Learning rate of what is updated by AdamW, which follows the schedule; `none` takes lr.", POSITIVE
    )
    beta1_1d: float = option(0.9, "Decay rate of their first moment.", DECAY_RATE)
    beta2_1d: float = option(0.95, "Decay rate of their second moment.", DECAY_RATE)
    weight_decay_1d: float | None = option(
        None, "Their weight decay; `none` takes the param group's. The published runs use 0.1.", NON_NEGATIVE
    )

    def constructor_kwargs(self) -> dict[str, Any]:
        """Returns the keyword arguments for the optimizer's constructor, with the decay rates as a pair."""
        kwargs = super().constructor_kwargs()
        return {"betas_1d": (kwargs.pop("beta1_1d"), kwargs.pop("beta2_1d")), **kwargs}


_ADAMW = {"rule": "adam", "beta1": 0.9, "beta2": 0.95}
_FRONTIER = {
    "beta1": 0.9,
    "beta2": 0.9,
    "kl": True,
    "modules": dict.fromkeys(("@embeddings", "@head", "@vectors"), _ADAMW),
}
SOAP_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "official": {
            "refresh_growth": 0.0,
            "max_aspect_ratio": None,
            "stacked_matrices": False,
            "lora_sides": "both",
        },
        "frontier": _FRONTIER,
        "fine_tuning": {"beta1": 0.9},
        "small": {
            **_FRONTIER,
            "state_dtype": "bfloat16",
            "pack_factors": True,
            "factorized": True,
            "square_blocks": True,
        },
    }
)
"""What ``preset=NAME`` sets for SOAP."""


@dataclass(frozen=True, kw_only=True)
class SoapOptions(ShampooFactorOptions):
    """Options of SOAP's second moment, bases and arithmetic."""

    factorized: bool = option(False, "Store the second moment of a matrix as a product of row and column means.")
    kl: bool = option(False, "KL-SOAP: whiten the gradient by the other factors before it enters a factor.")
    include_current: bool = option(False, "Let the current gradient enter the basis before it is rotated, not after.")
    refresh_tol: float = option(
        0.0, "Skip the refresh of a basis if at most this share of its factor is off the diagonal.", NON_NEGATIVE
    )
    rotate_second_moment: bool = option(
        False, "At a refresh, rotate the second moment with the squares of the rotation, instead of permuting it."
    )
    matmul_dtype: Literal["float32", "tf32", "bfloat16"] = option(
        "float32",
        "Arithmetic of the rotations of gradient and direction; factors and bases stay exact. On a CPU, `tf32` is "
        "float32. So is `bfloat16` on a CPU without AVX512-BF16 or AMX (on ARM, BF16), so results depend on the "
        "processor.",
    )
    overlap_refresh: bool = option(False, OVERLAP_REFRESH)


@dataclass(frozen=True, kw_only=True)
class SoapConfig(SoapOptions):
    """Options of SOAP (arXiv:2409.11321).

    The defaults are those of its official implementation, except for what ``preset=official`` sets.
    """

    name: ClassVar[str] = "soap"
    lr: ClassVar[float] = 3e-3
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = SOAP_PRESETS

    beta1: float = option(0.95, "Decay rate of the first moment.", DECAY_RATE)
    beta2: float = option(0.95, "Decay rate of the second moment.", DECAY_RATE)
    eps: float = option(1e-8, "Added to the root of the second moment.", NON_NEGATIVE)
    normalize_grads: bool = option(
        False, "Divide each tensor's update by its root mean square; helps at frequencies near 100, hurts near 10."
    )
    correct_bias: bool = option(True, "Adam's bias correction.")


@dataclass(frozen=True, kw_only=True)
class KlSoapConfig(SoapConfig):
    """Options of KL-SOAP (arXiv:2509.03378): SOAP with kl on."""

    name: ClassVar[str] = "kl_soap"
    lr_is_published: ClassVar[bool] = False

    kl: bool = option(True, "Whiten the gradient by the other factors before it enters a factor.")


@dataclass(frozen=True, kw_only=True)
class ShampooConfig(ShampooFactorOptions):
    """Options of Shampoo (arXiv:1802.09568, arXiv:2002.09018)."""

    name: ClassVar[str] = "shampoo"
    lr: ClassVar[float] = 1e-3
    lr_is_published: ClassVar[bool] = False

    beta1: float = option(0.9, "Decay rate of the gradient's moving average; 0 uses the gradient itself.", DECAY_RATE)
    beta2: float = option(0.95, "Decay rate of the grafted rule's second moment.", DECAY_RATE)
    eps: float = option(
        1e-8,
        "Added to the root of the grafted rule's second moment; with kl to the root of the factors' product.",
        NON_NEGATIVE,
    )
    exponent: float | None = option(
        None, "Power of each factor; `none` uses -1/(2k) for k axes, -1/2 with kl.", (lambda x: x < 0, "< 0")
    )
    statistics: Literal["ema", "sum"] = option("ema", "Average the factors, or sum them as the original does.")
    graft: Literal["adam", "adagrad", "rmsprop", "sgd"] | None = option(
        "adam", "Rule whose step length each tensor takes; `none` keeps Shampoo's own."
    )
    refresh_growth: float = option(0.0, REFRESH_GROWTH, GROWTH)
    root_method: Literal["eigh", "newton"] = option("eigh", "How inverse roots are computed.")
    ridge: float = option(1e-6, "Added to each factor, relative to its largest eigenvalue.", NON_NEGATIVE)
    root_cutoff: float = option(
        0.0,
        "Pseudo-inverse roots: eigenvalues of a factor below this share of its largest are mapped to 0.",
        (lambda x: 0 <= x < 1, "in [0, 1)"),
    )
    start_step: int | None = option(
        None,
        "First update with preconditioning; `none` uses precondition_frequency, or 1 without grafting.",
        NON_NEGATIVE,
    )
    asynchronous: bool = option(False, "Compute roots in the background and use the old ones meanwhile.")
    delay: int | None = option(
        None,
        "Use background roots exactly this many updates after their snapshot; `none`: as soon as they are done.",
        NON_NEGATIVE,
    )
    momentum: float = option(0.0, "Heavy-ball momentum on the direction.", DECAY_RATE)
    correct_bias: bool = option(True, "Debias the moving averages.")
    kl: bool = option(False, "KL-Shampoo: whiten the gradient by the other factors; needs `graft=none`.")


@dataclass(frozen=True, kw_only=True)
class KlShampooConfig(ShampooConfig):
    """Options of KL-Shampoo (arXiv:2509.03378): Shampoo with kl on and nothing grafted."""

    name: ClassVar[str] = "kl_shampoo"

    graft: Literal["adam", "adagrad", "rmsprop", "sgd"] | None = option(None, "KL-Shampoo cannot be grafted.")
    kl: bool = option(True, "Whiten the gradient by the other factors before it enters a factor.")


@dataclass(frozen=True, kw_only=True)
class MarsOptions(AuxiliaryOptions, CommonOptions):
    """Options of all variants of MARS, with the defaults of its official implementation (arXiv:2411.10438)."""

    lr: ClassVar[float] = 3e-3
    variant: ClassVar[str]

    beta1: float = option(0.95, "Decay rate of the first moment, also in the correction.", DECAY_RATE)
    beta2: float = option(0.99, "Decay rate of the second moment.", DECAY_RATE)
    eps: float = option(
        1e-8, "Added to the root of the second moment, or to the norm before Newton-Schulz.", NON_NEGATIVE
    )
    gamma: float = option(0.025, "Strength of the variance reduction; 0 turns it off.", NON_NEGATIVE)
    exact: bool = option(
        False, "Compute the previous gradient on the current minibatch: two backward passes a step; needs SoapTrainer."
    )
    optimize_1d: bool = option(
        False, "Correct vectors (everything but matrices) too, instead of updating them by AdamW."
    )

    def constructor_kwargs(self) -> dict[str, Any]:
        """Returns the keyword arguments for the optimizer's constructor, including the variant."""
        return {"variant": self.variant, **super().constructor_kwargs()}


MARS_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"frontier": {"beta1": 0.9, "beta2": 0.95, "gamma": 0.1}}
)
"""What ``preset=NAME`` sets for MARS-AdamW."""


@dataclass(frozen=True, kw_only=True)
class MarsConfig(MarsOptions):
    """Options of MARS-AdamW."""

    name: ClassVar[str] = "mars"
    variant: ClassVar[str] = "adamw"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MARS_PRESETS


@dataclass(frozen=True, kw_only=True)
class MarsAdamWConfig(MarsConfig):
    """Options of MARS-AdamW, under its full name."""

    name: ClassVar[str] = "mars_adamw"


@dataclass(frozen=True, kw_only=True)
class MarsLionConfig(MarsOptions):
    """Options of MARS-Lion."""

    name: ClassVar[str] = "mars_lion"
    lr: ClassVar[float] = 3e-4
    lr_is_published: ClassVar[bool] = False
    variant: ClassVar[str] = "lion"
    beta2: ClassVar[float] = MarsOptions.beta2  # type: ignore[misc]  # no option: Lion has no second moment


@dataclass(frozen=True, kw_only=True)
class MarsShampooConfig(MarsOptions):
    """Options of MARS-Shampoo."""

    name: ClassVar[str] = "mars_shampoo"
    lr_is_published: ClassVar[bool] = False
    variant: ClassVar[str] = "shampoo"


@dataclass(frozen=True, kw_only=True)
class MarsMConfig(MarsOptions):
    """Options of MARS-M (arXiv:2510.21800); embeddings and output head are updated by AdamW."""

    name: ClassVar[str] = "mars_m"
    lr_is_published: ClassVar[bool] = False
    variant: ClassVar[str] = "m"
    adam_embeddings: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class MarsSoapConfig(MarsOptions, ShampooFactorOptions):
    """Options of MARS with SOAP: the corrected gradient goes to SOAP."""

    name: ClassVar[str] = "mars_soap"
    lr_is_published: ClassVar[bool] = False
    variant: ClassVar[str] = "soap"

    overlap_refresh: bool = option(False, OVERLAP_REFRESH)


@dataclass(frozen=True, kw_only=True)
class OrthogonalOptions(AuxiliaryOptions):
    """Options of optimizers that orthogonalize the updates of matrices and leave everything else to AdamW."""

    adam_embeddings: ClassVar[bool] = True

    scale: Literal["aspect", "rms"] = option(
        "aspect", "Multiply by √max(1, rows/cols), or by 0.2·√max(rows, cols), the size of Adam's updates."
    )
    lr_1d: float | None = option(
        3e-4, "Learning rate of what is updated by AdamW, which follows the schedule; `none` takes lr.", POSITIVE
    )
    eps_1d: float = option(1e-8, "Added to the root of AdamW's second moment.", NON_NEGATIVE)


@dataclass(frozen=True, kw_only=True)
class MuonConfig(OrthogonalOptions, CommonOptions):
    """Options of Muon (K. Jordan, 2024); embeddings and output head are updated by AdamW."""

    name: ClassVar[str] = "muon"
    lr: ClassVar[float] = 0.02

    momentum: float = option(0.95, "Decay rate of the momentum.", DECAY_RATE)
    nesterov: bool = option(True, "Look ahead by one step of the momentum.")
    eps: float = option(1e-7, "Added to the norm before Newton-Schulz.", NON_NEGATIVE)


@dataclass(frozen=True, kw_only=True)
class SoapMuonConfig(OrthogonalOptions, SoapOptions):
    """Options of Newton-Schulz after SOAP; embeddings and output head are updated by AdamW."""

    name: ClassVar[str] = "soap_muon"
    lr: ClassVar[float] = 0.02
    lr_is_published: ClassVar[bool] = False
    merge_dims: ClassVar[bool] = False  # type: ignore[misc]  # no option: AdamW updates what is not a matrix
    precondition_1d: ClassVar[bool] = False  # type: ignore[misc]  # no option, as merge_dims

    beta1: float = option(0.95, "Decay rate of the first moment.", DECAY_RATE)
    beta2: float = option(0.9, "Decay rate of the second moment.", DECAY_RATE)
    eps: float = option(
        1e-8, "Added to the root of the second moment, and to the norm before Newton-Schulz.", NON_NEGATIVE
    )
    precondition_frequency: int = option(
        1, "Updates between two refreshes of the preconditioner.", AT_LEAST_1, remedy="use 1 to refresh at every step"
    )
