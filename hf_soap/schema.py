"""The typed options of every optimizer: defaults, ranges and help, and how ``optim_args`` is read.

The README's table, the checks of the constructors and the errors for a mistyped option are all made from here.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

Check = tuple[Callable[[Any], bool], str]

POSITIVE: Check = (lambda x: x > 0, "> 0")
NON_NEGATIVE: Check = (lambda x: x >= 0, ">= 0")
AT_LEAST_1: Check = (lambda x: x >= 1, ">= 1")
DECAY_RATE: Check = (lambda x: 0 <= x < 1, "in [0, 1)")


def option(
    default: Any, help: str, check: Check | None = None, *, remedy: str = "", trainer_only: bool = False
) -> Any:
    """Declares one option of a config.

    Args:
        default: The published default.
        help: One line for the README.
        check: Predicate and its wording; ``None`` as a value is never checked.
        remedy: What to use instead, appended to the error.
        trainer_only: Read by the registry, no argument of the optimizer's constructor.

    Returns:
        A dataclass field.
    """
    metadata = {"help": help, "check": check, "remedy": remedy, "trainer_only": trainer_only}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Options of one optimizer, checked when it is made. Made from ``optim_args`` or written out in Python.

    Raises:
        ValueError: If a value has the wrong type or is out of range.
    """

    name: ClassVar[str]
    lr: ClassVar[float]
    """Published learning rate, for the warning about a forgotten one; the Trainer's ``learning_rate`` decides."""
    adam_embeddings: ClassVar[bool] = False
    """Whether embeddings and the output head are updated by Adam."""

    def __post_init__(self) -> None:
        check_values(type(self), {f.name: getattr(self, f.name) for f in fields(self)})

    def to_optim_args(self) -> str:
        """Returns the options that differ from their defaults as text for ``TrainingArguments(optim_args=...)``."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return ",".join(f"{key}={_to_text(value)}" for key, value in changed.items())

    def constructor_kwargs(self) -> dict[str, Any]:
        """Returns the keyword arguments for the optimizer's constructor."""
        known = option_fields(type(self))
        kwargs = {key: value for key, value in asdict(self).items() if not known[key].metadata["trainer_only"]}
        betas = kwargs.pop("beta1"), kwargs.pop("beta2")
        return {"betas": betas, **kwargs}


@dataclass(frozen=True, kw_only=True)
class _Guard(OptimizerConfig):
    nonfinite: Literal["skip", "off"] = option(
        "skip", "`skip` leaves out the whole step when a gradient holds NaN or Inf; `off` does not look."
    )
    adam_modules: str | None = option(
        None, "Regex on parameter names: what matches is updated by Adam, with no factors.", trainer_only=True
    )
    log_every: int = option(
        0,
        "SoapTrainer adds optimizer diagnostics to the log at every such step; 0 never.",
        NON_NEGATIVE,
        trainer_only=True,
    )


@dataclass(frozen=True, kw_only=True)
class _Factors(_Guard):
    shampoo_beta: float | None = option(None, "Decay rate of the Kronecker factors; `none` takes beta2.", DECAY_RATE)
    precondition_frequency: int = option(
        10, "Updates between two refreshes of the preconditioner.", AT_LEAST_1, remedy="use 1 to refresh at every step"
    )
    max_precond_dim: int = option(
        10000,
        "A longer side keeps an identity basis and no factor.",
        NON_NEGATIVE,
        remedy="use 0 to factor no side at all, which is Adam",
    )
    merge_dims: bool = option(
        False, "Merge small neighbouring dimensions of tensors with more than two (convolutions)."
    )
    precondition_1d: bool = option(False, "Factor vectors too, instead of updating them by Adam.")
    stagger: bool = option(
        False, "Tensor i refreshes i updates earlier, so that refreshes do not all fall on the same step."
    )
    one_sided: bool = option(False, "Factor only the shorter side of each matrix: less memory and time.")
    block_size: int | None = option(
        None, "Cut longer sides into blocks of at most this size, each with its own factors.", AT_LEAST_1
    )
    one_sided_modules: str | None = option(
        None, "Regex on parameter names: what matches gets a factor on the shorter side only.", trainer_only=True
    )
    lora_sides: Literal["rank", "both", "none"] = option(
        "rank",
        "Sides of LoRA matrices that get a factor: the rank's, both, or none, which is Adam.",
        trainer_only=True,
    )


