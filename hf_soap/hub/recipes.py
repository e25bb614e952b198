"""Recipes: the options of a training program as flat YAML. They are checked, run, and created from runs.

A recipe says how to train, not where: it names no program, no folder of this machine and no account.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from hf_soap.config import plain_yaml
from hf_soap.hub.arguments import without_preset
from hf_soap.hub.keys import SCRIPT_KEYS, mistakes
from hf_soap.hub.safety import PROVENANCE, problem_of_key, refusals

logger = logging.getLogger(__name__)

Recipe = dict[str, Any]

NAME = "recipe.yaml"
"""The recipe's file in a repository and in an output folder."""

MOST_SHOWN = 50
"""Number of refused keys that an error names."""

_MARK = "<!-- hf_soap recipe -->"
_EMBEDDED = re.compile(rf"^{_MARK}\n+```yaml\n(.*?)^```$".encode(), re.MULTILINE | re.DOTALL)

_NOT_PORTABLE = re.compile(
    r"output_dir|logging_dir|run_name|report_to|project|disable_tqdm|debug|log_level.*|log_on_each_node|ddp_.*|fsdp.*"
    r"|parallelism_config|save_on_each_node|tpu_.*|no_cuda|use_mps_device|ray_scope|mp_parameters|_.*"
)
"""Fields of TrainingArguments about folders, machines, ranks or output."""


@dataclass(frozen=True)
class Launch:
    """The command line that started a program.

    Attributes:
        program: Its name: a script, a command, or ``-m`` and a module.
        arguments: The arguments after the program's name.
    """

    program: str
    arguments: tuple[str, ...]


LAUNCH: Launch | None = None
"""The command line, if ``hf-soap run`` started this process's program; model cards name its options."""


def remember(argv: Sequence[str], *, module: bool = False) -> None:
    """Records the command line of the program that ``hf-soap run`` starts.

    Args:
        argv: The command line, like ``sys.argv``.
        module: Whether its first item is the name of a module, for ``-m``.
    """
    global LAUNCH
    name = argv[0] if module else _module_of(argv[0])
    LAUNCH = Launch(f"-m {name}" if name else re.split(r"[/\\]", argv[0])[-1], tuple(argv[1:]))


def _module_of(script: str) -> str:
    """Returns the module name of a script in an installed package, such as `trl sft` starts, or an empty string."""
    installed = Path(sysconfig.get_path("purelib")).resolve()
    path = Path(script).resolve()
    if path.suffix != ".py" or not path.is_relative_to(installed):
        return ""
    parts = path.relative_to(installed).with_suffix("").parts
    return ".".join(parts) if len(parts) > 1 and all(part.isidentifier() for part in parts) else ""


# Files


def read(data: bytes, *, source: str) -> Recipe:
    """Reads a recipe and refuses unsafe content.

    Args:
        data: The YAML.
        source: Where the recipe comes from, for errors.

    Returns:
        The recipe.

    Raises:
        ValueError: If it cannot be read or is not a flat mapping, or if keys are refused, all of which are named.
    """
    try:
        loaded = plain_yaml.load(data)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{source}: got {loaded!r:.80}, wanted option names and values, such as learning_rate: 3e-3")
    _raise(source, refusals(loaded))
    return loaded


def check(recipe: Mapping[str, Any], *, source: str, allowed: Iterable[str] = ()) -> None:
    """Refuses keys and values that training programs would refuse.

    Args:
        recipe: A recipe that :func:`read` returned.
        source: Where the recipe comes from, for errors.
        allowed: Keys to accept besides those of TrainingArguments and :data:`hf_soap.hub.keys.SCRIPT_KEYS`.

    Raises:
        ValueError: If keys are unknown, have the wrong type or are out of range, or ``optim_args`` is wrong; all are
            named.
    """
    _raise(source, mistakes(recipe, allowed))


def dump(recipe: Mapping[str, Any]) -> str:
    """Returns the recipe as YAML."""
    return plain_yaml.dump(dict(recipe))


