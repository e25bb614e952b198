"""The tables of names say what the code knows."""

import re
from pathlib import Path

import pytest

from hf_soap.optimizers.names import OURS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/optimizers.md"])
def test_every_name_and_its_learning_rate_is_listed(page: str) -> None:
    names = (ROOT / page).read_text(encoding="utf-8").partition("\n## Names\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|.*\| ([\de.-]+) \|$", names, flags=re.MULTILINE)
    listed = {name: float(lr) for names, lr in rows for name in re.findall(r"`(\w+)`", names)}
    assert listed == {config.name: config.lr for configs in OURS.values() for config in configs}
