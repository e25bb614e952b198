"""Comments, docstrings, messages and documents use the field's words, and none of our own inventions.

Readers stumbled over words that only the authors knew (a verdict that is heard, a recut, octets), and over words for
places that meant times (the step behind this one).
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FOLDERS = (
    *("hf_soap/__init__.py", "hf_soap/__main__.py", "hf_soap/checkpoint", "hf_soap/cli", "hf_soap/config"),
    *(
        "hf_soap/distributed",
        "hf_soap/engine",
        "hf_soap/hub",
        "hf_soap/linalg",
        "hf_soap/optimizers",
        "hf_soap/planning",
    ),
    *("hf_soap/reference", "hf_soap/rules", "hf_soap/trainer"),
    *("scripts", "model_cards", "docs", "CHANGELOG.md", "CONTRIBUTING.md", "README.md"),
)
"""Files and folders that are held to the list."""

INSTEAD = {
    r"behind": "after; or name the place",
    r"in front of": "before",
    r"for ever": "without a limit",
    r"left out|leaves? out|leaving out": "skipped, omitted or not counted",
    r"on no host's account": "without host synchronization",
    r"of one's own": "its own, or separate",
    r"whoever|whosoever": "name the person or the program",
    r"what else": "name it",
    r"what is no|that is no": "is not a, or non-",
    r"comes? by|came by": "calls, or passes through",
    r"(?:takes?|took|taking) (?:note|down)": "records",
    r"(?:brings?|brought) up to date": "updates",
    r"passed over": "skipped or ignored",
    r"(?:is|are|was|were|be) heard|hears?": "resolves, or reads",
    r"settle[sd]?|settling": "resolves",
    r"without a word|no word": "without a message",
    r"stands? (?:behind|below|beside)": "is after, or is in the folders below",
    r"boils? down": "summarizes",
    r"octets?": "bytes",
    r"recuts?|cut anew": "reshards",
    r"(?:is|are|be) sane|(?:is|are|be) sound|norms_are_sane|finite_sound": "is finite",
    r"verdicts?|tall(?:y|ies)": "the finite check and its result",
    r"believed": "host_steps",
    r"lacking": "missing, or name what is omitted",
    r"blueprints?": "a model on the meta device",
    r"nobody": "say what happens; no person needs to be named",
}
"""Words that a native speaker stumbles over, as patterns, and what to write instead."""

CLASSES = re.compile(r"\b(Guard|Gauge|Probe|Team)\b")
"""Former names of NonfiniteGuard, RuleMetrics, StepProfiler and ReplicaGroup."""

SUFFIXES = {".py", ".md", ".yaml", ".sh", ".js", ".jinja"}


def files(folder: str) -> Iterator[Path]:
    path = ROOT / folder
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    return (each for each in found if each.suffix in SUFFIXES and "__pycache__" not in each.parts)


def stumbles(path: Path) -> Iterator[str]:
    """Yields each use of a listed word as file:line: word, and what to write instead."""
    name = path.relative_to(ROOT).as_posix()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        found = [(match[0], "its new name") for match in CLASSES.finditer(line)]
        for pattern, instead in INSTEAD.items():
            found += [(match[0], instead) for match in re.finditer(rf"\b(?:{pattern})\b", line, re.IGNORECASE)]
        for word, instead in found:
            yield f"{name}:{number}: {word!r}; write instead: {instead}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_words_are_those_of_the_field(folder: str) -> None:
    paths = list(files(folder))
    assert paths, f"{folder} has no text: change FOLDERS"
    found = [hit for path in paths for hit in stumbles(path)]
    assert not found, "\n" + "\n".join(found)


def test_listed_words_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And names that only contain them are not."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "text.py"
    path.write_text("# The step behind this one hears the verdict.\nsettle_gradient_ = NonfiniteGuard\n")
    assert [hit.partition(";")[0] for hit in stumbles(path)] == [
        "text.py:1: 'behind'",
        "text.py:1: 'hears'",
        "text.py:1: 'verdict'",
    ]
