"""Rewrites the option tables of README.md from the configs.

python scripts/update_readme.py
"""

from __future__ import annotations

import re
from pathlib import Path

from hf_soap.config import options
from hf_soap.optimizers.names import ENTRIES

README = Path(__file__).parent.parent / "README.md"
MARKED = re.compile(r"(<!-- options (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """Returns the README's text with the present table of each marked optimizer."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}{options.option_table(ENTRIES[match[2]].config)}\n{match[3]}"

    return MARKED.sub(table, text)


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
