"""Where this checkout has its parts, and what processes that tests start import from."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"
PYTHONPATH = os.pathsep.join([str(ROOT), str(HELPERS)])
