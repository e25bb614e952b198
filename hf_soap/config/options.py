"""Options: type, default, range and help of each, their checks, and the parser of ``optim_args``.

The tables of the documentation, the checks of the constructors and the errors for a mistyped option are all made from
here.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import partial
from numbers import Real
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self, TypeVar

MAPPING = Mapping[str, Any]
"""Type of an option whose values are mappings."""

Check = tuple[Callable[[Any], bool], str]

POSITIVE: Check = (lambda x: x > 0, "> 0")
NON_NEGATIVE: Check = (lambda x: x >= 0, ">= 0")
AT_LEAST_1: Check = (lambda x: x >= 1, ">= 1")
DECAY_RATE: Check = (lambda x: 0 <= x < 1, "in [0, 1)")


def option(
    default: Any,
    help: str,
    check: Check | None = None,
    *,
    remedy: str = "",
    trainer_only: bool = False,
    hashed: bool = True,
) -> Any:
    """Declares one option of a config.

    Args:
        default: The published default.
        help: One line for the tables.
        check: Predicate and its wording; ``None`` as a value is never checked.
        remedy: What to do instead; it is appended to the error.
        trainer_only: Whether only the Trainer reads it; the optimizer's constructor has no such argument.
        hashed: Whether the hash of a config depends on it; that of a mapping cannot.

    Returns:
        A dataclass field.
    """
    metadata = {"help": help, "check": check, "remedy": remedy, "trainer_only": trainer_only}
    return field(default=default, metadata=metadata, hash=hashed)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Options of one optimizer, checked when the config is created, from ``optim_args`` or in Python.

    Raises:
        ValueError: If a value has the wrong type or is out of range.
    """

    name: ClassVar[str]
    lr: ClassVar[float]
    """Learning rate to suggest where none was set; training uses the Trainer's ``learning_rate``."""
    lr_is_published: ClassVar[bool] = True
    """Whether that learning rate comes from the paper or its code; otherwise it is ours."""
    adam_embeddings: ClassVar[bool] = False
    """Whether embeddings and the output head are updated by Adam."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    """Options that ``preset=NAME`` sets together, by name."""

    @classmethod
    def preset(cls, preset: str, **changes: Any) -> Self:
        """Returns the options of a preset; ``changes`` are options that differ from it.

        In ``modules``, changes come first, and settings of the same pattern are added to those of the preset.

        Raises:
            ValueError: If the optimizer has no such preset, or an option is wrong.
        """
        if preset not in cls.presets:
            known = f"{nearest(preset, cls.presets)}its presets are {', '.join(cls.presets) or 'none'}"
            raise ValueError(f"{cls.name} got preset={preset!r}, wanted one that it has: {known}")
        values = {**cls.presets[preset], **changes}
        own, before = changes.get(MODULES), cls.presets[preset].get(MODULES, {})
        if isinstance(own, Mapping):  # all else is refused by the checks
            both = {key: {**before[key], **own[key]} for key in own.keys() & before if isinstance(own[key], Mapping)}
            values[MODULES] = {key: both.get(key, own.get(key, before.get(key))) for key in [*own, *before]}
        return cls(**values)

    def __post_init__(self) -> None:
        check_values(type(self), {f.name: getattr(self, f.name) for f in fields(self)})

    def to_optim_args(self, always: Collection[str] = ()) -> str:
        """Returns the options that differ from their defaults as text for ``TrainingArguments(optim_args=...)``.

        Args:
            always: Options to write even if they have their defaults.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        written = [f.name for f in fields(self) if values[f.name] != f.default or f.name in always]
        return ",".join(f"{key}={_to_text(values[key])}" for key in written)

    def constructor_kwargs(self) -> dict[str, Any]:
        """Returns the keyword arguments for the optimizer's constructor."""
        known = option_fields(type(self))
        kwargs = {key: value for key, value in asdict(self).items() if not known[key].metadata["trainer_only"]}
        if not (hasattr(self, "beta1") and hasattr(self, "beta2")):
            return kwargs
        return {"betas": tuple(kwargs.pop(name, getattr(self, name)) for name in ("beta1", "beta2")), **kwargs}


ConfigT = TypeVar("ConfigT", bound=OptimizerConfig)

OptimArgs = str | Mapping[str, Any] | Sequence[str] | None
"""Types of ``optim_args``: text from Python or a command line, or a mapping or a list from YAML or JSON."""