@dataclass(frozen=True, kw_only=True)
class SoapConfig(_Factors):
    """Options of SOAP, with the defaults of its official implementation (arXiv:2409.11321)."""

    name: ClassVar[str] = "soap"
    lr: ClassVar[float] = 3e-3

    beta1: float = option(0.95, "Decay rate of the first moment.", DECAY_RATE)
    beta2: float = option(0.95, "Decay rate of the second moment.", DECAY_RATE)
    eps: float = option(1e-8, "Added to the root of the second moment.", NON_NEGATIVE)
    normalize_grads: bool = option(
        False, "Divide each tensor's update by its root mean square; helps at frequencies near 100, hurts near 10."
    )
    correct_bias: bool = option(True, "Adam's bias correction.")
    factorized: bool = option(False, "Keep the second moment of a matrix as a product of row and column means.")
    kl: bool = option(False, "KL-SOAP: whiten the gradient by the other factors before it enters a factor.")
    include_current: bool = option(False, "Let the current gradient into the basis before it is rotated, not after.")
    refresh_tol: float = option(
        0.0, "Skip the refresh of a basis whose factor is off diagonal by at most this share.", NON_NEGATIVE
    )


@dataclass(frozen=True, kw_only=True)
class KlSoapConfig(SoapConfig):
    """Options of KL-SOAP (arXiv:2509.03378): SOAP with kl on."""

    name: ClassVar[str] = "kl_soap"

    kl: bool = option(True, "Whiten the gradient by the other factors before it enters a factor.")


@dataclass(frozen=True, kw_only=True)
class ShampooConfig(_Factors):
    """Options of Shampoo (arXiv:1802.09568, arXiv:2002.09018)."""

    name: ClassVar[str] = "shampoo"
    lr: ClassVar[float] = 1e-3

    beta1: float = option(0.9, "Decay rate of the gradient's moving average; 0 takes the gradient itself.", DECAY_RATE)
    beta2: float = option(0.95, "Decay rate of the grafted rule's second moment.", DECAY_RATE)
    eps: float = option(1e-8, "Added to the root of the grafted rule's second moment.", NON_NEGATIVE)
    exponent: float | None = option(
        None, "Power of each factor; `none` takes -1/(2k) for k axes, -1/2 with kl.", (lambda x: x < 0, "< 0")
    )
    statistics: Literal["ema", "sum"] = option("ema", "Average the factors, or sum them up as the original does.")
    graft: Literal["adam", "adagrad", "rmsprop", "sgd"] | None = option(
        "adam", "Rule whose step length each tensor gets; `none` for Shampoo's own."
    )
    root_method: Literal["eigh", "newton"] = option("eigh", "How inverse roots are computed.")
    ridge: float = option(1e-6, "Added to each factor, relative to its largest eigenvalue.", NON_NEGATIVE)
    start_step: int | None = option(
        None,
        "First update with preconditioning; `none` takes precondition_frequency, or 1 without grafting.",
        NON_NEGATIVE,
    )
    asynchronous: bool = option(False, "Compute roots in the background and go on with the old ones meanwhile.")
    delay: int | None = option(
        None,
        "Use background roots exactly this many updates after their snapshot; `none` as soon as they are done.",
        NON_NEGATIVE,
    )
    momentum: float = option(0.0, "Heavy ball on the direction.", DECAY_RATE)
    correct_bias: bool = option(True, "Debias the moving averages.")
    kl: bool = option(False, "KL-Shampoo: whiten the gradient by the other factors; wants `graft=none`.")


@dataclass(frozen=True, kw_only=True)
class KlShampooConfig(ShampooConfig):
    """Options of KL-Shampoo (arXiv:2509.03378): Shampoo with kl on and nothing grafted."""

    name: ClassVar[str] = "kl_shampoo"

    graft: Literal["adam", "adagrad", "rmsprop", "sgd"] | None = option(None, "Nothing can be grafted.")
    kl: bool = option(True, "Whiten the gradient by the other factors before it enters a factor.")


