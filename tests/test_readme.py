"""The README says what the code does."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from update_readme import README, with_tables  # noqa: E402

from hf_soap.optimizers.names import ENTRIES  # noqa: E402


def test_option_tables_are_those_of_the_schema() -> None:
    text = README.read_text()
    assert text.count("<!-- options") == 3
    assert with_tables(text) == text, "run: python scripts/update_readme.py"


def test_every_name_and_its_learning_rate_is_listed() -> None:
    names = README.read_text().partition("## Names")[2].partition("## Settings")[0]
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|.*\| ([\de.-]+) \|$", names, flags=re.MULTILINE)
    listed = {name: float(lr) for names, lr in rows for name in re.findall(r"`(\w+)`", names)}
    assert listed == {name: entry.config.lr for name, entry in ENTRIES.items()}
