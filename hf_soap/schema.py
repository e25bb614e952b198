"""What an option is: its type, default, range and help, how it is checked, and how ``optim_args`` is read.

The README's table, the checks of the constructors and the errors for a mistyped option are all made from here.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
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
    """Learning rate to start from, for the warning about a forgotten one; the Trainer's ``learning_rate`` decides."""
    lr_is_published: ClassVar[bool] = True
    """Whether the paper or its code gives that learning rate; otherwise it is ours."""
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
            raise ValueError(f"{key} must be {_type_name(hints[key])}, got {shown(value)}")
        meta = known[key].metadata
        if meta["check"] is not None and value is not None:
            test, wording = meta["check"]
            if not _is_finite(value) or not test(value):
                raise ValueError(f"{key} must be {wording}, got {shown(value)}{_remedy(known[key])}")
        if key.endswith("_modules") and value is not None:
            try:
                re.compile(value)
            except (re.error, OverflowError, RecursionError) as error:  # a{99999999999}, and a thousand parentheses
                raise ValueError(f"{key} must be a regular expression, got {shown(value)}: {error}") from error


def parse_optim_args(text: str | None, config: type[ConfigT], defaults: Mapping[str, Any] | None = None) -> ConfigT:
    """Reads ``optim_args`` of TrainingArguments.

    Args:
        text: ``key=value`` pairs split by commas; commas inside brackets belong to the value, so that
            ``betas=(0.9,0.95)`` and regular expressions with groups can be written. A value may be quoted.
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


def patterns(text: str) -> list[str]:
    """Returns the regular expressions in ``optim_args``, whichever optimizer that is for.

    Raises:
        ValueError: If one stands in quotes that cannot be read.
    """
    pairs = [[part.strip() for part in item.partition("=")] for item in _split(text)]
    return [_from_text(key, raw, str) for key, _, raw in pairs if key.endswith("_modules")]


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


def nearest(name: str, choices: Collection[str]) -> str:
    """Returns ``did you mean X? `` for the closest of ``choices``, or nothing if none is close."""
    longer = [choice for choice in choices if name and choice.startswith(name)]
    match = longer or difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"did you mean {match[0]}? " if match else ""


def shown(value: Any) -> str:
    """Returns ``repr(value)`` for an error, cut where it would fill the screen."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return f"a number of {value.bit_length()} bits"
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"


def option_fields(config: type[OptimizerConfig]) -> dict[str, Field[Any]]:
    return {f.name: f for f in fields(config)}


def _unknown(config: type[OptimizerConfig], key: str) -> str:
    choices = option_fields(config)
    return f"unknown option {shown(key)} of {config.name}: {nearest(key, choices)}It takes {', '.join(choices)}."


def _remedy(entry: Field[Any]) -> str:
    default = "" if entry.default is MISSING else f"the default is {_to_text(entry.default)}"
    return f"; {entry.metadata['remedy'] or default}"


def _pairs(text: str, config: type[OptimizerConfig]) -> Iterable[tuple[str, str]]:
    for item in _split(text):
        key, equals, raw = (part.strip() for part in item.partition("="))
        if not equals or not key or not raw:
            raise ValueError(
                f"optim_args wants key=value pairs split by commas, got {shown(item)}; for example eps=1e-8"
            )
        if key == "betas":
            betas = [beta.strip() for beta in raw.strip("()[]").split(",")]
            if len(betas) != 2:
                raise ValueError(
                    f"betas wants two numbers, got {shown(raw)}; write betas=(0.95,0.95), or beta1= and beta2="
                )
            yield from zip(("beta1", "beta2"), betas, strict=True)
        elif key in ELSEWHERE:
            raise ValueError(f"{key} is no option of optim_args; set it as TrainingArguments({ELSEWHERE[key]}=...)")
        elif key not in option_fields(config):
            raise ValueError(_unknown(config, key))
        else:
            yield key, raw


ELSEWHERE = {"lr": "learning_rate", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}
"""What users look for among the options and the Trainer has an argument for."""

CLOSING = {"(": ")", "[": "]", "{": "}"}


def _split(text: str) -> list[str]:
    """Splits at the commas that stand outside brackets and quotes; empty items are dropped."""
    items, closing, quote, escaped = [""], "", "", False
    for char in text:
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and items[-1].strip().endswith("=") and items[-1].count("=") == 1:
            quote = char  # only at the start of a value: elsewhere it belongs to a regular expression
        elif char == closing[-1:]:
            closing = closing[:-1]
        elif closing[-1:] != "]" and char in CLOSING:  # within [...] other brackets are characters
            closing += CLOSING[char]
        elif char == "," and not closing:
            items.append("")
            continue
        items[-1] += char
    return [item.strip() for item in items if item.strip()]


def _from_text(key: str, raw: str, hint: Any) -> Any:
    args = _alternatives(hint)
    if type(None) in args and raw.lower() in ("none", "null"):
        return None
    kind = next(arg for arg in args if arg is not type(None))
    if typing.get_origin(kind) is Literal or kind is str:
        return _unquoted(key, raw) if len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "'\"" else raw
    if kind is bool:
        if raw.lower() in ("true", "1", "yes", "on"):
            return True
        if raw.lower() in ("false", "0", "no", "off"):
            return False
        raise ValueError(f"{key} must be true or false, got {shown(raw)}")
    try:
        return kind(raw)
    except ValueError:
        raise ValueError(f"{key} must be {_type_name(hint)}, got {shown(raw)}") from None


def _unquoted(key: str, raw: str) -> str:
    """Reads a value in quotes as Python does, if it is one piece of text."""
    try:
        if re.fullmatch(r"(['\"])(?:(?!\1)[^\\]|\\.)*\1", raw, re.DOTALL):
            with warnings.catch_warnings(action="ignore"):  # of \d, which a regular expression may have
                return str(ast.literal_eval(raw))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{key} got {shown(raw)}, wanted text in quotes that Python can read: {error}") from None
    raise ValueError(f"{key} got {shown(raw)}, wanted one text in quotes; write a quote within it as \\' or \\\"")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _to_text(value: Any) -> str:
    if isinstance(value, str):
        plain = _split(f"k={value},k") == [f"k={value}", "k"] and value.lower() not in ("", "none", "null")
        return value if plain and value == value.strip() and value[0] not in "'\"" else repr(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


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
