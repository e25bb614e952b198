"""What recipes must not contain: secrets, code, paths outside the working folder, absurd numbers."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from hf_soap.config import options
from hf_soap.config.options import shown

PROVENANCE = "provenance"
"""The one key with a nested value: where a recipe comes from. It is shown and never run."""

REFUSED = {
    r"(?!(eos|bos|pad|unk|sep|cls|mask|image)_).*_(token|keys?)|token|.*_pw"
    r"|.*(password|passwd|passphrase|secret|credential|cookie).*": ("a secret; log in with `hf auth login`"),
    r"trust_remote_code|(.*_)?(remote|custom)_code|code|auto_map|custom_(pipeline|generate)": (
        "third-party code; if you trust it, allow it on the command line"
    ),
    r"hub_.*|push_to_hub.*|trackio_.*|deepspeed|local_rank|resume_from_checkpoint|overwrite_output_dir": (
        "specific to one machine or account; give it on the command line"
    ),
}
"""Patterns of refused names, and why they are refused."""

PLACES = ("stdlib", "package")
"""Allowed prefixes before a colon: ``stdlib:*.py`` and ``package:torch/*.py`` are files of the running Python."""

LARGEST = 1e12
"""Largest absolute value of a number."""
MAX_ENTRIES = 1000
"""Most keys, and most entries of a list: each takes time to check."""
MAX_TEXT = 4096
"""Most characters of one value."""

_TOKEN = re.compile(r"\b((hf|sk|gh[a-z]|github_pat)_|sk-)[A-Za-z0-9_-]{20,}")
_PATTERN = re.compile(r"optim_args|(.*_)?(modules|parameters|modules_to_save|layers_pattern)")
_PICKLE = re.compile(r"\.(pkl|pickle|pt|pth|bin|ckpt|joblib|npy)$", re.IGNORECASE)
_OPENED = re.compile(r"(.*_)?(files?|path|dir|folder)")

MAX_REPEATS = 3
"""Most repeats in one pattern for module names: with n repeats, the time on k letters grows as k to the power n."""
_TRIES = 16  # ways to match that a repeat counts for; an alternative counts for one
# What can match in only one way from a position: a repeat of non-dots up to a dot, an escape, a class.
_UP_TO_A_DOT = r"(?:\\[dw]|\[(?:\w(?:-\w)?)+\]|\[\^\\?\.\])[*+]\\\.(?![*+?{])"
_ONE_WAY = re.compile(rf"{_UP_TO_A_DOT}|\\\D|\[\^?\]?(?:\\.|[^\]\\])*\]?", re.DOTALL)
_FLAT_GROUP = re.compile(r"\(([^()*+?{]*)\)(?![*+?{])")
_BRANCH = re.compile(r"(?:\([^()]*\)|[^|()])+")
_OVERRIDE = r"[A-Za-z]\w*=[\w.+-]*"


def refusals(recipe: Mapping[str, Any]) -> list[str]:
    """Lists the unsafe content of a recipe.

    Args:
        recipe: The content of a file.

    Returns:
        One line per key: what was got, what is wanted, and the remedy.
    """
    found = []
    if len(recipe) > MAX_ENTRIES:
        return [f"got {len(recipe)} keys, wanted at most {MAX_ENTRIES}"]
    for key, value in recipe.items():
        if key == PROVENANCE:
            problem = _in_provenance(value)
        else:
            problem = problem_of_key(key) or _in_option(key, value)
        if problem:
            found.append(f"{key if key.isprintable() and len(key) < 100 else shown(key)}: {problem}")
    return found


def problem_of_key(key: str) -> str:
    """Returns why a key is refused by its name alone, or an empty string."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", key):
        return "wanted a name of letters, digits and underscores"
    why = next((why for pattern, why in REFUSED.items() if re.fullmatch(pattern, key, re.IGNORECASE)), "")
    return f"refused, because it is {why}" if why else ""


def _in_option(key: str, value: Any) -> str:
    if not isinstance(value, list):
        return _in_scalar(key, value)
    if not value:
        return "got an empty list, wanted an entry; omit the key to use the default"
    if len(value) > MAX_ENTRIES:
        return f"got {len(value)} entries, wanted at most {MAX_ENTRIES}"
    dashed = next((item for item in value if isinstance(item, str) and item.startswith("-")), None)
    if dashed is not None:
        return f"got {shown(dashed)}, which a program would read as an option; wanted it without the dash"
    return next(filter(None, (_in_scalar(key, item) for item in value)), "") or _in_patterns_together(key, value)


def _in_scalar(key: str, value: Any) -> str:
    if value is None:
        return "got null, wanted a value; omit the key to use the default"
    if isinstance(value, (dict, list)):
        return f"got a nested value, wanted a flat one; only {PROVENANCE} may nest, and dictionaries are JSON text"
    if isinstance(value, str):
        return _in_text(value) or _in_value(key, value)
    return _in_number(value)


def _in_number(value: float) -> str:
    # False for NaN too, which satisfies no comparison.
    return "" if -LARGEST <= value <= LARGEST else f"got {shown(value)}, wanted a number between ±{LARGEST:g}"


def _in_text(text: str) -> str:
    if len(text) > MAX_TEXT:
        return f"got text of {len(text)} characters, wanted at most {MAX_TEXT}"
    if not text.isprintable():
        return f"got {shown(text)}, wanted printable characters on one line"
    if _TOKEN.search(text):
        return "got text that looks like an access token, wanted none; revoke it if it is yours, and log in instead"
    return ""


def _in_value(key: str, text: str) -> str:
    # The options of an optimizer contain regular expressions, and none opens a file.
    if key != "optim_args":
        parts = re.split(r"[/\\:]", text)  # package:NAME/PATTERN is a path too
        # Libraries also open file:/x, local:x and simplecache::/x. A colon before a space is text, such as a prompt.
        scheme = re.match(r"\s*([A-Za-z][\w+.-]*):(?!\s|$)", text)
        addressed = "://" in text or "::" in text or (scheme and scheme[1] not in PLACES)
        if text.startswith(("/", "\\", "~")) or re.match("[A-Za-z]:", text) or ".." in parts:
            return f"got {shown(text)}, wanted a path below the working folder; give it on the command line"
        if addressed:
            return f"got {shown(text)}, wanted no URL, which may lead anywhere; give it on the command line"
        if _OPENED.fullmatch(key) and any(part.startswith(".") and part != "." for part in parts):
            return f"got {shown(text)}, wanted no hidden file or folder; give it on the command line"
        if _OPENED.fullmatch(key) and _PICKLE.search(text):
            return (
                f"got {shown(text)}, wanted no pickle, which can run code when it is loaded; use safetensors or text"
            )
    # Anything but a plain name is downloaded from the Hub as a kernel and run.
    if key.endswith("_implementation") and not re.fullmatch(r"\w+", text):
        return f"got {shown(text)}, wanted the name of a built-in implementation, such as sdpa"
    if key == "report_to" and text not in ("none", "tensorboard"):
        return f"got {shown(text)}, wanted none or tensorboard; give services that need an account on the command line"
    if _PATTERN.fullmatch(key) and (problem := _in_patterns(key, text)):
        return problem
    if key == "config_overrides" and not re.fullmatch(rf"{_OVERRIDE}(,{_OVERRIDE})*", text):
        return f"got {shown(text)}, wanted name=value pairs split by commas, such as n_layer=4,n_embd=256"
    return _in_json(text) if text.startswith("{") else ""


def _in_patterns(key: str, text: str) -> str:
    try:
        found = options.patterns(text) if key == "optim_args" else [text]
    except ValueError as error:
        return str(error)
    problem = _slowness("|".join(found))  # each module name is matched against all of them
    return problem and f"got {shown(text)}, {problem}"


def _slowness(pattern: str) -> str:
    """Says why a regular expression may take forever on a name, or returns an empty string.

    Python's ``re``, which the Trainer and peft use, tries one way to match after the other and has no time limit.
    Only patterns with few ways to match are accepted: no repeat contains another, and few follow each other.
    """
    simplified = _ONE_WAY.sub("\0", pattern).replace("(?:", "(")
    if re.search(r"[()\\]", _FLAT_GROUP.sub("", simplified)):
        return (
            "wanted groups such as (q|k)_proj that are not repeated and contain no repeat, group or reference; "
            "others may take forever; give them on the command line"
        )
    if sum(map(_ways, _BRANCH.findall(simplified))) > _TRIES**MAX_REPEATS:
        return (
            f"wanted fewer ways to match: at most {MAX_REPEATS} of * + ? {{}}, except a final .* and those up to "
            r"a dot, such as [0-9]+\., and few alternatives; others may take forever; give them on the command line"
        )
    return ""


def _ways(branch: str) -> int:
    """Estimates the ways to match a pattern whose groups are flat and contain its only alternatives."""
    repeats = re.findall(r"[*+?]\??|\{", branch.rstrip("$").removesuffix(".*"))
    ways: int = _TRIES ** len(repeats)
    return ways * math.prod(map(_ways_through_group, _FLAT_GROUP.findall(branch)))


def _ways_through_group(group: str) -> int:
    """Counts the alternatives that may match at one position: those with the same letter, if all begin with one."""
    first = Counter(one[:1] for one in group.split("|"))
    return max(first.values()) if all(map(str.isalnum, first)) else first.total()


def _in_patterns_together(key: str, entries: list[Any]) -> str:
    texts = [entry for entry in entries if isinstance(entry, str)]
    return _in_patterns(key, "|".join(texts)) if texts and _PATTERN.fullmatch(key) and key != "optim_args" else ""


def _in_json(text: str) -> str:
    if text.count("{") + text.count("[") > 50:
        return "got JSON of more than 50 levels or entries, wanted a small object"
    try:
        return _in_tree("", json.loads(text))
    except ValueError as error:
        return f"got {shown(text)}, wanted a JSON object: {error}"


def _in_tree(key: str, value: Any) -> str:
    if isinstance(value, dict):
        pairs = [(name, problem_of_key(name) or _in_tree(name, inner)) for name, inner in value.items()]
        return next((f"{shown(name)}: {problem}" for name, problem in pairs if problem), "")
    if isinstance(value, list):
        return next(filter(None, (_in_tree(key, inner) for inner in value)), "") or _in_patterns_together(key, value)
    return "" if value is None else _in_scalar(key, value)


def _in_provenance(value: Any) -> str:
    if isinstance(value, dict):
        return next(filter(None, map(_in_provenance, [*value, *value.values()])), "")
    if isinstance(value, list):
        return next(filter(None, map(_in_provenance, value)), "")
    if isinstance(value, str):
        return _in_text(value)
    finite = not isinstance(value, float) or math.isfinite(value)
    return "" if finite else f"got {shown(value)}, wanted a finite number or text"