def embed(recipe: Mapping[str, Any]) -> str:
    """Returns the recipe as a block of Markdown, for a model card."""
    return f"{_MARK}\n```yaml\n{dump(recipe)}```"


def embedded(card: bytes) -> bytes:
    """Returns the recipe's YAML in a model card.

    Raises:
        ValueError: If the card has no recipe or several.
    """
    found: list[bytes] = _EMBEDDED.findall(card.replace(b"\r\n", b"\n"))
    if len(found) != 1:
        raise ValueError(f"got a model card with {len(found)} recipes, wanted one, below the line {_MARK}")
    return found[0]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Compares two recipes key by key, provenance included.

    Returns:
        Key, value in ``one`` and value in ``other``; a missing value is None. Keys within provenance are dotted.
    """
    left, right = _flat(one), _flat(other)
    keys = dict.fromkeys([*left, *right])
    return [(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Recipe:
    flat: Recipe = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {prefix + key: inner}
    return flat


def _raise(source: str, problems: Sequence[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
        lines = [f"{source} is refused", *(f"- {problem}" for problem in problems[:MOST_SHOWN]), *more]
        raise ValueError("\n".join(lines))


# Command lines


def to_arguments(recipe: Mapping[str, Any]) -> list[str]:
    """Returns the recipe as options of a program, without provenance.

    Values are written with ``=``, so that none is read as an option. True is written as the bare option, which both
    argparse's flags and the parser of transformers accept.
    """
    arguments = []
    for key, value in recipe.items():
        if key == PROVENANCE:
            continue
        if isinstance(value, list):
            arguments += [f"--{key}", *map(_to_text, value)]
        else:
            arguments.append(f"--{key}" if value is True else f"--{key}={_to_text(value)}")
    return arguments


def from_arguments(arguments: Iterable[str]) -> Recipe:
    """Reads the options on a program's command line; the last wins where one is repeated.

    Args:
        arguments: The arguments after the program's name. Short options and positional arguments are ignored.

    Returns:
        Values by option name; names have underscores.
    """
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for argument in arguments:
        if argument == "--":
            break
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            found[name.replace("-", "_")] = values = [value] if equals else []
        elif argument.startswith("-") and not re.match(r"-\.?\d", argument):
            values = []  # a short option; its long name is not known here
        else:
            values.append(argument)
    recipe: Recipe = {}
    for name, texts in found.items():
        if name.startswith("no_") and name[3:] in SCRIPT_KEYS and not texts:
            recipe[name[3:]] = False
        else:
            parsed = [_from_text(text, SCRIPT_KEYS.get(name)) for text in texts]
            recipe[name] = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
    return recipe


def _to_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _from_text(text: str, kind: Any) -> Any:
    """Converts a value to its key's type. Without a type, text becomes a number if the number is written the same."""
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float) if kind is None else {int, float} & {kind}:
        with suppress(ValueError):
            value = number(text)
            if math.isfinite(value) and (kind or str(value) == text):
                return value
    return text


# From a run


_UNSET = {"activation_checkpointing": False, "include_num_input_tokens_seen": "no"}
"""Values that ``__post_init__`` sets instead of a default."""


def from_training_arguments(args: Any) -> Recipe:
    """Creates a recipe from training arguments.

    Args:
        args: TrainingArguments or a subclass.

    Returns:
        The fields that differ from their defaults and mean the same on another machine.
    """
    recipe: Recipe = {}
    known = {entry.name for entry in fields(args)}
    for entry in fields(args):
        # transformers 5 sets the old name too, and warns if it is given.
        renamed = entry.name.replace("gradient_checkpointing", "activation_checkpointing")
        if not entry.init or _NOT_PORTABLE.fullmatch(entry.name) or problem_of_key(entry.name):
            continue
        if renamed != entry.name and renamed in known:
            continue
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        value = _plain(getattr(args, entry.name))
        if value not in (None, [], {}, "", _plain(default), _UNSET.get(entry.name)):
            recipe[entry.name] = value
    return recipe


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if hasattr(value, "to_dict"):
        return None if value == type(value)() else _plain(value.to_dict())
    return json.dumps(value, default=str) if isinstance(value, dict) and value else value