@dataclass(frozen=True, kw_only=True)
class MarsConfig(_Guard):
    """Options of MARS-AdamW, with the defaults of its official implementation (arXiv:2411.10438)."""

    name: ClassVar[str] = "mars"
    lr: ClassVar[float] = 3e-3
    variant: ClassVar[str] = "adamw"

    beta1: float = option(0.95, "Decay rate of the first moment, also in the correction.", DECAY_RATE)
    beta2: float = option(0.99, "Decay rate of the second moment.", DECAY_RATE)
    eps: float = option(
        1e-8, "Added to the root of the second moment, or to the norm before Newton-Schulz.", NON_NEGATIVE
    )
    gamma: float = option(0.025, "Strength of the variance reduction; 0 turns it off.", NON_NEGATIVE)
    exact: bool = option(
        False, "Take the previous gradient on the current minibatch: two backward passes a step; needs SoapTrainer."
    )
    optimize_1d: bool = option(False, "Correct vectors (all but matrices) too, instead of updating them by AdamW.")
    lr_1d: float | None = option(
        None, "Learning rate of those vectors, which follows the schedule; `none` takes lr.", POSITIVE
    )
    beta1_1d: float = option(0.9, "Decay rate of their first moment.", DECAY_RATE)
    beta2_1d: float = option(0.95, "Decay rate of their second moment.", DECAY_RATE)
    weight_decay_1d: float | None = option(
        None, "Their weight decay; `none` takes the param group's, or 0.1 where the group sets none.", NON_NEGATIVE
    )

    def constructor_kwargs(self) -> dict[str, Any]:
        """Returns the keyword arguments for the optimizer's constructor, the variant among them."""
        kwargs = super().constructor_kwargs()
        betas_1d = kwargs.pop("beta1_1d"), kwargs.pop("beta2_1d")
        return {"variant": self.variant, "betas_1d": betas_1d, **kwargs}


@dataclass(frozen=True, kw_only=True)
class MarsAdamWConfig(MarsConfig):
    """Options of MARS-AdamW under its full name."""

    name: ClassVar[str] = "mars_adamw"


@dataclass(frozen=True, kw_only=True)
class MarsLionConfig(MarsConfig):
    """Options of MARS-Lion."""

    name: ClassVar[str] = "mars_lion"
    lr: ClassVar[float] = 1e-3
    variant: ClassVar[str] = "lion"


@dataclass(frozen=True, kw_only=True)
class MarsShampooConfig(MarsConfig):
    """Options of MARS-Shampoo."""

    name: ClassVar[str] = "mars_shampoo"
    variant: ClassVar[str] = "shampoo"


@dataclass(frozen=True, kw_only=True)
class MarsMConfig(MarsConfig):
    """Options of MARS-M (arXiv:2510.21800); embeddings and output head are updated by AdamW."""

    name: ClassVar[str] = "mars_m"
    variant: ClassVar[str] = "m"
    adam_embeddings: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class MarsSoapConfig(MarsConfig, _Factors):
    """Options of MARS in front of SOAP."""

    name: ClassVar[str] = "mars_soap"
    variant: ClassVar[str] = "soap"


ConfigT = TypeVar("ConfigT", bound=OptimizerConfig)


def check_values(config: type[OptimizerConfig], values: Mapping[str, Any]) -> None:
    """Checks names, types and ranges of options.

    Args:
        config: Whose options they are.
        values: Option name to value.

    Raises:
        ValueError: On the first option that is unknown, of the wrong type or out of range, with the remedy.
    """
    known = option_fields(config)
    hints = typing.get_type_hints(config)
    for key, value in values.items():
        if key not in known:
            raise ValueError(_unknown(config, key))
        if not _has_type(value, hints[key]):
            raise ValueError(f"{key} must be {_type_name(hints[key])}, got {value!r}")
        meta = known[key].metadata
        if meta["check"] is not None and value is not None:
            test, wording = meta["check"]
            if value != value or value in (math.inf, -math.inf) or not test(value):
                raise ValueError(f"{key} must be {wording}, got {value!r}{_remedy(known[key])}")
        if key.endswith("_modules") and value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{key} must be a regular expression, got {value!r}: {error}") from error


