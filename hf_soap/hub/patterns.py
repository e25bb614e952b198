"""Regular expressions of a stranger for names of modules: only such as no name takes long to be tried on.

Python's search tries one way through a pattern after the other, and their number may double with each character. What
is written here is a small part of its language, in which the ways can be counted from the text.
"""

from __future__ import annotations

import re
from collections import Counter

REPEATS = 3
"""Repeats that may be tried at each of their lengths: what n of them cost on k letters grows as k to the power n."""
_TRIES = 16
_MOST_WAYS = _TRIES**REPEATS

# No text can be read as these in two ways, so that reading it takes no long time either.
_PLAIN = r"\\[^a-zA-Z0-9]|[^\\\[.^$*+?{}()|]"
_CLASS = r"\[\^?(?:\\.|[^\]\\^])(?:\\.|[^\]\\])*\]"
_ANCHOR = r"[\^$]|\\[AbBZ]"
_ONE = rf"{_PLAIN}|{_CLASS}|\.|\\[dDsSwW]"
_PIECE = re.compile(
    rf"\((?:\?:)?(?P<group>(?:{_ONE}|{_ANCHOR}|\|)*)\)|(?P<bar>\|)|{_ANCHOR}"
    rf"|(?P<one>{_ONE})(?P<repeat>(?:[*+?]|\{{[0-9]*,?[0-9]*\}})[?+]?)?",
    re.DOTALL,
)


def problem(pattern: str) -> str:
    """Says why a regular expression may take too long.

    Args:
        pattern: What names of modules or parameters are searched for.

    Returns:
        What is wanted instead, or nothing where the pattern is fine.
    """
    ways = _ways(pattern)
    if ways is None:
        return (
            r"wanted text, ., \., \d, [a-z], anchors, repeats of one of them, and groups such as (q|k)_proj that are "
            "not repeated, with no repeat and no group in them; others may take forever, give them on the command line"
        )
    if ways > _MOST_WAYS:
        return (
            f"wanted fewer ways to try: at most {REPEATS} of * + ? {{}}, but for those that the next character ends, "
            r"such as [0-9]+\., and few alternatives; others may take forever, give them on the command line"
        )
    return ""


def _ways(pattern: str) -> int | None:
    """Counts the ways from one place of a name through the pattern, or returns None for what is not read here."""
    pieces = [*_PIECE.finditer(pattern)]
    if "".join(piece[0] for piece in pieces) != pattern:
        return None
    total, ways = 0, 1
    for piece, following in zip(pieces, [*pieces[1:], None], strict=False):
        if piece["bar"]:
            total, ways = total + ways, 1
        elif piece["group"] is not None:
            ways *= _ways_through_group(piece["group"])
        elif _has_choice(piece, following):
            ways *= _TRIES
    return total + ways


def _ways_through_group(group: str) -> int:
    if not re.fullmatch(rf"(?:{_PLAIN}|\|)*", group, re.DOTALL):
        return group.count("|") + 1
    # Of plain alternatives those match at the same place that one of them begins with.
    counts = Counter(group.replace("\\", "").split("|"))
    return max(sum(counts[one[:end]] for end in range(len(one) + 1)) for one in counts)


def _has_choice(piece: re.Match[str], following: re.Match[str] | None) -> bool:
    """Whether what is behind a repeat can match at more than one of the repeat's lengths."""
    repeat = piece["repeat"]
    if repeat is None or (repeat[0] == "{" and "," not in repeat):
        return False
    if following is None or following[0] in ("|", "$"):
        return False
    if not re.fullmatch(_PLAIN, following[0], re.DOTALL):
        return True
    try:
        return re.fullmatch(piece["one"], following[0][-1], re.DOTALL) is not None
    except re.error:  # such as [z-a]
        return True