def options_of_launch(launch: Launch, args: Any) -> tuple[Recipe, list[str]]:
    """Reads the options of a program, including those in a file of options.

    Such a file is the first argument of programs that use transformers' HfArgumentParser, and ``--config`` of TRL's
    programs. A recipe that only named the file would not work on another machine.

    Args:
        launch: The command line.
        args: The program's TrainingArguments or a subclass; a file of options is recognized by their names.

    Returns:
        Values by option name, and in words the arguments that are not options.
    """
    arguments, known = list(launch.arguments), {entry.name for entry in fields(args)}
    given = from_arguments(arguments)
    in_file: Recipe = {}
    others_given = []
    config = str(given.get("config", ""))
    if arguments and (found := _options_in_file(arguments[0], known)):
        in_file = found
        del arguments[0]
    elif "trl.scripts.utils" in sys.modules and (found := _options_in_file(config, known)):
        in_file = found
        del given["config"]
        if environment := in_file.pop("env", None):
            others_given.append(f"the environment variables {', '.join(environment)}")
        # accelerate reads its own options from the same file.
        if foreign := [key for key in in_file if key not in known and key not in SCRIPT_KEYS]:
            others_given.append(f"{', '.join(foreign)} in {Path(config).name}")
            in_file = {key: value for key, value in in_file.items() if key not in foreign}
    in_file = {key: _plain(value) for key, value in in_file.items() if value is not None}
    # Arguments after a bare -- are not options either, and the long names of short options are not known.
    named = next((i for i, argument in enumerate(arguments) if argument.startswith("--")), len(arguments))
    short = any(re.match(r"-[A-Za-z]", argument) for argument in arguments)
    if named or short or "--" in arguments:
        others_given.append("arguments of the program that are not options with a long name")
    return in_file | given, others_given


def _options_in_file(path: str, known: Iterable[str]) -> Recipe:
    """Reads a file of options; returns an empty dictionary for any other file."""
    try:
        read = plain_yaml.load(Path(path).read_bytes()) if path.endswith((".yaml", ".yml", ".json")) else None
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) and not read.keys().isdisjoint(known) else {}


def takes_training_arguments(args: Any) -> bool:
    """Whether the program that ``hf-soap run`` started seems to read TrainingArguments from its options.

    Args:
        args: The arguments that it trained with.
    """
    if LAUNCH is None:
        return False
    given, own = options_of_launch(LAUNCH, args)[0], {entry.name for entry in fields(args)}
    # This module is loaded only by programs that use it, and by TRL's parser.
    return "transformers.hf_argparser" in sys.modules and any(key.removeprefix("no_") in own for key in given)


def of_run(args: Any, adapters: Mapping[str, Any] | None = None) -> tuple[Recipe, list[str]]:
    """Creates the recipe of this process's run: its training arguments and the other options of its program.

    Args:
        args: TrainingArguments or a subclass.
        adapters: Options for the adapters of the model. They are used only if the program is not known: a known
            program creates its adapters from its own options.

    Returns:
        A recipe without provenance, and the options that recipes must not contain, such as files outside the working
        folder. These are omitted, and the log says so.
    """
    own = {entry.name for entry in fields(args)}
    given = options_of_launch(LAUNCH, args)[0] if LAUNCH else dict(adapters or {})
    others = {key: value for key, value in given.items() if key not in own and key.removeprefix("no_") not in own}
    recipe = from_training_arguments(args) | others
    if options := without_preset(args):
        recipe["optim_args"] = options
    refused = [key for key in recipe if refusals({key: recipe[key]})]
    for key in refused:
        logger.warning("omitted from the recipe: %s", refusals({key: recipe.pop(key)})[0])
    return recipe, refused
