"""Counts what one reads and runs to know what a step does.

python scripts/count_path.py

It prints how many functions and files of this package one SOAP step on four small tensors passes through, the lines
and files that say what SOAP computes, the import levels, and the files that an optimizer touches beside its own.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.nn import Parameter

from hf_soap import SOAP

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_soap"

READING = (
    "rules/soap.py",
    "rules/base.py",
    "linalg/eigenbases.py",
    "linalg/matrices.py",
)
"""Files in which all that SOAP computes is written."""


def step_path() -> set[tuple[str, str]]:
    """Returns (file, function) of each function of the package that a step without a refresh passes through."""
    params = [Parameter(torch.randn(shape)) for shape in ((6, 4), (6, 4), (5,), (3,))]
    optimizer = SOAP(params)
    found: set[tuple[str, str]] = set()

    def step() -> None:
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        name = frame.f_code.co_qualname
        if event == "call" and path.startswith(str(PACKAGE)) and not name.endswith(("<genexpr>", "comp>", "<lambda>")):
            found.add((str(Path(path).relative_to(PACKAGE)), name))

    for _ in range(3):
        step()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


def import_levels() -> int:
    """Returns the length of the longest chain of imports among the modules of the package."""
    modules = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    edges = {name: {one for one in imported(path) if one in modules} for name, path in modules.items()}
    depth: dict[str, int] = {}

    def level(name: str, above: tuple[str, ...] = ()) -> int:
        if name not in depth:
            below = [level(one, (*above, name)) for one in edges[name] if one not in above and one != name]
            depth[name] = 1 + max(below, default=0)
        return depth[name]

    return max(level(name) for name in modules)


def module_name(path: Path) -> str:
    """Returns the dotted name of a file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Yields the modules that a file imports when it is loaded."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def mentioning(pattern: str) -> list[str]:
    """Returns the files of the package in whose code a regular expression is found, but for muon.py."""
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "muon.py"]
    found = [path for path in paths if re.search(pattern, path.read_text(encoding="utf-8"))]
    return [str(path.relative_to(ROOT)) for path in found]


def main() -> None:
    """Prints the counts."""
    path = step_path()
    print(f"a SOAP step passes through {len(path)} functions in {len({file for file, _ in path})} files")
    for file in sorted({file for file, _ in path}):
        print(f"    {file}: {', '.join(sorted(name for one, name in path if one == file))}")
    lines = sum(len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in READING)
    print(f"what SOAP computes is in {lines} lines of {len(READING)} files: {', '.join(READING)}")
    print(f"{import_levels()} import levels")
    print(f"Muon touches {', '.join(mentioning('import Muon|MuonConfig'))} beside its own files")
    print(f"the third-party rule touches {', '.join(mentioning('SPlus')) or 'no file'} of the package")


if __name__ == "__main__":
    main()