def check_values(config: type[OptimizerConfig], values: Mapping[str, Any]) -> None:
    """Checks names, types and ranges of options.

    Args:
        config: The config that declares the options.
        values: Values by option name.

    Raises:
        ValueError: If an option is unknown, has the wrong type or is out of range; it names the first and the remedy.
    """
    known = option_fields(config)
    hints = typing.get_type_hints(config)
    for key, value in values.items():
        if key not in known:
            raise ValueError(unknown(f"option {shown(key)} of {config.name}", key, _own_first(config)))
        if not _has_type(value, hints[key]):
            raise ValueError(f"{key} must be {_type_name(hints[key])}, got {shown(value)}{_meant(value, hints[key])}")
        meta = known[key].metadata
        if meta["check"] is not None and value is not None:
            test, wording = meta["check"]
            if not _is_finite(value) or not test(value):
                raise ValueError(f"{key} must be {wording}, got {shown(value)}{_remedy(known[key])}")
        if key.endswith("_modules") and value is not None:
            check_pattern(key, value)


def check_pattern(name: str, pattern: str) -> None:
    """Checks that text is a regular expression.

    Raises:
        ValueError: If it is not.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:  # such as a{99999999999} or a thousand parentheses
        raise ValueError(f"{name} must be a regular expression, got {shown(pattern)}: {error}") from error


def check_number(name: str, value: Any, check: Check = NON_NEGATIVE) -> None:
    """Checks a setting that must be a finite number in a range.

    Raises:
        ValueError: If it is not.
    """
    test, wording = check
    if not (_has_type(value, float) and _is_finite(value) and test(value)):
        raise ValueError(f"{name} must be a finite number {wording}, got {shown(value)}")


def parse_optim_args(given: OptimArgs, config: type[ConfigT], defaults: Mapping[str, Any] | None = None) -> ConfigT:
    """Reads ``optim_args`` of TrainingArguments.

    Args:
        given: ``key=value`` pairs split by commas; commas inside brackets belong to the value, so that
            ``betas=(0.9,0.95)`` and regular expressions with groups can be written. A value may be quoted, and is
            YAML if it is a mapping in braces. ``preset=NAME`` sets the options of a preset, and the other pairs change
            them. A mapping or a list of pairs, from YAML or JSON, is converted by :func:`as_text`.
        config: The config that declares the options.
        defaults: Values for options that neither the text nor a preset gives, instead of the published ones.

    Returns:
        The checked config.

    Raises:
        ValueError: If the text cannot be read, an option is unknown or given twice, or a value has the wrong type or
            is out of range.
    """
    hints = typing.get_type_hints(config)
    values: dict[str, Any] = {}
    create: Callable[..., ConfigT] = config
    for key, raw in _pairs(as_text(given) or "", config):
        if key in values:
            raise ValueError(f"optim_args got {key} twice, wanted it once; remove one of them")
        values[key] = _from_text(key, raw, hints.get(key, str))
        if key == MODULES and isinstance(values[key], Mapping):
            values[key] = {name: _with_types(own, config) for name, own in values[key].items()}
    if PRESET in values:
        name = values.pop(PRESET)
        create = partial(config.preset, name)
        defaults = {key: value for key, value in (defaults or {}).items() if key not in config.presets.get(name, {})}
    return create(**{**(defaults or {}), **values})


def preset_in(given: OptimArgs, config: type[OptimizerConfig]) -> str | None:
    """Returns the preset that ``optim_args`` of one of our optimizers name, or None."""
    raw = dict(_pairs(as_text(given) or "", config)).get(PRESET)
    return None if raw is None else str(_from_text(PRESET, raw, str))


def as_text(given: Any) -> str | None:
    """Converts ``optim_args`` to the text that the Trainer and the command line use.

    Args:
        given: Text, which is returned unchanged; a mapping of options to numbers, text, true, false or none; or a
            list of texts of the form ``key=value``. In a mapping, ``betas`` may be a list of two numbers, and
            ``modules`` a mapping.

    Returns:
        The text, or None if there are no options.

    Raises:
        ValueError: If it has another type.
    """
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, Mapping):
        return ",".join(f"{_name_of(key)}={_value_of(key, value)}" for key, value in given.items()) or None
    if isinstance(given, Sequence) and not isinstance(given, (bytes, bytearray)):
        return ",".join(item for entry in given for item in _listed(entry)) or None
    raise ValueError(
        f"optim_args must be text such as 'eps=1e-8,beta1=0.9', a mapping of options to values, or a list of "
        f"key=value, got {shown(given)}"
    )


def _name_of(key: Any) -> str:
    if isinstance(key, str) and re.fullmatch(r"[\w-]+", key):
        return key
    raise ValueError(f"optim_args wants names of options as keys of a mapping, got {shown(key)}; for example eps")


def _value_of(key: str, value: Any) -> str:
    if isinstance(value, str):
        return _whole(value.strip())
    if value is None or isinstance(value, Real):  # true and false are numbers too
        return _to_text(value)
    if key == "betas" and isinstance(value, Sequence):
        return f"({','.join(map(str, value))})"
    if key == MODULES and isinstance(value, Mapping):
        return _to_text(value)
    raise ValueError(f"{key} must be a number, text, true, false or none, got {shown(value)}")


def _listed(entry: Any) -> list[str]:
    """Returns the pairs of one entry of a list; brackets that stay open in it do not reach into the next."""
    if not isinstance(entry, str):
        raise ValueError(f"optim_args wants key=value as entries of a list, got {shown(entry)}; for example eps=1e-8")
    pairs = [[part.strip() for part in item.partition("=")] for item in _split(entry)]
    return [f"{key}{equals}{_whole(raw)}" for key, equals, raw in pairs]


def _whole(raw: str) -> str:
    """Quotes a value if a bracket or a comma in it would change where the value ends."""
    return raw if not raw or _split(f"k={raw},k") == [f"k={raw}", "k"] else repr(raw)


def patterns(text: str) -> list[str]:
    """Returns the regular expressions in ``optim_args`` of any optimizer.

    Raises:
        ValueError: If one cannot be read.
    """
    pairs = [[part.strip() for part in item.partition("=")] for item in _split(text)]
    found = [_from_text(key, raw, str) for key, _, raw in pairs if key.endswith("_modules")]
    mappings = [_from_text(key, raw, MAPPING) for key, _, raw in pairs if key == MODULES]
    selectors = [selector for given in mappings if isinstance(given, Mapping) for selector in given]
    return found + [selector for selector in selectors if not selector.startswith(ROLE)]


def option_table(config: type[OptimizerConfig]) -> str:
    """Returns the options of an optimizer as a Markdown table: name, type, default, range and meaning."""
    hints = typing.get_type_hints(config)
    rows = ["| option | type | default | what it does |", "|---|---|---|---|"]
    for key, entry in _own_first(config).items():
        check = entry.metadata["check"]
        kind = _type_name(hints[key]).replace("|", "\\|") + (f", {check[1]}" if check else "")
        rows.append(f"| `{key}` | {kind} | `{_to_text(entry.default)}` | {entry.metadata['help']} |")
    return "\n".join(rows)


def preset_table(config: type[OptimizerConfig]) -> str:
    """Returns the presets of an optimizer as a Markdown table, empty if it has none."""
    rows = [
        f"| `{name}` | {', '.join(f'`{key}={_to_text(value)}`' for key, value in changes.items())} |"
        for name, changes in config.presets.items()
    ]
    return "\n".join(["| preset | what it sets |", "|---|---|", *rows]) if rows else ""


def nearest(name: str, choices: Collection[str]) -> str:
    """Returns ``did you mean X? `` for the closest of ``choices``, or an empty string if none is close."""
    longer = [choice for choice in choices if name and choice.startswith(name)]
    match = longer or difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"did you mean {match[0]}? " if match else ""


def shown(value: Any) -> str:
    """Returns ``repr(value)`` for an error message, shortened if it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python converts
        return f"a number of {value.bit_length()} bits"
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"


