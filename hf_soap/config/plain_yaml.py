"""YAML from untrusted sources: small documents of plain mappings, lists and scalars, and nothing else.

Scalars follow YAML 1.2: ``eval_strategy: no`` is text and ``learning_rate: 3e-3`` is a number. PyYAML's own loader
reads the first as a boolean and the second as text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_BYTES = 64 * 1024
MAX_DEPTH = 8

# A number with a leading zero stays text: it is probably a revision or an identifier.
_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9][0-9]*)",
    "float": r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader without tags, anchors, duplicate keys, deep nesting and the scalars of YAML 1.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML looks for it in the class

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nesting = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _refusal("an anchor or alias", "every value written out", event.start_mark)
        if event.tag is not None:
            raise _refusal(f"the tag {event.tag!r:.80}", "plain values without tags", event.start_mark)
        if self.nesting == MAX_DEPTH:
            raise _refusal("deeper nesting", f"at most {MAX_DEPTH} levels", event.start_mark)
        self.nesting += 1
        node = super().compose_node(parent, index)
        self.nesting -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
                raise _refusal(f"the key {key.value!r:.80}", "text as key", key.start_mark)
            if key.value in seen:
                raise _refusal(f"the key {key.value!r:.80} twice", "it once", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes text that either version of YAML would read as something else, and never writes aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        # No first characters are given: such a scalar may begin with any.
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})\\Z"), None)


def load(data: bytes) -> Any:
    """Reads one document.

    Args:
        data: UTF-8 text of at most 64 KiB.

    Returns:
        Mappings with text as keys, lists, text, numbers, booleans and None.

    Raises:
        ValueError: If it is larger or not YAML, or has tags, anchors, aliases, duplicate keys, keys that are not text,
            or more than eight levels.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"got {len(data)} bytes, wanted at most {MAX_BYTES}; settings need a few hundred")
    try:
        loader = _Loader(data.decode("utf-8-sig"))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    # Integers of thousands of digits and escapes such as \UFFFFFFFF fail in Python, not in PyYAML.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(f"wanted plain YAML: {_explained(error)}") from error


def dump(data: Any, *, in_one_line: bool = False) -> str:
    """Writes plain data in its order; :func:`load` returns the same data.

    Args:
        data: What :func:`load` returns.
        in_one_line: Write mappings and lists in braces and brackets.

    Raises:
        ValueError: If it contains anything else.
    """
    try:
        text: str = yaml.dump(
            data,
            Dumper=_Dumper,
            sort_keys=False,
            allow_unicode=True,
            width=float("inf"),
            default_flow_style=in_one_line,
        )
    except yaml.YAMLError as error:
        raise ValueError(f"wanted mappings, lists, text, numbers, true, false or null: {error}") from error
    return text.removesuffix("\n") if in_one_line else text


def _explained(error: Exception) -> str:
    """Says what is wrong and where. Omits the line, which may be long and contain characters that reverse text."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return str(error)
    words = ", ".join(filter(None, (error.context, error.problem)))  # type: ignore[attr-defined]
    return f"{words} (line {mark.line + 1}, column {mark.column + 1})"


def _refusal(got: str, wanted: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, f"got {got}, wanted {wanted}", mark)
