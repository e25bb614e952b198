"""The documentation says what the code does: links lead somewhere, code runs, tables are those of the code."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Counting, arguments, gpt2

import hf_soap

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import update_readme  # noqa: E402

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS, *sorted((ROOT / "model_cards").glob("*.md"))]
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name)


# Size and links


def test_the_figures_of_the_gpu_are_those_of_the_file() -> None:
    page = update_readme.BENCHMARKS.read_text(encoding="utf-8")
    assert "NVIDIA H100" in page
    assert update_readme.with_figures(page) == page


def test_the_tables_of_the_ladder_are_those_of_the_files() -> None:
    page = update_readme.BENCHMARKS.read_text(encoding="utf-8")
    assert page.count("<!-- ladder -->\n") == 1
    assert update_readme.with_ladders(page) == page


def test_the_tables_of_bare_steps_are_those_of_the_files() -> None:
    page = update_readme.BENCHMARKS.read_text(encoding="utf-8")
    assert page.count("<!-- steps -->\n") == 1
    assert update_readme.with_steps(page) == page


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 1500


def links(page: Path) -> list[tuple[str, str]]:
    """Targets of the relative links of a page, each with its anchor or an empty one."""
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\[[^]]*\]\(([^)\s]+)\)", text)
    return [(target.partition("#")[0], target.partition("#")[2]) for target in targets if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        path = page.parent / target if target else page
        assert path.exists(), f"{name(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(path), f"{name(page)} links to #{anchor}, which {target or 'it'} does not have"


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    assert {target for target, _ in links(index)} >= {page.name for page in DOCS if page != index}
    assert "index.md" in {Path(target).name for page in [*DOCS, README] for target, _ in links(page)}


# What is taken from the code


def test_option_tables_are_those_of_the_configs() -> None:
    text = update_readme.OPTIONS.read_text(encoding="utf-8")
    assert text.count("<!-- options") == 5
    assert update_readme.with_tables(text) == text, "run: python scripts/update_readme.py"


def test_the_textbook_loop_is_that_of_the_package() -> None:
    text = update_readme.ALGORITHM.read_text(encoding="utf-8")
    assert text.count("<!-- source") == 7
    assert update_readme.with_sources(text) == text, "run: python scripts/update_readme.py"


def test_a_changed_table_or_source_is_noticed() -> None:
    table = update_readme.OPTIONS.read_text(encoding="utf-8").replace("`0.95`", "`0.9`", 1)
    assert update_readme.with_tables(table) != table
    source = update_readme.ALGORITHM.read_text(encoding="utf-8").replace("rotated * rotated", "rotated", 1)
    assert update_readme.with_sources(source) != source


def test_figures_of_a_gpu_have_their_place() -> None:
    section = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").partition("## On a GPU\n")[2]
    assert re.search(r"<!-- gpu -->\n.*?<!-- end -->\n", section, re.DOTALL)


def test_tests_that_pages_name_exist() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    defined = set().union(*(re.findall(r"def (\w+)\(", source) for source in sources.values()))
    named = 0
    for page in PAGES:
        for file, test in re.findall(r"`(?:[\w/]+/)?(\w+\.py)?(?:::)?(test_\w+)?`", page.read_text(encoding="utf-8")):
            if test:
                assert test in defined, f"{name(page)} names {test}, which no file defines"
                named += 1
            if test and file:
                assert f"def {test}(" in sources[file], f"{name(page)} names {test} in {file}, which has no such test"
    assert named > 70


# Python


def blocks() -> Iterator[Any]:
    """The Python of each page, one block after another; the textbook's own is compared with its file instead."""
    for page in PAGES:
        text = re.sub(r"<!-- source .*?<!-- end -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        found = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        if page.name == "writing_a_rule.md":  # one program in parts
            found = ["\n".join(found)]
        for number, code in enumerate(found):
            yield pytest.param(code, id=f"{name(page)}-{number}")


@pytest.mark.parametrize("code", [*blocks()])
def test_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block with an ellipsis is compiled; any other runs, beside what its page speaks of."""
    compiled = compile(code, "<documentation>", "exec")
    if "..." in code:
        return
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, data = gpt2(), Counting(8)
    optimizer = hf_soap.SOAP(model.parameters())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    batch = {key: value.unsqueeze(0) for key, value in data[0].items()}
    args = arguments(tmp_path / "out")
    spoken_of = {"args": args, "batch": batch, "data": data, "model": model, "optimizer": optimizer}
    spoken_of |= {"hf_soap": hf_soap, "path": tmp_path / "optimizer.pt", "__name__": "documentation"}
    exec(compiled, spoken_of)
