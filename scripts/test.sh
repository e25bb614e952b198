#!/usr/bin/env bash
# Everything a change must pass, from a fresh clone: environment, lint, format, types, fast tests.
# Usage: bash scripts/test.sh [arguments for pytest]
#
# CONSTRAINTS names another file of pins than constraints.txt, or /dev/null for the newest of everything.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/_venv.sh

constraints=${CONSTRAINTS:-constraints.txt}
ensure_venv .venv '.[dev]' "$constraints"
run=.venv/bin/python

if [ "$constraints" = constraints.txt ]; then # other versions of the linters have other rules
    say "ruff"
    "$run" -m ruff check .
    "$run" -m ruff format --check .
    say "mypy"
    "$run" -m mypy
fi
say "pytest"
# Three processes for two cores: each has one thread, and often waits for a process that a test has started.
"$run" -m pytest -n 3 --dist worksteal "$@"