def option_fields(config: type[OptimizerConfig]) -> dict[str, Field[Any]]:
    return {f.name: f for f in fields(config)}


def _own_first(config: type[OptimizerConfig]) -> dict[str, Field[Any]]:
    """Returns the options: first those of the config itself, then those that it shares, which are set less often."""
    known = option_fields(config)
    listed = [key for cls in config.__mro__ for key in vars(cls).get("__annotations__", {}) if key in known]
    return {key: known[key] for key in dict.fromkeys(listed)}


def unknown(what: str, name: str, choices: Collection[str]) -> str:
    """Returns the error for an unknown name, with the names that it may stand for.

    Args:
        what: What is unknown, for the error.
        name: The unknown name.
        choices: The known ones.
    """
    *first, last = near_options(name, choices) or [""]
    meant = f"did you mean {' or '.join([', '.join(first), last] if first else [last])}? " if last else ""
    return f"unknown {what}: {meant}It takes {', '.join(choices)}."


def near_options(name: str, choices: Collection[str]) -> list[str]:
    """Returns up to three options that a name may stand for, the most likely first.

    Words are compared one by one, so that ``freq`` and ``precond_freq`` find ``precondition_frequency``.

    Args:
        name: The unknown name.
        choices: The known options.
    """
    words = [word for word in re.split(r"[\W_]+", name.lower()) if word]

    def share(choice: str) -> float:
        others = choice.split("_")
        return sum(max(_likeness(word, other) for other in others) for word in words) / (len(words) or 1)

    best = max(map(share, choices), default=0.0)
    if best < 0.49:
        return difflib.get_close_matches(name.lower(), list(choices), n=3, cutoff=0.6)
    alike = [choice for choice in choices if share(choice) == best]
    return sorted(alike, key=lambda choice: -difflib.SequenceMatcher(None, name.lower(), choice).ratio())[:3]