def parse_optim_args(text: str | None, config: type[ConfigT], defaults: Mapping[str, Any] | None = None) -> ConfigT:
    """Reads ``optim_args`` of TrainingArguments.

    Args:
        text: ``key=value`` pairs split by commas; commas inside brackets belong to the value, so that
            ``betas=(0.9,0.95)`` and regular expressions with groups can be written.
        config: Whose options to read.
        defaults: Values for options that ``text`` does not name, instead of the published ones.

    Returns:
        The checked config.

    Raises:
        ValueError: If the text cannot be read, or names an unknown option, twice the same, a wrong type or a value
            out of range.
    """
    hints = typing.get_type_hints(config)
    values: dict[str, Any] = {}
    for key, raw in _pairs(text or "", config):
        if key in values:
            raise ValueError(f"optim_args names {key} twice, wanted it once; remove one of them")
        values[key] = _from_text(key, raw, hints[key])
    return config(**{**(defaults or {}), **values})


def option_table(config: type[OptimizerConfig]) -> str:
    """Returns the options of an optimizer as a Markdown table: name, type, default, range and meaning."""
    hints = typing.get_type_hints(config)
    rows = ["| option | type | default | what it does |", "|---|---|---|---|"]
    known = option_fields(config)
    own_first = [key for cls in config.__mro__ for key in vars(cls).get("__annotations__", {}) if key in known]
    for key in dict.fromkeys(own_first):
        entry = known[key]
        check = entry.metadata["check"]
        kind = _type_name(hints[key]).replace("|", "\\|") + (f", {check[1]}" if check else "")
        rows.append(f"| `{key}` | {kind} | `{_to_text(entry.default)}` | {entry.metadata['help']} |")
    return "\n".join(rows)


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns ``did you mean X? `` for the closest of ``choices``, or nothing if none is close."""
    match = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"did you mean {match[0]}? " if match else ""


def option_fields(config: type[OptimizerConfig]) -> dict[str, Field[Any]]:
    return {f.name: f for f in fields(config)}


def _unknown(config: type[OptimizerConfig], key: str) -> str:
    choices = option_fields(config)
    return f"unknown option {key!r} of {config.name}: {nearest(key, choices)}It takes {', '.join(choices)}."


def _remedy(entry: Field[Any]) -> str:
    default = "" if entry.default is MISSING else f"the default is {_to_text(entry.default)}"
    return f"; {entry.metadata['remedy'] or default}"


def _pairs(text: str, config: type[OptimizerConfig]) -> Iterable[tuple[str, str]]:
    for item in _split(text):
        key, equals, raw = (part.strip() for part in item.partition("="))
        if not equals or not key or not raw:
            raise ValueError(f"optim_args wants key=value pairs split by commas, got {item!r}; for example eps=1e-8")
        if key == "betas":
            betas = [beta.strip() for beta in raw.strip("()[]").split(",")]
            if len(betas) != 2:
                raise ValueError(
                    f"betas wants two numbers, got {raw!r}; write betas=(0.95,0.95), or beta1= and beta2="
                )
            yield from zip(("beta1", "beta2"), betas, strict=True)
        elif key not in option_fields(config):
            raise ValueError(_unknown(config, key))
        else:
            yield key, raw


def _split(text: str) -> list[str]:
    """Splits at the commas that stand outside brackets; empty items at the ends are dropped."""
    items, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            items.append("")
        else:
            items[-1] += char
    return [item.strip() for item in items if item.strip()]


def _from_text(key: str, raw: str, hint: Any) -> Any:
    args = _alternatives(hint)
    if type(None) in args and raw.lower() in ("none", "null"):
        return None
    kind = next(arg for arg in args if arg is not type(None))
    if typing.get_origin(kind) is Literal or kind is str:
        return raw
    if kind is bool:
        if raw.lower() in ("true", "1", "yes", "on"):
            return True
        if raw.lower() in ("false", "0", "no", "off"):
            return False
        raise ValueError(f"{key} must be true or false, got {raw!r}")
    try:
        return kind(raw)
    except ValueError:
        raise ValueError(f"{key} must be {_type_name(hint)}, got {raw!r}") from None


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _to_text(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _has_type(value: Any, hint: Any) -> bool:
    if len(_alternatives(hint)) > 1:
        return any(_has_type(value, arg) for arg in _alternatives(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    if len(_alternatives(hint)) > 1:
        return " or ".join(_type_name(arg) for arg in _alternatives(hint))
    if typing.get_origin(hint) is Literal:
        return " or ".join(typing.get_args(hint))
    names = {bool: "true or false", type(None): "none", str: "text"}
    return names[hint] if hint in names else str(hint.__name__)
