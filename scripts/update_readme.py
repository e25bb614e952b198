"""Writes anew what pages of docs/ take from the code: option tables, and the textbook loop of SOAP.

python scripts/update_readme.py
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

from hf_soap.config import options
from hf_soap.optimizers.names import ENTRIES

ROOT = Path(__file__).parent.parent
OPTIONS = ROOT / "docs" / "optimizers.md"
ALGORITHM = ROOT / "docs" / "algorithm.md"
TEXTBOOK = ROOT / "hf_soap" / "reference" / "soap.py"


def with_tables(text: str) -> str:
    """Returns a page with the table of each `<!-- options NAME -->` as the config has it now."""
    return _filled(text, "options", lambda name: options.option_table(ENTRIES[name].config))


def with_sources(text: str) -> str:
    """Returns a page with the functions of each `<!-- source NAME ... -->` as the textbook loop has them now."""
    functions = _functions(TEXTBOOK.read_text(encoding="utf-8"))

    def block(names: str) -> str:
        code = "\n\n\n".join(functions[name] for name in names.split())
        return f"```python\n{code}\n```"

    return _filled(text, "source", block)


def _filled(text: str, kind: str, make: Callable[[str], str]) -> str:
    marked = re.compile(rf"(<!-- {kind} ([\w. ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda match: f"{match[1]}{make(match[2])}\n{match[3]}", text)


def _functions(source: str) -> dict[str, str]:
    """Returns functions by name, and methods as `Class.method`."""
    found = {}
    for node in ast.parse(source).body:
        inner = [(f"{node.name}.", each) for each in node.body] if isinstance(node, ast.ClassDef) else [("", node)]
        for prefix, each in inner:
            if isinstance(each, ast.FunctionDef):
                segment = ast.get_source_segment(source, each, padded=True)
                found[prefix + each.name] = textwrap.dedent(segment or "")
    return found


if __name__ == "__main__":
    OPTIONS.write_text(with_tables(OPTIONS.read_text(encoding="utf-8")), encoding="utf-8")
    ALGORITHM.write_text(with_sources(ALGORITHM.read_text(encoding="utf-8")), encoding="utf-8")