def _likeness(word: str, whole: str) -> float:
    """Returns 1 for the same word, slightly less for its beginning or a typing error, and 0 for another word."""
    if word in (whole, whole.rstrip("0123456789")):
        return 1.0
    begins = len(word) > 1 and whole.startswith(word)
    return 0.99 if begins or difflib.SequenceMatcher(None, word, whole).ratio() >= 0.8 else 0.0


DTYPES = {
    "bf16": "bfloat16",
    "half": "bfloat16",
    "fp16": "bfloat16",
    "float16": "bfloat16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "single": "float32",
    "float8": "bfloat16",
    "float8_e4m3fn": "bfloat16",
    "float8_e5m2": "bfloat16",
    "fp8": "bfloat16",
}
"""Common names of dtypes, with the dtype that an option takes for each, or the nearest to it."""


def _meant(value: Any, hint: Any) -> str:
    """Returns a hint at the value that was probably meant, for an option that takes named values."""
    named = [part for part in _alternatives(hint) if typing.get_origin(part) is Literal]
    choices = [choice for part in named for choice in typing.get_args(part)]
    text = str(value).lower().removeprefix("torch.")
    found = DTYPES.get(text, text)
    match = f"did you mean {found}? " if found in choices else nearest(text, choices)
    return f"; {match.strip()}" if match else ""


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
            betas = [beta.strip() for beta in raw.strip("'\"").strip("()[]").split(",")]
            if len(betas) != 2:
                raise ValueError(
                    f"betas wants two numbers, got {shown(raw)}; write betas=(0.95,0.95), or beta1= and beta2="
                )
            if missing := {"beta1", "beta2"} - option_fields(config).keys():
                raise ValueError(
                    f"{config.name} got betas={shown(raw)}, wanted beta1 alone: it does not use {min(missing)}; "
                    f"write beta1={betas[0]}"
                )
            yield from zip(("beta1", "beta2"), betas, strict=True)
        elif key in ELSEWHERE:
            raise ValueError(
                f"{key} is not an option of optim_args; set it as TrainingArguments({ELSEWHERE[key]}=...)"
            )
        elif key != PRESET and key not in option_fields(config):
            raise ValueError(unknown(f"option {shown(key)} of {config.name}", key, _own_first(config)))
        else:
            yield key, raw


PRESET = "preset"
"""Key of ``optim_args`` that sets several options."""

MODULES = "modules"
"""The option that sets others for some of the parameters."""

RATES: dict[str, Check] = {"lr": POSITIVE, "lr_factor": POSITIVE, "weight_decay": NON_NEGATIVE}
"""What :data:`MODULES` may set in addition to options, and the rule."""

ROLE = "@"
"""First character of a role, which stands for a pattern in :data:`MODULES`."""

ELSEWHERE = {
    "lr": "learning_rate",
    "learning_rate": "learning_rate",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "weight_decay": "weight_decay",
}
"""Settings that users look for in ``optim_args`` but that are arguments of the Trainer."""

CLOSING = {"(": ")", "[": "]", "{": "}"}


