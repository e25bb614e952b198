"""Writes anew what pages of docs/ take from elsewhere: option tables, the textbook loop of SOAP, measured figures.

python scripts/update_readme.py
python scripts/update_readme.py --gpu gpu/gpu.json     # figures of another run of scripts/measure_gpu.py
python scripts/update_readme.py --ladder ladder/ladder.json    # tables of other runs of scripts/ladder.py
python scripts/update_readme.py --steps step.json    # tables of scripts/bench_step.py --json step.json
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from _gpu_tables import gpu_tables
from _ladder_table import ladder_table
from _step_tables import step_tables
from bench_step import SHAPES

from hf_soap.config import options
from hf_soap.optimizers.names import ENTRIES

ROOT = Path(__file__).parent.parent
OPTIONS = ROOT / "docs" / "optimizers.md"
ALGORITHM = ROOT / "docs" / "algorithm.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
GPU = ROOT / "docs" / "measurements" / "h100-2026-11-27.json"
LADDERS = sorted((ROOT / "docs" / "measurements").glob("ladder-*.json"))
STEPS = sorted((ROOT / "docs" / "measurements").glob("step-*.json"))
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


def with_figures(text: str, report: Path = GPU) -> str:
    """Returns a page with the tables of a run of scripts/measure_gpu.py between its marks."""
    return _between(text, "gpu", gpu_tables(json.loads(report.read_text(encoding="utf-8"))))


def with_ladders(text: str, reports: Sequence[Path] = LADDERS) -> str:
    """Returns a page with the tables of runs of scripts/ladder.py between their marks."""
    tables = (ladder_table(json.loads(report.read_text(encoding="utf-8"))) for report in reports)
    return _between(text, "ladder", "\n".join(tables))


def with_steps(text: str, reports: Sequence[Path] = STEPS) -> str:
    """Returns a page with the tables of runs of scripts/bench_step.py between their marks."""
    found = [json.loads(report.read_text(encoding="utf-8")) for report in reports]
    return _between(text, "steps", step_tables(found, list(SHAPES)))


def _between(text: str, kind: str, tables: str) -> str:
    marked = re.compile(rf"(<!-- {kind} -->\n).*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda match: f"{match[1]}{tables}{match[2]}", text)


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


def main() -> None:
    """Writes the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", type=Path, default=GPU, help="gpu.json of scripts/measure_gpu.py")
    parser.add_argument(
        "--ladder", type=Path, nargs="+", default=LADDERS, help="each the ladder.json of scripts/ladder.py"
    )
    parser.add_argument("--steps", type=Path, nargs="+", default=STEPS, help="each a file of bench_step.py --json")
    args = parser.parse_args()
    for page, made in (
        (OPTIONS, with_tables),
        (ALGORITHM, with_sources),
        (BENCHMARKS, lambda text: with_steps(with_ladders(with_figures(text, args.gpu), args.ladder), args.steps)),
    ):
        page.write_text(made(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