YAML_TOKEN = re.compile(
    r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*"|(?!\?\s)[^\s{}\[\],:'"](?:[^{}\[\],:]|:(?!\s))*|.""", re.DOTALL
)
"""A token of YAML in braces: a scalar in quotes or without, or a single character."""


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets, quotes and YAML in braces; empty items are dropped."""
    items, closing, quote, escaped, end_of_yaml = [""], "", "", False, 0
    for place, char in enumerate(text):
        starts = char in "'\"{" and items[-1].strip().endswith("=") and items[-1].count("=") == 1
        if place < end_of_yaml:
            pass
        elif escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif quote:
            quote = "" if char == quote else quote
        elif char == "{" and starts:
            end_of_yaml = _end_of_mapping(text, place)
        elif starts:
            quote = char  # only at the start of a value: elsewhere it is part of a regular expression
        elif char == closing[-1:]:
            closing = closing[:-1]
        elif closing[-1:] != "]" and char in CLOSING:  # within [...] other brackets are characters
            closing += CLOSING[char]
        elif char == "," and not closing:
            items.append("")
            continue
        items[-1] += char
    return [item.strip() for item in items if item.strip()]


def _end_of_mapping(text: str, start: int) -> int:
    """Returns where the YAML ends whose first brace is at ``start``; the end of the text if that is not closed."""
    depth = 0
    for token in YAML_TOKEN.finditer(text, start):
        depth += (token[0] in "{[") - (token[0] in "}]")
        if depth == 0:
            return token.end()
    return len(text)


def _from_text(key: str, raw: str, hint: Any) -> Any:
    args = _alternatives(hint)
    if type(None) in args and raw.lower() in ("none", "null"):
        return None
    kind = next(arg for arg in args if arg is not type(None))
    if raw == "false" and "off" in typing.get_args(kind):
        return "off"  # YAML reads off as false
    if typing.get_origin(kind) is Literal or kind in (str, MAPPING):
        text = _unquoted(key, raw) if len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "'\"" else raw
        return text if kind != MAPPING else _from_yaml(key, text)
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


def _from_yaml(key: str, text: str) -> Any:
    """Reads YAML in braces; other text is returned unchanged, for the error of a check to show."""
    from hf_soap.config import plain_yaml  # not with hf_soap: PyYAML is not needed without such an option

    try:
        return plain_yaml.load(text.encode()) if text.startswith("{") else text
    except ValueError as error:
        raise ValueError(f"{key} got {shown(text)}, {error}; write patterns and roles in single quotes") from error


def _with_types(own: Any, config: type[OptimizerConfig]) -> Any:
    """Converts text among settings, such as 1e-2 of some readers of YAML, to the types of these settings."""
    if not isinstance(own, Mapping):
        return own
    hints = typing.get_type_hints(config)
    types_of = {**{name: hints[name] for name in option_fields(config)}, **dict.fromkeys(RATES, float)}
    return {
        name: _from_text(name, value, types_of[name]) if isinstance(value, str) and name in types_of else value
        for name, value in own.items()
    }


def _unquoted(key: str, raw: str) -> str:
    """Reads a quoted value as a Python string literal."""
    try:
        if re.fullmatch(r"(['\"])(?:(?!\1)[^\\]|\\.)*\1", raw, re.DOTALL):
            with warnings.catch_warnings(
                action="ignore"
            ):  # about escapes such as \d, which regular expressions contain
                return str(ast.literal_eval(raw))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{key} got {shown(raw)}, wanted text in quotes that Python can read: {error}") from None
    raise ValueError(f"{key} got {shown(raw)}, wanted one quoted text; escape a quote in it as \\' or \\\"")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _to_text(value: Any) -> str:
    if isinstance(value, Mapping):
        from hf_soap.config import plain_yaml

        return plain_yaml.dump(value, in_one_line=True)
    if isinstance(value, str):
        unquoted = _split(f"k={value},k") == [f"k={value}", "k"] and value.lower() not in ("", "none", "null")
        return value if unquoted and value == value.strip() and value[0] not in "'\"" else repr(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
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
    return isinstance(value, typing.get_origin(hint) or hint)


def _type_name(hint: Any) -> str:
    if len(_alternatives(hint)) > 1:
        return " or ".join(_type_name(arg) for arg in _alternatives(hint))
    if typing.get_origin(hint) is Literal:
        return " or ".join(typing.get_args(hint))
    names = {bool: "true or false", type(None): "none", str: "text", MAPPING: "mapping"}
    return names[hint] if hint in names else str(hint.__name__)
